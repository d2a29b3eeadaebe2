# shellcheck shell=bash disable=SC2164
# Installs this package into .venv on first use, and again only if setup.py has changed. Puts the
# commands of .venv first on the PATH. Other scripts source it; to install only:
#
#   EXTRAS=cuda bash -c 'source launch/environment.sh'
#
# Settings, from the environment:
#   EXTRAS  the extras to install, such as dev, tpu or cuda,gcs; default: none
#   PYTHON  the Python that makes .venv, 3.11 or newer; default: python3

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  help_if_asked "$@"
  [ $# = 0 ] || fail "takes no arguments, got '$*'"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  version=$("$PYTHON" --version 2> /dev/null) || version='no Python'
  echo "${0##*/}: PYTHON must be Python 3.11 or newer, got $PYTHON: ${version%%$'\n'*}" >&2
  exit 2
fi

stamp=".venv/installed-${EXTRAS:-base}"
checksum="$(cksum setup.py)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$checksum" ]; then
  echo "installing the package into .venv (only once)"
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
  echo "$checksum" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

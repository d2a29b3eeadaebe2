# shellcheck shell=bash disable=SC2164
# Sourced by the scripts beside it: makes .venv with this package on first use, and again only when
# setup.py has changed. Sets PATH so that the package's commands and its python come first.
# EXTRAS names the extras to install, as "dev" or "tpu".

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "PYTHON must be Python 3.11 or newer, got $("$PYTHON" --version 2>&1)" >&2
  exit 2
fi

stamp=".venv/installed-${EXTRAS:-base}"
wanted="$(cksum setup.py)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (once)"
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
  echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

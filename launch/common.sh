# shellcheck shell=bash
# Sourced by the scripts that start training elsewhere: help, settings, the commit, error messages.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

print_help() {  # the comment that the script begins with
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

must_match() {  # SETTING PATTERN WORDS
  [[ ${!1} =~ ^($2)$ ]] || fail "$1 must be $3, got '${!1}'"
}

need() {
  local setting
  for setting; do
    [ "${!setting:-}" ] || fail "$setting must be set: see --help"
  done
}

check_workdir() {  # a bucket, or a path that is the same wherever it is read
  must_match WORKDIR '/.*|gs://[a-z0-9][a-z0-9_.-]+(/.*)?' \
    'an absolute path or start with gs://BUCKET'
}

find_commit() {  # prints it
  git -C "$root" rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}" \
    || fail "COMMIT must be a commit of the clone $root, got ${COMMIT:-HEAD}"
  [ "${COMMIT:-}" ] || git -C "$root" diff --quiet HEAD \
    || echo "${0##*/}: changes that are not committed stay here" >&2
}

# The flags of dit-train, where only the files of a commit are: check_flags COMMIT FLAG...
check_flags() {
  local commit=$1 config=''
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --config=*) config=${1#*=} ;;
      --config) config=${2:-} ;;
      --workdir | --workdir=*) fail "--workdir must be given as WORKDIR, got the flag" ;;
    esac
    shift
  done
  [ "$config" ] || fail "--config must be given, as --config=configs/imagenet256.py:XL/2"
  [ "$(git -C "$root" cat-file -t "$commit:${config%%:*}" 2> /dev/null)" = blob ] \
    || fail "config must be a file of commit ${commit:0:7}, got ${config%%:*}"
}

show() {  # a command as one would type it
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line:1}"
}

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# shellcheck shell=bash
# Functions that the scripts in launch/ share: help, settings, the commit to train, error messages.
# Started alone, `bash launch/common.sh` does nothing. Settings: none.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
start_dir=$PWD

# Prints the help and ends the script if one of the arguments asks for it.
help_if_asked() {
  local word
  for word; do
    case $word in --help | -h) print_help && exit ;; esac
  done
}

print_help() {  # the comment at the top of the script
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

check_fields() {  # ARGUMENT...
  local word
  for word; do
    [[ $word =~ ^--(config\.[a-z0-9_.]+(=.*)?|noconfig\.[a-z0-9_.]+)$ ]] \
      || fail "takes flags --config.TOPIC.FIELD=VALUE, got '$word'"
  done
  check_names "$root/dit_jax/settings.py" "$@"
}

# Refuses fields that no config has; dit-train alone does it where no Python can read settings.py.
check_names() {  # SETTINGS_PY ARGUMENT...
  local line
  [ -r "$1" ] || return 0
  line=$("${PYTHON:-python3}" -c "$find_unknown" "$@" 2> /dev/null) || return 0
  case $line in 'config has no field '*) fail "${line%%$'\n'*}" ;; esac
}

# Prints the first argument that names an unknown field. Imports nothing of the package, which is
# not installed yet: it reads the classes of settings.py.
find_unknown='
import ast, difflib, sys
classes = {
    each.name: {x.target.id: x.annotation.id for x in each.body if isinstance(x, ast.AnnAssign)}
    for each in ast.parse(open(sys.argv[1]).read()).body
    if isinstance(each, ast.ClassDef)
}
fields = []
for topic, kind in classes["Settings"].items():
    fields += [f"{topic}.{name}" for name in classes[kind]] if kind in classes else [topic]
for word in sys.argv[2:]:
    flag, _, name = word.partition("=")[0].partition(".")
    if flag in ("--config", "-config", "--noconfig", "-noconfig") and name not in fields:
        if name:
            near = difflib.get_close_matches(name, fields, 1)
            print(f"config has no field {name}" + (f"; did you mean {near[0]}?" if near else ""))
            break
'

# Refuses what dit-train would refuse only on the machine that trains.
check_arguments() {  # MAX_WORDS RULE ARGUMENT...
  local max=$1 rule=$2 count=0 takes_value='' word
  shift 2
  for word; do
    if [ "$takes_value" ] && [[ $word != -* ]]; then
      takes_value=''
      continue
    fi
    takes_value=''
    [[ $word == *=* ]] || takes_value=yes
    case ${word%%=*} in
      --config | --workdir) count=$((count + 1)) ;;
      --init_from | --config.?* | --noconfig.?*) ;;
      -*) fail "takes $rule and flags of dit-train, got '$word'" ;;
      *) count=$((count + 1)) takes_value='' ;;
    esac
    [ "$count" -le "$max" ] || fail "takes $rule and flags of dit-train, got '$word' too"
  done
}

must_match() {  # SETTING PATTERN RULE
  [[ ${!1} =~ ^($2)$ ]] || fail "$1 must be $3, got '${!1}'"
}

require() {  # SETTING...
  local setting
  for setting; do
    [ "${!setting:-}" ] || fail "$setting must be set: see --help"
  done
}

must_be_on_disk() {  # SETTING...
  local setting
  for setting; do
    [[ ${!setting:-} != *://* ]] || fail "$setting must be on a local disk, got ${!setting}"
  done
}

# Prints the path in a setting, relative to the directory where the script was started, or else the
# default, relative to the clone.
path_of() {  # SETTING DEFAULT
  if [ "${!1:-}" ]; then (cd "$start_dir" && realpath -m "${!1}"); else echo "$2"; fi
}

# Call it after all settings are checked, so that a wrong setting is reported before a missing tool.
require_tool() {  # TOOL HOW_TO_INSTALL
  command -v "$1" > /dev/null || fail "$1 must be on the PATH: $2"
}

check_workdir() {  # a bucket or an absolute path
  must_match WORKDIR '/.*|gs://.*' 'an absolute path or start with gs://BUCKET'
  must_match WORKDIR '/.*|gs://[a-z0-9][a-z0-9_.-]+[a-z0-9](/.*)?' \
    'in a bucket whose name has 3 or more lower-case letters, digits, -, _ and .'
}

check_zone() {
  must_match ZONE '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' 'a zone, such as europe-west4-a, not a region'
}

find_commit() {  # prints the hash of COMMIT
  git -C "$root" rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}" \
    || fail "COMMIT must be a commit of the clone $root, got ${COMMIT:-HEAD}"
  [ "${COMMIT:-}" ] || git -C "$root" diff --quiet HEAD \
    || echo "${script:-${0##*/}}: uncommitted changes are not sent" >&2
}

# Checks the flags of dit-train: the workers have only the files of the commit.
check_flags() {  # COMMIT FLAG...
  local commit=$1 config=''
  shift
  local arguments=("$@")
  while [ $# -gt 0 ]; do
    case $1 in
      --config=*) config=${1#*=} ;;
      --config) config=${2:-} ;;
      [!-]*.py | [!-]*.py:*) config=$1 ;;
      --workdir | --workdir=*) fail "--workdir must be given as the setting WORKDIR, got a flag" ;;
    esac
    shift
  done
  check_arguments 1 CONFIG "${arguments[@]}"
  check_names <(git -C "$root" show "$commit:dit_jax/settings.py") "${arguments[@]}"
  [ "$config" ] || fail "--config must be given, as --config=configs/imagenet256.py:XL/2"
  [ "$(git -C "$root" cat-file -t "$commit:${config%%:*}" 2> /dev/null)" = blob ] \
    || fail "config must be a file of commit ${commit:0:7}, got ${config%%:*}"
}

print_command() {  # quoted, so that it can be pasted into a shell
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line:1}"
}

fail() {
  echo "${script:-${0##*/}}: $*" >&2
  exit 2
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  help_if_asked "$@"
  fail "is for other scripts, which source it: see --help"
fi

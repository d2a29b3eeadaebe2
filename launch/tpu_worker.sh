#!/usr/bin/env bash
# Runs on each worker of a TPU pod, in the home directory. launch/tpu.sh calls it over ssh.
#
#   bash dit_jax/launch/tpu_worker.sh COMMAND
#
# Commands:
#   install COMMIT          installs Python and the package into dit_jax/.venv
#   start COMMIT [FLAG...]  starts dit-train in the background
#   state                   prints running, none, lost, stopped or the exit code of dit-train
#   stop                    asks dit-train to save and exit
#
# Settings: none. dit_jax/ holds the code. dit_run/ holds the files of the training: log.txt, boot,
# exit_code, stopped, pid (of the shell that runs dit-train) and dit_train_pid.

set -euo pipefail

main() {
  case ${1:-} in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    install | start | train | state | stop) ;;
    *) fail "the command must be install, start, state or stop, got '${1:-}'" ;;
  esac
  cd
  "$@"
}

install() {
  # The images have Python 3.10. uv installs a newer one: https://docs.astral.sh/uv
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  cd dit_jax
  uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv -e '.[tpu]'
  echo "$1" > COMMIT  # last: the file exists only if the installation is complete
}

start() {
  [ "$(cat dit_jax/COMMIT 2> /dev/null)" = "$1" ] || fail "commit $1 is not installed here"
  [ "$(state)" != running ] || fail "dit-train is already running"
  shift
  mkdir -p dit_run
  rm -f dit_run/exit_code dit_run/stopped dit_run/dit_train_pid
  nohup bash dit_jax/launch/tpu_worker.sh train "$@" < /dev/null >> dit_run/log.txt 2>&1 &
  echo $! > dit_run/pid
  boot_id > dit_run/boot
}

boot_id() {  # changes when the machine restarts, after which a pid may belong to another program
  cat /proc/sys/kernel/random/boot_id
}

train() {
  local code=0
  cd dit_jax
  (
    echo "$BASHPID" > ../dit_run/dit_train_pid
    exec .venv/bin/dit-train "$@"  # keeps the pid
  ) || code=$?
  echo "$code" > ../dit_run/exit_code
}

state() {
  local alive=''
  # Check this first: the shell writes the exit code before it ends.
  ! is_alive || alive=yes
  if [ ! -e dit_jax/COMMIT ] || [ ! -e dit_run/pid ]; then
    echo none
  elif [ -s dit_run/exit_code ]; then
    if [ "$(cat dit_run/exit_code)" = 42 ] && [ -e dit_run/stopped ]; then
      echo stopped
    else
      cat dit_run/exit_code
    fi
  elif [ "$alive" ]; then
    echo running
  else
    echo lost  # the machine has restarted
  fi
}

is_alive() {
  [ "$(cat dit_run/boot 2> /dev/null)" = "$(boot_id)" ] && kill -0 "$(cat dit_run/pid)" 2> /dev/null
}

stop() {
  local pid
  [ "$(state)" = running ] || fail "dit-train is not running here"
  [ ! -e dit_run/stopped ] \
    || fail "dit-train was already asked to stop; a second signal would end it without saving"
  pid=$(cat dit_run/dit_train_pid 2> /dev/null) || pid=none
  is_child "$pid" || fail "dit-train is just starting or ending: try again"
  touch dit_run/stopped  # before the signal: otherwise babysit could restart the training
  kill -TERM "$pid"
}

is_child() {  # PID, of the shell that runs dit-train: a reused pid has another parent
  grep -qsx "PPid:[[:space:]]*$(cat dit_run/pid)" "/proc/$1/status"
}

fail() {
  echo "tpu_worker.sh: $1" >&2
  exit 2
}

main "$@"

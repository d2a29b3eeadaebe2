#!/usr/bin/env bash
# What launch/tpu.sh has each worker of a pod do, in the home directory there:
#
#   install COMMIT          Python and the package, into dit_jax/.venv
#   start COMMIT [FLAG...]  dit-train in the background
#   state                   running, none, lost, stopped or the exit code of dit-train
#   stop                    asks dit-train to save and end
#
# dit_jax/ holds the code; dit_run/ holds log.txt, pid, boot and exit_code of the training.

set -euo pipefail
cd

install() {
  # The images come with Python 3.10. uv brings a newer one: https://docs.astral.sh/uv
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  cd dit_jax
  uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv -e '.[tpu]'
  echo "$1" > COMMIT  # last, so that a half-made installation has none
}

start() {
  [ "$(cat dit_jax/COMMIT 2> /dev/null)" = "$1" ] || fail "commit $1 is not set up here"
  [ "$(state)" != running ] || fail "dit-train runs already"
  shift
  mkdir -p dit_run
  rm -f dit_run/exit_code dit_run/stopped
  nohup bash dit_jax/launch/tpu_worker.sh train "$@" < /dev/null >> dit_run/log.txt 2>&1 &
  echo $! > dit_run/pid
  boot_id > dit_run/boot
}

boot_id() {  # another one after every start of the machine, when a pid may be another program's
  cat /proc/sys/kernel/random/boot_id
}

train() {
  local code=0
  cd dit_jax
  .venv/bin/dit-train "$@" || code=$?
  echo "$code" > ../dit_run/exit_code
}

state() {
  local alive=''
  # Looked at first: a training writes its exit code before it is gone.
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
    echo lost  # the machine was started anew
  fi
}

is_alive() {
  [ "$(cat dit_run/boot 2> /dev/null)" = "$(boot_id)" ] && kill -0 "$(cat dit_run/pid)" 2> /dev/null
}

stop() {
  [ "$(state)" = running ] || fail "no dit-train runs here"
  [ ! -e dit_run/stopped ] || fail "dit-train was asked already: twice, it leaves without saving"
  touch dit_run/stopped
  pkill -TERM -P "$(cat dit_run/pid)"
}

fail() {
  echo "tpu_worker.sh: $1" >&2
  exit 2
}

"$@"

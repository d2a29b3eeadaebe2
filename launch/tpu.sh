#!/usr/bin/env bash
# Trains on a Cloud TPU pod or a single TPU VM: one queued resource, the same commit on all workers.
#
#   NAME=dit ZONE=europe-west4-a PROJECT=my-project TYPE=v3-32 WORKDIR=gs://my-bucket/xl2 \
#     bash launch/tpu.sh babysit --config=configs/imagenet256.py:XL/2
#
# Commands:
#   create    asks for the pod and waits until it is there
#   setup     copies the commit to every worker and installs it
#   run       starts dit-train on every worker; it goes on when the connection ends
#   status    the states of the pod and of the training; a number is the exit code of dit-train
#   logs      the last lines of worker 0
#   attach    follows worker 0 until Ctrl-C, which does not touch the training
#   stop      asks dit-train to save and end; babysit does not start it again
#   delete    gives the pod back: it costs money until then, whether it trains or not
#   babysit   create, setup and run, again after every preemption, until the training ends. It may
#             be ended and started again: it takes up what it finds.
#
# Flags of `run` and `babysit` go to dit-train. --dry-run prints the gcloud lines and runs nothing.
#
# Settings, from the environment:
#   NAME      of the queued resource and of its TPU VM
#   ZONE      as europe-west4-a
#   PROJECT   of Google Cloud
#   TYPE      for create, babysit: v3-32, v5litepod-16, v6e-8, ...
#   WORKDIR   for run, babysit: where the run lives. A pod needs one place for all workers that also
#             outlives them: a bucket, gs://my-bucket/xl2, or a share that is mounted there. A path
#             on the worker's own disk is for a single VM, and lost with it.
#   CAPACITY  spot (if not set), reserved or on-demand
#   RUNTIME   the image; if not set, the one that Google names for TYPE
#   COMMIT    what to train; if not set, HEAD
#   POLL      seconds between two looks at the pod: 60 if not set
#   TAIL      lines that logs and attach begin with: 50 if not set
#
# Exit codes: 0 done, 2 wrong use or gcloud refused; babysit: that of dit-train.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CAPACITY=${CAPACITY:-spot} POLL=${POLL:-60} TAIL=${TAIL:-50}
dry_run=''
said=''

main() {
  local command='' flags=() word
  for word; do
    case $word in
      --help | -h) print_help && exit ;;
      --dry-run) dry_run=yes && exec 3>&1 ;;  # 3: what it prints, also from inside $(...)
      *) if [ "$command" ]; then flags+=("$word"); else command=$word; fi ;;
    esac
  done
  case $command in
    run | babysit) ;;
    create | setup | status | logs | attach | stop | delete)
      [ ${#flags[@]} = 0 ] || fail "$command takes nothing more, got '${flags[*]}'"
      ;;
    *)
      fail "the command must be one of create, setup, run, status, logs, attach, stop, delete," \
        "babysit, got '$command'"
      ;;
  esac
  read_settings "$command"
  case $command in run | babysit) check_flags "$commit" "${flags[@]}" ;; esac
  "$command" "${flags[@]}"
}

read_settings() {  # of a command
  need NAME ZONE PROJECT
  must_match NAME '[a-z]([a-z0-9-]*[a-z0-9])?' 'of small letters, digits and -'
  must_match POLL '[0-9]+(\.[0-9]+)?' 'a number of seconds'
  must_match TAIL '[0-9]+' 'a number of lines'
  case $1 in create | babysit) need TYPE && choose_machine ;; esac
  case $1 in run | babysit) need WORKDIR && check_workdir ;; esac
  # Once, so that a pod that comes back gets the same commit.
  case $1 in setup | run | babysit) commit=$(find_commit) ;; esac
  where=(--zone="$ZONE" --project="$PROJECT" --quiet)
  [ "$dry_run" ] || command -v gcloud > /dev/null \
    || fail "gcloud must be on the PATH: https://cloud.google.com/sdk/docs/install"
  errors=$(mktemp)
  trap 'rm -f "$errors"' EXIT
}

choose_machine() {  # https://cloud.google.com/tpu/docs/runtimes
  case $CAPACITY in
    spot | reserved) capacity=("--$CAPACITY") ;;
    on-demand) capacity=() ;;
    *) fail "CAPACITY must be spot, reserved or on-demand, got $CAPACITY" ;;
  esac
  case ${RUNTIME:+chosen}$TYPE in
    chosen*) ;;
    v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    *) fail "RUNTIME must be set for TYPE $TYPE" ;;
  esac
}

# The commands.

create() {
  local pod detail
  request
  while true; do
    read -r pod detail < <(look_at_pod)
    [ "$dry_run" ] || say "pod: $detail"
    case $pod in
      ready) return ;;
      waiting) sleep "$POLL" ;;
      unknown) refuse create ;;
      *) fail "the pod does not come, it is $detail: delete it" ;;
    esac
  done
}

setup() {
  local training
  training=$(look_at_training)
  [ "$training" != running ] || fail "dit-train runs on the pod: stop it first"
  install || refuse setup
}

run() {
  start "$@" || refuse run
}

status() {
  local pod detail training=''
  read -r pod detail < <(look_at_pod)
  [ "$pod" != unknown ] || refuse status
  [ "$pod" != ready ] || training=", training: $(look_at_training)"
  [ "$dry_run" ] || echo "pod: $detail$training"
}

logs() {
  on_workers 0 "tail -n $TAIL dit_run/log.txt" || refuse logs
}

attach() {
  on_workers 0 "tail -n $TAIL -F dit_run/log.txt" || refuse attach
}

stop() {
  on_workers all 'bash dit_jax/launch/tpu_worker.sh stop' || refuse stop
}

delete() {
  give_back || refuse delete
}

babysit() {
  local pod detail was_ready=''
  local fresh=yes trained='' crashed='' troubles=0  # of the pod that is there now
  if [ "$dry_run" ]; then
    create && install && start "$@" && look_at_training > /dev/null
    echo "# after a preemption, and then all of it again:" >&3
    give_back
    return
  fi
  request
  while true; do
    read -r pod detail < <(look_at_pod)
    [ "$pod" = ready ] || say "pod: $detail"
    case $pod in
      ready) was_ready=yes && tend "$@" ;;
      waiting) fresh=yes ;;  # a pod that is repaired has to be set up again
      absent) ask || say "create: $(reason)" ;;
      unknown) say "describe: $(reason)" ;;
      gone)
        [ "$detail$was_ready" != FAILED ] || fail "Google cannot meet the request, it FAILED"
        replace
        ;;
    esac
    sleep "$POLL"
  done
}

# Does what a ready pod needs next; sets the variables of babysit, or ends it.
tend() {
  local training
  training=$(look_at_training)
  # What an earlier training left on the pod says nothing of this one.
  [ ! "$fresh" ] || [[ $training =~ ^(running|unreachable)$ ]] || training=none
  say "training: $training"
  case $training in
    running) fresh='' trained=yes crashed='' troubles=0 ;;
    none | lost) { install && start "$@" && fresh='' trained=yes; } || put_up_with ;;
    42) start "$@" || put_up_with ;;
    unreachable) put_up_with ;;
    0 | 2 | 3) finish "$training" ;;
    stopped) finish 42 ;;
    *)  # a worker that is preempted takes the others down before the pod is said to be gone
      [ ! "$crashed" ] || finish "$training"
      crashed=yes
      ;;
  esac
}

put_up_with() {  # workers that do not obey: twice, and no more if they never did
  troubles=$((troubles + 1))
  say "failure $troubles: $(reason)"
  [ "$troubles" -ge 3 ] || return 0
  [ "$trained" ] || fail "gave up on the pod, which is still there and costs money"
  replace
}

replace() {
  fresh=yes trained='' crashed='' troubles=0
  give_back || say "delete: $(reason)"
}

finish() {
  say "dit-train ended with $1; the pod is still there and costs money until it is deleted"
  exit "$1"
}

# What the commands are made of.

request() {  # a pod that is there already is welcome
  ask || grep -qi 'already.exists' "$errors" || refuse create
}

ask() {
  cloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${capacity[@]}" "${where[@]}"
}

give_back() {
  cloud compute tpus queued-resources delete "$NAME" --force "${where[@]}"
}

install() {
  local archive="${TMPDIR:-/tmp}/dit_jax-$commit.tar.gz"
  local pack=(git -C "$root" archive --output="$archive" "$commit")
  if [ "$dry_run" ]; then show "${pack[@]}" >&3; else "${pack[@]}" 2> "$errors" || return; fi
  cloud compute tpus tpu-vm scp "$archive" "$NAME:dit_jax.tar.gz" --worker=all \
    --scp-flag=-oConnectTimeout=30 --scp-flag=-oServerAliveInterval=30 "${where[@]}" \
    && on_workers all "rm -rf dit_jax && mkdir dit_jax && tar -xzf dit_jax.tar.gz -C dit_jax\
 && bash dit_jax/launch/tpu_worker.sh install $commit"
}

start() {
  on_workers all \
    "$(show bash dit_jax/launch/tpu_worker.sh start "$commit" --workdir="$WORKDIR" "$@")"
}

# ready, waiting, gone, absent, or unknown where gcloud cannot say; then the states in Google's
# words. The request of a preempted pod stays, SUSPENDED, and takes quota until it is deleted.
look_at_pod() {
  local asked vm
  if ! asked=$(describe queued-resources 'value(state.state)'); then
    if is_not_found; then echo absent not there; else echo unknown; fi
    return
  fi
  case ${dry_run:+ACTIVE}$asked in
    ACTIVE) ;;
    SUSPENDED | FAILED) echo "gone $asked" && return ;;
    *) echo "waiting $asked" && return ;;
  esac
  if ! vm=$(describe tpu-vm 'value(state)'); then
    if is_not_found; then echo "gone ACTIVE, no VM"; else echo unknown; fi
    return
  fi
  case ${dry_run:+READY}$vm in
    READY) echo "ready ACTIVE, READY" ;;
    PREEMPTED | TERMINATED | STOPPED | UNKNOWN) echo "gone ACTIVE, $vm" ;;
    *) echo "waiting ACTIVE, $vm" ;;
  esac
}

describe() {
  cloud compute tpus "$1" describe "$NAME" --format="$2" "${where[@]}"
}

is_not_found() {
  grep -qi 'not.found' "$errors"
}

# Of what the workers say (see tpu_worker.sh) the word that decides what to do next; unreachable
# where one of them says nothing.
look_at_training() {
  local answers word
  answers=$(on_workers all \
    'bash dit_jax/launch/tpu_worker.sh state 2> /dev/null || echo none') \
    || { echo unreachable && return; }
  for word in running none 2 3 lost stopped 42; do
    if grep -qx "$word" <<< "$answers"; then
      echo "$word"
      return
    fi
  done
  sort -n <<< "$answers" | tail -n 1
}

on_workers() {  # WORKERS COMMAND; a dead connection ends instead of hanging
  cloud compute tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2" \
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 "${where[@]}"
}

cloud() {
  if [ "$dry_run" ]; then
    show gcloud "$@" >&3
  else
    gcloud "$@" < /dev/null 2> "$errors"
  fi
}

say() {  # once, with the time
  [ "$*" = "$said" ] || echo "$(date '+%F %T') $*"
  said=$*
}

reason() {  # of the last failure, in one line
  grep -m 1 -iE '^(error|tpu_worker)' "$errors" || grep -v '^#####' "$errors" | tail -n 1
}

refuse() {
  trap - EXIT
  fail "$1: $(reason) (all of it: $errors)"
}

main "$@"

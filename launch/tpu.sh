#!/usr/bin/env bash
# Trains on a Cloud TPU: a pod or a single TPU VM, requested as one queued resource. All workers run
# the same commit.
#
#   NAME=dit ZONE=europe-west4-a PROJECT=my-project TYPE=v3-32 WORKDIR=gs://my-bucket/xl2 \
#     bash launch/tpu.sh babysit --config=configs/imagenet256.py:XL/2
#
# Commands:
#   create    requests the pod and waits until it is ready
#   setup     copies the commit to every worker and installs it
#   run       starts dit-train on every worker; it keeps running when the connection ends
#   status    prints the state of the pod and of the training (a number: dit-train's exit code)
#   logs      prints the last lines of worker 0's log
#   attach    follows worker 0's log until Ctrl-C, which does not stop the training
#   stop      asks dit-train to save and exit; babysit does not restart it
#   delete    deletes the pod: it costs money until then, even if it does not train
#   babysit   does create, setup and run, again after every preemption, until the training ends. You
#             can end it and start it again: it continues from the state of the pod.
#
# The flags of `run` and `babysit` go to dit-train. --dry-run prints the gcloud commands without
# running them.
#
# Settings, from the environment:
#   NAME      the name of the queued resource and of its TPU VM
#   ZONE      the zone, such as europe-west4-a
#   PROJECT   the Google Cloud project
#   TYPE      for create and babysit: the TPU type, such as v3-32, v5litepod-16 or v6e-8
#   WORKDIR   for run and babysit: the directory of the run. On a pod all workers must see it and it
#             must outlive them: a bucket, such as gs://my-bucket/xl2, or a mounted share. A path on
#             the worker's own disk works on a single VM only, and is lost with the VM.
#   CAPACITY  spot, reserved or on-demand; default: spot
#   RUNTIME   the image; default: the one that Google recommends for TYPE
#   COMMIT    the commit to train; default: HEAD
#   POLL      seconds between two checks of the pod; default: 60
#   TAIL      how many lines logs and attach print first; default: 50
#
# Exit codes: 0 done, 2 wrong use or gcloud failed; babysit: dit-train's exit code.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CAPACITY=${CAPACITY:-spot} POLL=${POLL:-60} TAIL=${TAIL:-50}
dry_run=''
last_report=''

main() {
  local command='' flags=() word
  help_if_asked "$@"
  for word; do
    case $word in
      --dry-run) dry_run=yes && exec 3>&1 ;;  # 3: standard output, also from inside $(...)
      *) if [ "$command" ]; then flags+=("$word"); else command=$word; fi ;;
    esac
  done
  case $command in
    run | babysit) ;;
    create | setup | status | logs | attach | stop | delete)
      [ ${#flags[@]} = 0 ] || fail "$command takes no flags, got '${flags[*]}'"
      ;;
    *)
      fail "the command must be one of create, setup, run, status, logs, attach, stop, delete," \
        "babysit, got '$command'"
      ;;
  esac
  read_settings "$command" "${flags[@]}"
  [ "$dry_run" ] || require_tool gcloud https://cloud.google.com/sdk/docs/install
  errors=$(mktemp)  # standard error of the last gcloud or git call
  trap 'rm -f "$errors"' EXIT
  "$command" "${flags[@]}"
}

read_settings() {  # COMMAND FLAG...
  local command=$1
  shift
  require NAME ZONE PROJECT
  must_match NAME '[a-z]([a-z0-9-]*[a-z0-9])?' \
    'lower-case letters, digits and -, starting with a letter and not ending with -'
  check_zone
  must_match POLL '[0-9]+(\.[0-9]+)?' 'a number of seconds'
  must_match TAIL '[0-9]+' 'a number of lines'
  case $command in create | babysit) require TYPE && choose_machine ;; esac
  case $command in run | babysit) require WORKDIR && check_workdir ;; esac
  # Read the commit only once: babysit must install the same commit on every new pod.
  case $command in setup | run | babysit) commit=$(find_commit) ;; esac
  case $command in run | babysit) check_flags "$commit" "$@" ;; esac
  location=(--zone="$ZONE" --project="$PROJECT" --quiet)
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
    *) fail "TYPE must be of a known generation, as v3-32, or RUNTIME be set, got $TYPE" ;;
  esac
}

# The commands.

create() {
  local pod detail
  create_unless_exists
  while true; do
    read -r pod detail < <(pod_state)
    [ "$dry_run" ] || report "pod: $detail"
    case $pod in
      ready) return ;;
      waiting) sleep "$POLL" ;;
      unknown) fail_with_reason create ;;
      *) fail "the pod will not start, its state is $detail: delete it" ;;
    esac
  done
}

setup() {
  local training
  training=$(training_state)
  [ "$training" != running ] || fail "dit-train is running on the pod: stop it first"
  install || fail_with_reason setup
}

run() {
  start "$@" || fail_with_reason run
}

status() {
  local pod detail training=''
  read -r pod detail < <(pod_state)
  [ "$pod" != unknown ] || fail_with_reason status
  [ "$pod" != ready ] || training=", training: $(training_state)"
  [ "$dry_run" ] || echo "pod: $detail$training"
}

logs() {
  on_workers 0 "tail -n $TAIL dit_run/log.txt" || fail_with_reason logs
}

attach() {
  on_workers 0 "tail -n $TAIL -F dit_run/log.txt" || fail_with_reason attach
}

stop() {
  on_workers all 'bash dit_jax/launch/tpu_worker.sh stop' || fail_with_reason stop
}

delete() {
  delete_request || fail_with_reason delete
}

babysit() {
  local pod detail was_ready=''
  # About the current pod. fresh: babysit has not seen or started a training on it since it was made
  # or repaired. trained: it has. crashed: the last training crashed. failures: how many in a row.
  local fresh=yes trained='' crashed='' failures=0
  if [ "$dry_run" ]; then
    create && install && start "$@" && training_state > /dev/null
    echo "# after a preemption, before all of the above again:" >&3
    delete_request
    return
  fi
  create_unless_exists
  while true; do
    read -r pod detail < <(pod_state)
    [ "$pod" = ready ] || report "pod: $detail"
    case $pod in
      ready) was_ready=yes && advance "$@" ;;
      waiting) fresh=yes ;;  # a repaired pod must be set up again
      absent) create_request || report "create: $(reason)" ;;
      unknown) report "describe: $(reason)" ;;
      gone)
        [ "$detail$was_ready" != FAILED ] \
          || fail "Google could not provide the pod: the request FAILED"
        replace
        ;;
    esac
    sleep "$POLL"
  done
}

# Does the next action on a ready pod. Sets babysit's variables, or ends the script.
advance() {
  local training
  training=$(training_state)
  # On a fresh pod the exit code belongs to an earlier training.
  [ ! "$fresh" ] || [[ $training =~ ^(running|unreachable)$ ]] || training=none
  report "training: $training"
  case $training in
    running) fresh='' trained=yes crashed='' failures=0 ;;
    none | lost) { install && start "$@" && fresh='' trained=yes; } || count_failure ;;
    42) start "$@" || count_failure ;;
    unreachable) count_failure ;;
    0 | 2 | 3) finish "$training" ;;
    stopped) finish 42 ;;
    *)  # a preempted worker crashes the others before Google reports the preemption
      [ ! "$crashed" ] || finish "$training"
      crashed=yes
      ;;
  esac
}

# Tolerates two failures in a row. The third replaces the pod, or ends the script if no training
# was ever started on it.
count_failure() {
  failures=$((failures + 1))
  report "failure $failures: $(reason)"
  [ "$failures" -ge 3 ] || return 0
  [ "$trained" ] || fail "gave up after 3 failures; the pod still exists and costs money"
  replace
}

replace() {
  fresh=yes trained='' crashed='' failures=0
  delete_request || report "delete: $(reason)"
}

finish() {  # EXIT_CODE
  report "dit-train exited with $1; the pod still exists and costs money until you delete it"
  exit "$1"
}

# The steps of the commands.

create_unless_exists() {
  create_request || grep -qi 'already.exists' "$errors" || fail_with_reason create
}

create_request() {
  call_gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${capacity[@]}" "${location[@]}"
}

delete_request() {
  call_gcloud compute tpus queued-resources delete "$NAME" --force "${location[@]}"
}

install() {
  local archive="${TMPDIR:-/tmp}/dit_jax-$commit.tar.gz"
  local pack=(git -C "$root" archive --output="$archive" "$commit")
  if [ "$dry_run" ]; then
    print_command "${pack[@]}" >&3
  else
    "${pack[@]}" 2> "$errors" || return
  fi
  call_gcloud compute tpus tpu-vm scp "$archive" "$NAME:dit_jax.tar.gz" --worker=all \
    --scp-flag=-oConnectTimeout=30 --scp-flag=-oServerAliveInterval=30 "${location[@]}" \
    && on_workers all "rm -rf dit_jax && mkdir dit_jax && tar -xzf dit_jax.tar.gz -C dit_jax\
 && bash dit_jax/launch/tpu_worker.sh install $commit"
}

start() {  # FLAG...
  on_workers all \
    "$(print_command bash dit_jax/launch/tpu_worker.sh start "$commit" --workdir="$WORKDIR" "$@")"
}

# Prints ready, waiting, gone, absent or unknown (gcloud failed), and then Google's states. After a
# preemption the request remains, SUSPENDED, and uses quota until it is deleted.
pod_state() {
  local request_state vm_state
  if ! request_state=$(describe queued-resources 'value(state.state)'); then
    if is_not_found; then echo absent not found; else echo unknown; fi
    return
  fi
  case ${dry_run:+ACTIVE}$request_state in
    ACTIVE) ;;
    SUSPENDED | FAILED) echo "gone $request_state" && return ;;
    *) echo "waiting $request_state" && return ;;
  esac
  if ! vm_state=$(describe tpu-vm 'value(state)'); then
    if is_not_found; then echo "gone ACTIVE, no VM"; else echo unknown; fi
    return
  fi
  case ${dry_run:+READY}$vm_state in
    READY) echo "ready ACTIVE, READY" ;;
    PREEMPTED | TERMINATED | STOPPED | UNKNOWN) echo "gone ACTIVE, $vm_state" ;;
    *) echo "waiting ACTIVE, $vm_state" ;;
  esac
}

describe() {  # KIND FORMAT
  call_gcloud compute tpus "$1" describe "$NAME" --format="$2" "${location[@]}"
}

is_not_found() {
  grep -qi 'not.found' "$errors"
}

# Prints one state for all workers (see tpu_worker.sh): the first of the list below that any worker
# reports, else the largest exit code; unreachable if ssh to a worker fails.
training_state() {
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

on_workers() {  # WORKERS COMMAND; the ssh options end a dead connection
  call_gcloud compute tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2" \
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 "${location[@]}"
}

call_gcloud() {  # ARGUMENT...
  if [ "$dry_run" ]; then
    print_command gcloud "$@" >&3
  else
    gcloud "$@" < /dev/null 2> "$errors"
  fi
}

report() {  # prints the message with the time, unless it was the last one
  [ "$*" = "$last_report" ] || echo "$(date '+%F %T') $*"
  last_report=$*
}

reason() {  # prints one line: why the last gcloud or git call failed
  grep -m 1 -iE '^(error|tpu_worker)' "$errors" || grep -v '^#####' "$errors" | tail -n 1
}

fail_with_reason() {  # COMMAND
  trap - EXIT
  fail "$1: $(reason) (full output: $errors)"
}

main "$@"

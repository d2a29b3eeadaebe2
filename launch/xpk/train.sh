#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs that XPK has made: https://github.com/AI-Hypercomputer/xpk
# Needs no Dockerfile: XPK lays the commit on a base image, and every worker installs it there.
#
#   NAME=xl2 CLUSTER=my-cluster ZONE=us-east5-b PROJECT=my-project TYPE=v6e-16 \
#     WORKDIR=gs://my-bucket/xl2 bash launch/xpk/train.sh --config=configs/imagenet256.py:XL/2
#
# The flags go to dit-train. --dry-run prints the lines and runs nothing.
# `xpk workload list --cluster=...` shows the workload, `xpk workload delete` ends it.
#
# Settings, from the environment:
#   NAME          of the workload
#   CLUSTER, ZONE, PROJECT
#   TYPE          as v5litepod-16 or v6e-16; XPK has no v3
#   WORKDIR       where the run lives, and goes on after a restart: a bucket, gs://my-bucket/xl2, or
#                 a path of a share that the workload mounts (xpk storage attach)
#   MAX_RESTARTS  50 if not set. XPK restarts where a machine vanished and on the exit codes 42
#                 (dit-train was preempted and has saved) and 127 to 255, not on 1, 2 and 3.
#   GRACE         seconds from the notice of a preemption to the end: 180 if not set
#   BASE_IMAGE    with Python 3.11 or newer, pip and bash: python:3.12 if not set
#   COMMIT        what to train; if not set, HEAD
#
# Exit codes: that of xpk, or 2 for wrong use.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MAX_RESTARTS=${MAX_RESTARTS:-50} GRACE=${GRACE:-180} BASE_IMAGE=${BASE_IMAGE:-python:3.12}
dry_run=''

main() {
  local flags=() word
  for word; do
    case $word in
      --help | -h) print_help && exit ;;
      --dry-run) dry_run=yes ;;
      *) flags+=("$word") ;;
    esac
  done
  need NAME CLUSTER ZONE PROJECT TYPE WORKDIR
  must_match TYPE '(v4|v5|v6e|tpu7x).*' 'as v5litepod-16 or v6e-16: XPK has no older ones'
  must_match MAX_RESTARTS '[0-9]+' 'a number'
  must_match GRACE '[0-9]+' 'a number of seconds'
  check_workdir
  commit=$(find_commit)
  check_flags "$commit" "${flags[@]}"
  [ "$dry_run" ] || command -v xpk > /dev/null || fail "xpk must be on the PATH: pip install xpk"
  export_commit
  submit "$(training "${flags[@]}")"
}

# The files of one commit in a folder of their own: no .git, .venv or runs in the image.
export_commit() {
  source_dir=${TMPDIR:-/tmp}/dit_jax-$commit
  if [ "$dry_run" ]; then
    echo "git -C $root archive $commit | tar -x -C $source_dir"
  else
    mkdir -p "$source_dir"
    git -C "$root" archive "$commit" | tar -x -C "$source_dir"
  fi
}

# What each worker runs. A registry that does not answer is no fault of ours: 128 is tried again.
# exec, since XPK sends SIGTERM to this shell, and dit-train has to get it.
training() {
  echo "pip install --quiet -e '.[tpu]' || exit 128;" \
    "exec $(show dit-train --workdir="$WORKDIR" "$@")"
}

submit() {
  local line=(xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE"
    --project="$PROJECT" --tpu-type="$TYPE" --base-docker-image="$BASE_IMAGE"
    --script-dir="$source_dir" --max-restarts="$MAX_RESTARTS"
    --termination-grace-period-seconds="$GRACE" --command="$1")
  if [ "$dry_run" ]; then show "${line[@]}"; else "${line[@]}"; fi
}

main "$@"

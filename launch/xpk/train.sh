#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs that XPK has made: https://github.com/AI-Hypercomputer/xpk
# Needs no Dockerfile: XPK adds the commit to a base image, and every worker installs it there.
#
#   NAME=xl2 CLUSTER=my-cluster ZONE=us-east5-b PROJECT=my-project TYPE=v6e-16 \
#     WORKDIR=gs://my-bucket/xl2 bash launch/xpk/train.sh --config=configs/imagenet256.py:XL/2
#
# The flags go to dit-train. --dry-run prints the commands without running them.
# `xpk workload list --cluster=...` shows the workload, `xpk workload delete` ends it.
#
# Settings, from the environment:
#   NAME          the name of the workload
#   CLUSTER       the name of the cluster
#   ZONE          the zone of the cluster, such as us-east5-b
#   PROJECT       the Google Cloud project
#   TYPE          the TPU type, such as v5litepod-16 or v6e-16; XPK does not support v3
#   WORKDIR       the directory of the run, which must survive a restart: a bucket, such as
#                 gs://my-bucket/xl2, or a path on a share that the workload mounts (xpk storage
#                 attach)
#   MAX_RESTARTS  how often XPK may restart the workload; default: 50. XPK restarts it if a machine
#                 was lost, and on exit codes 42 (dit-train was preempted) and 127 to
#                 255, but not on 1, 2 and 3.
#   GRACE         seconds that a preempted worker has to save; default: 180
#   BASE_IMAGE    an image with Python 3.11 or newer, pip and bash; default: python:3.12
#   COMMIT        the commit to train; default: HEAD
#
# Exit codes: that of xpk, or 2 for wrong use.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
script=launch/xpk/train.sh

MAX_RESTARTS=${MAX_RESTARTS:-50} GRACE=${GRACE:-180} BASE_IMAGE=${BASE_IMAGE:-python:3.12}
dry_run=''

main() {
  local flags=() word
  help_if_asked "$@"
  for word; do
    if [ "$word" = --dry-run ]; then dry_run=yes; else flags+=("$word"); fi
  done
  require NAME CLUSTER ZONE PROJECT TYPE WORKDIR
  check_zone
  must_match TYPE '(v4|v5|v6e|tpu7x).*' 'a TPU of v4 or later, such as v5litepod-16 or v6e-16'
  must_match MAX_RESTARTS '[0-9]+' 'a number'
  must_match GRACE '[0-9]+' 'a number of seconds'
  check_workdir
  commit=$(find_commit)
  check_flags "$commit" "${flags[@]}"
  [ "$dry_run" ] || require_tool xpk 'pip install xpk'
  export_commit
  submit "$(worker_command "${flags[@]}")"
}

# Exports the commit to an empty directory, to keep .git, .venv and runs out of the image.
export_commit() {
  source_dir=${TMPDIR:-/tmp}/dit_jax-$commit
  if [ "$dry_run" ]; then
    echo "git -C $root archive $commit | tar -x -C $source_dir"
  else
    mkdir -p "$source_dir"
    git -C "$root" archive "$commit" | tar -x -C "$source_dir"
  fi
}

# Exit code 128 makes XPK restart a worker that could not reach the package registry.
# exec: XPK sends SIGTERM to this shell, and dit-train must receive it.
worker_command() {  # FLAG...
  echo "pip install --quiet -e '.[tpu]' || exit 128;" \
    "exec $(print_command dit-train --workdir="$WORKDIR" "$@")"
}

submit() {  # COMMAND
  local line=(xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE"
    --project="$PROJECT" --tpu-type="$TYPE" --base-docker-image="$BASE_IMAGE"
    --script-dir="$source_dir" --max-restarts="$MAX_RESTARTS"
    --termination-grace-period-seconds="$GRACE" --command="$1")
  if [ "$dry_run" ]; then print_command "${line[@]}"; else "${line[@]}"; fi
}

main "$@"

#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster, and goes on by itself after the time limit. In the clone:
#
#   EXTRAS=cuda bash -c 'source launch/environment.sh'    # once, where the registry is in reach
#   sbatch --nodes=2 launch/slurm/train.sh \
#     --config=configs/imagenet256.py:XL/2 --workdir=/shared/xl2
#
# The words after the script go to dit-train; options of sbatch stand before it and win over those
# below. The clone and the workdir have to be the same on all nodes. A node without 8 GPUs takes
# --gpus-per-node=N --ntasks-per-node=N. For a workdir in a bucket of Google's, gs://my-bucket/xl2,
# EXTRAS is cuda,gcs in both lines. `bash launch/slurm/train.sh --dry-run FLAGS` prints what a job
# does and runs nothing.
#
# 300 s before the time limit dit-train is told to save, ends with 42, and the job is queued again,
# as Slurm does with a job that it preempts itself. Another exit code is that of the job.

#SBATCH --job-name=dit-train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# One process per GPU: that is how jax.distributed reads Slurm's variables, by the local rank. So
# every task has to see all GPUs of its node: no --gpus-per-task, which would hide the others.
# --signal without B: goes to the processes of the step and not to this script.

set -euo pipefail

main() {
  local flags=() dry_run='' word
  for word; do
    case $word in
      --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
      --dry-run) dry_run=yes ;;
      *) flags+=("$word") ;;
    esac
  done
  [ ! "$dry_run" ] || { print_lines "${flags[@]}" && exit; }
  [ "${SLURM_JOB_ID:-}" ] || fail "must be given to sbatch: sbatch launch/slurm/train.sh FLAGS"
  # Slurm runs a copy of this script elsewhere, so it is the submit directory that has to be ours.
  [ -e "$SLURM_SUBMIT_DIR/launch/environment.sh" ] \
    || fail "must be submitted from the clone, got $SLURM_SUBMIT_DIR"
  EXTRAS=${EXTRAS:-cuda}
  # shellcheck source=launch/environment.sh
  source "$SLURM_SUBMIT_DIR/launch/environment.sh"
  train "${flags[@]}"
}

# The first process that has ended must not take the others down while they save, whatever the
# cluster's default is; where one is lost, jax ends them. srun does not inherit --cpus-per-task.
set_step() {  # of the job, by the flags of dit-train
  step=(srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 dit-train "$@")
}

print_lines() {
  # shellcheck source=launch/common.sh
  source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
  SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}
  set_step "$@"
  echo "EXTRAS=${EXTRAS:-cuda} source launch/environment.sh"
  show "${step[@]}"
  echo '# where that ends with 42:'
  echo "scontrol requeue \$SLURM_JOB_ID"
}

train() {
  local code=0
  set_step "$@"
  "${step[@]}" || code=$?
  if [ "$code" = 42 ]; then
    scontrol requeue "$SLURM_JOB_ID" || fail "preempted, and not queued again: submit it again" 42
    echo "preempted: queued again"
    return
  fi
  exit "$code"
}

fail() {
  echo "train.sh: $1" >&2
  exit "${2:-2}"
}

main "$@"

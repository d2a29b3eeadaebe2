#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster. Requeues its job at the time limit. In the clone:
#
#   EXTRAS=cuda bash -c 'source launch/environment.sh'    # once, on a machine with internet access
#   sbatch --nodes=2 launch/slurm/train.sh configs/imagenet256.py:XL/2 /shared/xl2
#
# What follows the script's name goes to dit-train. Options of sbatch go before it and override the
# #SBATCH lines of the script. All nodes must see the clone and the workdir at the same path. For
# nodes with N GPUs instead of 8, add --gpus-per-node=N --ntasks-per-node=N. To print what a job
# runs, without running it: `bash launch/slurm/train.sh --dry-run FLAGS`.
#
# Settings, from the environment:
#   EXTRAS  the extras of the package; default: cuda. Set cuda,gcs in both lines above for a workdir
#           in a Google Cloud bucket, such as gs://my-bucket/xl2.
#   PYTHON  the Python that makes .venv, 3.11 or newer; default: python3
#
# 300 s before the time limit Slurm signals dit-train, which saves and exits with 42. The script
# requeues the job then. Slurm itself requeues a job that it preempts. Any other exit code of
# dit-train is the exit code of the job.

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

# One process per GPU: jax.distributed reads Slurm's variables and takes the GPU of the local rank.
# Every task must therefore see all GPUs of its node: --gpus-per-task would hide the others.
# --signal without B: the signal goes to the processes of the step, not to this script.

set -euo pipefail
script=launch/slurm/train.sh

main() {
  local flags=() dry_run='' word
  for word; do
    case $word in
      --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
      --dry-run) dry_run=yes ;;
      *) flags+=("$word") ;;
    esac
  done
  check_workdir_is_given "${flags[@]}"
  [ ! "$dry_run" ] || { print_lines "${flags[@]}" && exit; }
  [ "${SLURM_JOB_ID:-}" ] || fail "must be started by sbatch: sbatch launch/slurm/train.sh FLAGS"
  # Slurm runs a copy of this script, so the clone is found by the submit directory.
  [ -e "$SLURM_SUBMIT_DIR/launch/environment.sh" ] \
    || fail "the job must be submitted from the clone, got $SLURM_SUBMIT_DIR"
  check "$SLURM_SUBMIT_DIR/launch" "${flags[@]}"
  EXTRAS=${EXTRAS:-cuda}
  # shellcheck source=launch/environment.sh
  source "$SLURM_SUBMIT_DIR/launch/environment.sh"
  train "${flags[@]}"
}

check() {  # LAUNCH_FOLDER FLAG...
  # shellcheck source=launch/common.sh
  source "$1/common.sh"
  shift
  check_arguments 2 'CONFIG WORKDIR' "$@"
  check_names "$root/dit_jax/settings.py" "$@"
  while [ $# -gt 0 ]; do
    case $1 in
      --config=*) check_config "${1#*=}" ;;
      --config) check_config "${2:-}" ;;
      [!-]*.py | [!-]*.py:*) check_config "$1" ;;
    esac
    shift
  done
}

check_config() {  # PATH[:VARIANT] of a file, here or in the clone, or SIZE/PATCH
  local path=${1%%:*}
  [[ $path =~ ^[A-Za-z-]+/[0-9]+$ ]] || [ -f "$path" ] || [ -f "$root/$path" ] \
    || fail "config must be a Python file that exists, got $path"
}

check_workdir_is_given() {  # FLAG...
  local word
  for word; do
    case $word in
      --workdir | --workdir=*) return ;;
      -* | *.py | *.py:*) ;;
      *) return ;;  # dit-train CONFIG WORKDIR
    esac
  done
  fail "WORKDIR must be given, as CONFIG WORKDIR or as --workdir=WORKDIR"
}

# --kill-on-bad-exit=0: the first process that exits must not end the others while they save. If a
# process is lost, jax ends the others. srun does not inherit --cpus-per-task from sbatch.
set_step() {  # FLAG...
  step=(srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 dit-train "$@")
}

print_lines() {  # FLAG...
  check "$(dirname "${BASH_SOURCE[0]}")/.." "$@"
  SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}
  set_step "$@"
  echo "EXTRAS=${EXTRAS:-cuda} source launch/environment.sh"
  print_command "${step[@]}"
  echo '# if that exits with 42:'
  echo "scontrol requeue \$SLURM_JOB_ID"
}

train() {  # FLAG...
  local code=0
  set_step "$@"
  "${step[@]}" || code=$?
  if [ "$code" = 42 ]; then
    if ! scontrol requeue "$SLURM_JOB_ID"; then
      echo "$script: dit-train was preempted and scontrol could not requeue the job:" \
        "submit it again" >&2
      exit 42
    fi
    echo "dit-train was preempted: the job is requeued"
    return
  fi
  exit "$code"
}

fail() {  # until common.sh is sourced
  echo "$script: $*" >&2
  exit 2
}

main "$@"

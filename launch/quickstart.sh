#!/usr/bin/env bash
# Trains a small DiT on real digits, draws samples and evaluates them: a few minutes on a laptop.
# After a crash or Ctrl-C, start it again: it resumes the run.
#
#   bash launch/quickstart.sh [--config.TOPIC.FIELD=VALUE ...]
#
# The flags go to dit-train, whose --help lists the fields. The first start installs the package
# into .venv; the printed time excludes this.
#
# Settings, from the environment:
#   WORKDIR  the directory of the run, on a local disk; default: runs/digits
#   PYTHON   the Python that makes .venv, 3.11 or newer; default: python3

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
check_fields "$@"
must_be_on_disk WORKDIR
source "$root/launch/environment.sh"
workdir=$(path_of WORKDIR runs/digits)
SECONDS=0  # bash adds one each second

dit-train configs/digits.py "$workdir" "$@"
dit-sample "$workdir" "$workdir/samples.png" --columns=10 \
  --labels="$(printf '0,1,2,3,4,5,6,7,8,9,%.0s' 1 2 3 4 5 6 7 8 | sed 's/,$//')"
dit-evaluate "$workdir"
printf 'training, sampling and evaluation took %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
echo "samples: $workdir/samples.png   loss curve: $workdir/loss.png"

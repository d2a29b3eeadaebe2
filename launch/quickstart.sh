#!/usr/bin/env bash
# Trains a small DiT on real digits, draws samples and judges them: a few minutes on a laptop.
# Start it again after a crash or Ctrl-C, and it goes on where it was.
#
#   bash launch/quickstart.sh [--config.field=value ...]
#
# WORKDIR says where on a disk the run lives: runs/digits if it is not set.
set -euo pipefail
here=$PWD
if [[ ${WORKDIR:-} = *://* ]]; then
  echo "quickstart.sh: WORKDIR must be on a disk, got $WORKDIR" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
workdir=${WORKDIR:+$(cd "$here" && realpath -m "$WORKDIR")}
workdir=${workdir:-runs/digits}
SECONDS=0  # bash counts them up from here

dit-train --config=configs/digits.py --workdir="$workdir" "$@"
dit-sample --checkpoint="$workdir" --out="$workdir/samples.png" --columns=10 \
  --labels="$(printf '0,1,2,3,4,5,6,7,8,9,%.0s' 1 2 3 4 5 6 7 8 | sed 's/,$//')"
dit-evaluate --checkpoint="$workdir"
printf 'training, sampling and judging took %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
echo "samples: $workdir/samples.png   loss curve: $workdir/loss.png"

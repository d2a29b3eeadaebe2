#!/usr/bin/env bash
# Trains a small DiT on Fashion-MNIST, 60,000 pictures of clothes, and draws samples: about
# a quarter of an hour on two cores. After a crash or Ctrl-C, start it again: it resumes the run.
#
#   bash launch/fashion.sh [--config.TOPIC.FIELD=VALUE ...]
#
# The flags go to dit-train. The first start installs the package into .venv and downloads the data
# set, 31 MB, as launch/fashion_data.sh explains. The printed time excludes both.
#
# Settings, from the environment:
#   DATA     the folder of the four IDX files, which are downloaded if it lacks one;
#            default: runs/fashion-mnist
#   WORKDIR  the directory of the run, on a local disk; default: runs/fashion
#   PYTHON   the Python that makes .venv, 3.11 or newer; default: python3

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
check_fields "$@"
must_be_on_disk DATA WORKDIR
source "$root/launch/environment.sh"
source "$root/launch/fashion_data.sh"
workdir=$(path_of WORKDIR runs/fashion)
data=$(path_of DATA runs/fashion-mnist)
download_fashion "$data"
SECONDS=0  # bash adds one each second

dit-train configs/fashion.py "$workdir" --config.data.path="$data" "$@"
dit-sample "$workdir" "$workdir/samples.png" --labels=all --num_samples=80
printf 'training and sampling took %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
echo "samples: $workdir/samples.png   loss curve: $workdir/loss.png"

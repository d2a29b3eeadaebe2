#!/usr/bin/env bash
# Trains a small DiT on Fashion-MNIST, 60,000 pictures of clothes, and draws samples: about
# a quarter of an hour on two cores. After a crash or Ctrl-C, start it again: it resumes the run.
#
#   bash launch/fashion.sh [--config.TOPIC.FIELD=VALUE ...]
#
# The flags go to dit-train. The first start installs the package into .venv and downloads the data
# set, 31 MB: Debian's package dataset-fashion-mnist where apt-get offers it (it is unpacked, not
# installed, and needs no root), else the files of github.com/zalandoresearch/fashion-mnist. The
# printed time excludes both.
#
# Settings, from the environment:
#   DATA     the folder of the four IDX files, which are downloaded if it lacks one;
#            default: runs/fashion-mnist
#   WORKDIR  the directory of the run, on a local disk; default: runs/fashion
#   PYTHON   the Python that makes .venv, 3.11 or newer; default: python3

set -euo pipefail
start_dir=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
check_fields "$@"
for setting in DATA WORKDIR; do
  [[ ${!setting:-} != *://* ]] || fail "$setting must be on a local disk, got ${!setting}"
done
source "$root/launch/environment.sh"
workdir=${WORKDIR:+$(cd "$start_dir" && realpath -m "$WORKDIR")}
workdir=${workdir:-runs/fashion}
data=${DATA:+$(cd "$start_dir" && realpath -m "$DATA")}
data=${data:-runs/fashion-mnist}

address=http://fashion-mnist.s3-website.eu-central-1.amazonaws.com
files=({train,t10k}-{images-idx3,labels-idx1}-ubyte.gz)

has_all() {
  local file
  for file in "${files[@]}"; do
    [ -e "$data/$file" ] || [ -e "$data/${file%.gz}" ] || return 1
  done
}

download() {  # first into another folder, so that $data never has half a file
  local partial=$data.partial file
  rm -rf "$partial"
  mkdir -p "$partial" "$data"
  echo "downloading Fashion-MNIST into $data (only once)"
  if (from_debian "$partial") > /dev/null 2>&1; then
    mv "$partial"/usr/share/datasets/fashion-mnist/* "$data"
  else
    require_tool curl "or set DATA to a folder with ${files[*]}"
    for file in "${files[@]}"; do
      curl --fail --silent --show-error --location --output "$partial/$file" "$address/$file" \
        || fail "$address/$file cannot be downloaded: set DATA to a folder with ${files[*]}"
    done
    mv "$partial"/*.gz "$data"
  fi
  rm -rf "$partial"
}

from_debian() {  # FOLDER
  cd "$1" || return
  apt-get download dataset-fashion-mnist && dpkg -x ./*.deb .
}

has_all || download
SECONDS=0  # bash adds one each second

dit-train configs/fashion.py "$workdir" --config.data.path="$data" "$@"
dit-sample "$workdir" "$workdir/samples.png" --labels=all --num_samples=80
printf 'training and sampling took %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
echo "samples: $workdir/samples.png   loss curve: $workdir/loss.png"

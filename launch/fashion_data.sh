# shellcheck shell=bash
# Downloads Fashion-MNIST, 31 MB, unless it is there: Debian's package dataset-fashion-mnist where
# apt-get offers it (it is unpacked, not installed, and needs no root), else the files of
# github.com/zalandoresearch/fashion-mnist. Other scripts source it; to download only:
#
#   bash launch/fashion_data.sh
#
# Settings, from the environment:
#   DATA  the folder of the four IDX files; default: runs/fashion-mnist

address=http://fashion-mnist.s3-website.eu-central-1.amazonaws.com
files=({train,t10k}-{images-idx3,labels-idx1}-ubyte.gz)

download_fashion() {  # FOLDER; first into another one, so that it never has half a file
  local data=$1 partial=$1.partial file
  if has_all "$data"; then return; fi
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

has_all() {  # FOLDER
  local file
  for file in "${files[@]}"; do
    [ -e "$1/$file" ] || [ -e "$1/${file%.gz}" ] || return 1
  done
}

from_debian() {  # FOLDER
  cd "$1" || return
  apt-get download dataset-fashion-mnist && dpkg -x ./*.deb .
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  help_if_asked "$@"
  [ $# = 0 ] || fail "takes no arguments, got '$*'"
  must_be_on_disk DATA
  data=$(path_of DATA "$root/runs/fashion-mnist")
  download_fashion "$data"
  echo "Fashion-MNIST is in $data"
fi

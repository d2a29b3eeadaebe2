# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# Functions of the studies that train several runs, score each at several steps and compare them.
# scaling.sh, pixels.sh and objectives.sh source it, after common.sh, and set workdir and run.
# Started alone, `bash launch/study.sh` does nothing. Settings: none.

check_steps() {  # STEPS, EVERY and SAMPLES
  local setting
  for setting in STEPS EVERY; do
    must_match "$setting" '[1-9][0-9]*' 'a whole number of at least 1'
  done
  must_match SAMPLES '[6-9]|[1-9][0-9]+' 'a whole number of at least 6'
  [ $((STEPS % EVERY)) = 0 ] || fail "STEPS must be divisible by EVERY $EVERY, got $STEPS"
  steps=(--config.run.total_steps="$STEPS" --config.run.checkpoint_every="$EVERY")
  SECONDS=0  # bash adds one each second
}

# Refuses settings other than those of the first start, whose results would be kept; writes them.
must_stay() {  # FILE SETTING...
  local file=$1 setting old
  shift
  if [ -e "$file" ]; then
    for setting; do
      old=$(sed -n "s/^$setting=//p" "$file")
      [ "${!setting}" = "$old" ] \
        || fail "$setting must be '$old' as before, unless you delete ${file%/*}, got '${!setting}'"
    done
  fi
  mkdir -p "${file%/*}"
  for setting; do echo "$setting=${!setting}"; done > "$file"
}

# Installs the package; sets workdir and data of a study of Fashion-MNIST, and downloads the data.
prepare_fashion_study() {  # DEFAULT_WORKDIR FLAG...
  source "$root/launch/environment.sh"
  source "$root/launch/fashion_data.sh"
  workdir=$(path_of WORKDIR "$1")
  data=$(path_of DATA runs/fashion-mnist)
  shift
  FLAGS=$* must_stay "$workdir/study.txt" FLAGS SAMPLES
  download_fashion "$data"
}

# Trains $run to its last step and scores it, or what is missing of both.
train_and_score() {  # CONFIG FLAG...
  [ -d "$run/checkpoints/$STEPS" ] || dit-train "$1" "$run" "${@:2}"
  share_classifier
  local step
  for ((step = EVERY; step <= STEPS; step += EVERY)); do
    [ -d "$run/checkpoints/$step" ] || continue  # it was damaged and set aside
    [ -e "$run/scores/$step/receipt.json" ] \
      || dit-evaluate "$run/checkpoints/$step" "$run/scores/$step" --num_samples="$SAMPLES"
  done
}

# All runs are judged by the classifier that dit-evaluate fitted for the first one.
share_classifier() {
  local kept target=$run/evaluation/classifier
  for kept in "$workdir"/*/evaluation/classifier; do
    if [ -e "$target" ] || [ ! -e "$kept" ]; then return; fi
    mkdir -p "$run/evaluation"
    rm -rf "$target.partial"
    cp -r "$kept" "$target.partial"
    mv "$target.partial" "$target"
  done
}

plot_study() {
  dit-evaluate --study="$workdir" --out="$workdir/plots"
}

print_time() {
  printf 'the study took %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  help_if_asked "$@"
  fail "is for other scripts, which source it: see --help"
fi

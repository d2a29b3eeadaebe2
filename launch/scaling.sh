#!/usr/bin/env bash
# Repeats the scaling study of the paper on Fashion-MNIST: trains models of four sizes with three
# patches, and the four designs of a block, scores them, and plots the scores against steps and
# Gflops. After a crash or Ctrl-C, start it again: it resumes the runs and skips what is done.
#
#   bash launch/scaling.sh [--config.TOPIC.FIELD=VALUE ...]
#   MODELS="Pi/7 Pi/4 Na/7 Na/4 Ti/7 Ti/4" DESIGNS= bash launch/scaling.sh
#
# The flags go to every dit-train. The first start installs the package into .venv and downloads the
# data set, as launch/fashion_data.sh explains. Minutes of training on two cores, for 2,000 steps:
#
#         patch 7   patch 4   patch 2
#   Pi          1         2        10
#   Na          1         4        28
#   Ti          3        10        52
#   XS          8        22       108
#
# All of them take 4 hours, the three other designs of Ti/4 half an hour, and scores 40 % more.
#
# Settings, from the environment:
#   DATA          the folder of the four IDX files, which are downloaded if it lacks one;
#                 default: runs/fashion-mnist
#   WORKDIR       the directory of the runs, on a local disk; default: runs/scaling. Scores go to
#                 RUN/scores/STEP, the pictures and study.json to plots
#   MODELS        the models to compare; default: the twelve of the table
#   DESIGNS       the designs of a block to compare, of in_context, cross_attention, adaln and
#                 adaln_zero; default: all four; empty: none
#   DESIGN_MODEL  the model that is trained with each design; default: Ti/4
#   STEPS         the training steps of each model; default: 2000
#   EVERY         the steps between two scores, a divisor of STEPS; default: 500
#   SAMPLES       how many samples a score takes; default: 2000
#   PYTHON        the Python that makes .venv, 3.11 or newer; default: python3

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
check_fields "$@"
must_be_on_disk DATA WORKDIR
MODELS=${MODELS:-Pi/7 Pi/4 Na/7 Ti/7 Na/4 XS/7 Ti/4 Pi/2 XS/4 Na/2 Ti/2 XS/2}
DESIGNS=${DESIGNS-in_context cross_attention adaln adaln_zero}
DESIGN_MODEL=${DESIGN_MODEL:-Ti/4}
STEPS=${STEPS:-2000} EVERY=${EVERY:-500} SAMPLES=${SAMPLES:-2000}
model='[A-Za-z]+/[1-9][0-9]*'
design='in_context|cross_attention|adaln|adaln_zero'
must_match MODELS " *$model( +$model)* *" 'models such as Ti/4, separated by spaces'
must_match DESIGN_MODEL "$model" 'a model such as Ti/4'
must_match DESIGNS " *|( *($design))( +($design))* *" "of ${design//|/, }, separated by spaces"
for setting in STEPS EVERY SAMPLES; do
  must_match "$setting" '[1-9][0-9]*' 'a whole number of at least 1'
done
[ $((STEPS % EVERY)) = 0 ] || fail "STEPS must be divisible by EVERY $EVERY, got $STEPS"
source "$root/launch/environment.sh"
source "$root/launch/fashion_data.sh"
workdir=$(path_of WORKDIR runs/scaling)
data=$(path_of DATA runs/fashion-mnist)
download_fashion "$data"
SECONDS=0  # bash adds one each second

train() {  # MODEL DESIGN FLAG...
  local model=$1 design=$2
  shift 2
  [ -d "$run/checkpoints/$STEPS" ] || dit-train "configs/scaling.py:$model" "$run" \
    --config.data.path="$data" --config.model.conditioning="$design" \
    --config.run.total_steps="$STEPS" --config.run.checkpoint_every="$EVERY" "$@"
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

score() {
  local step
  for ((step = EVERY; step <= STEPS; step += EVERY)); do
    [ -d "$run/checkpoints/$step" ] || continue  # it was damaged and set aside
    [ -e "$run/scores/$step/receipt.json" ] \
      || dit-evaluate "$run/checkpoints/$step" "$run/scores/$step" --num_samples="$SAMPLES"
  done
}

study() {  # MODEL DESIGN FLAG...
  run=$workdir/${1/\//-}
  [ "$2" = adaln_zero ] || run+=-$2
  train "$@"
  share_classifier
  score
}

for model in $MODELS; do study "$model" adaln_zero "$@"; done
for design in $DESIGNS; do study "$DESIGN_MODEL" "$design" "$@"; done
dit-evaluate --study="$workdir" --out="$workdir/plots"
printf 'the study took %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))

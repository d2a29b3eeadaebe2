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
source "$root/launch/study.sh"
check_steps
prepare_fashion_study runs/scaling "$@"

study() {  # MODEL DESIGN FLAG...
  local model=$1 design=$2
  shift 2
  run=$workdir/${model/\//-}
  [ "$design" = adaln_zero ] || run+=-$design
  train_and_score "configs/scaling.py:$model" \
    --config.data.path="$data" --config.model.conditioning="$design" "${steps[@]}" "$@"
}

for model in $MODELS; do study "$model" adaln_zero "$@"; done
for design in $DESIGNS; do study "$DESIGN_MODEL" "$design" "$@"; done
plot_study
print_time

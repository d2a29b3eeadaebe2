#!/usr/bin/env bash
# Compares pixel transformers on Fashion-MNIST: the parts of JiT with those of the paper's DiT, and
# predicting x0 with predicting the noise, at patches of 7 and 4 pixels. Trains every design of each
# model for the same number of steps, scores it, and plots the scores. After a crash or Ctrl-C,
# start it again: it resumes the run and skips what is done.
#
#   bash launch/pixels.sh [--config.TOPIC.FIELD=VALUE ...]
#   MODELS=Ti/7 DESIGNS="jit_x0 jit_noise" bash launch/pixels.sh
#
# The flags go to every dit-train. The first start installs the package into .venv. All designs have
# the linear path and the loss of the velocity:
#
#   jit_x0       configs/pixels.py: bottleneck, RMSNorm, SwiGLU, RoPE, class tokens; predicts x0
#   plain_x0     the paper's block and patch embedding; predicts x0
#   jit_noise    the parts of JiT; predicts the noise
#   plain_noise  the paper's block and patch embedding; predicts the noise
#
# Settings, from the environment:
#   DATA     the folder of the four IDX files, which are downloaded if it lacks one;
#            default: runs/fashion-mnist
#   WORKDIR  the directory of the runs, on a local disk; default: runs/pixels. The pictures go to
#            plots
#   MODELS   size and patch of the models; default: Ti/7 Ti/4
#   DESIGNS  what to compare; default: all four
#   STEPS    the training steps of each model; default: 2000
#   EVERY    the steps between two scores, a divisor of STEPS; default: 500
#   SAMPLES  how many samples a score takes; default: 2000
#   PYTHON   the Python that makes .venv, 3.11 or newer; default: python3

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$root/launch/study.sh"
help_if_asked "$@"
check_fields "$@"
must_be_on_disk DATA WORKDIR
plain='--config.model.norm=layer --config.model.mlp=gelu --config.model.position=sincos'
plain+=' --config.model.qk_norm=false --config.model.bottleneck=0'
plain+=' --config.model.class_tokens=0 --config.model.class_tokens_from=0'
noise='--config.diffusion.prediction=noise'
declare -A flags_of=([jit_x0]='' [plain_x0]=$plain [jit_noise]=$noise [plain_noise]="$plain $noise")
MODELS=${MODELS:-Ti/7 Ti/4}
DESIGNS=${DESIGNS:-jit_x0 plain_x0 jit_noise plain_noise}
STEPS=${STEPS:-2000} EVERY=${EVERY:-500} SAMPLES=${SAMPLES:-2000}
model='[A-Za-z]+/[1-9][0-9]*'
design='jit_x0|plain_x0|jit_noise|plain_noise'
must_match MODELS " *$model( +$model)* *" 'models such as Ti/4, separated by spaces'
must_match DESIGNS " *($design)( +($design))* *" "of ${design//|/, }, with spaces"
check_steps
prepare_fashion_study runs/pixels "$@"

for model in $MODELS; do
  for design in $DESIGNS; do
    run=$workdir/${model/\//-}-$design
    read -ra flags <<< "${flags_of[$design]}"
    train_and_score "configs/pixels.py:$model" --config.data.path="$data" "${flags[@]}" \
      "${steps[@]}" "$@"
  done
done
plot_study
print_time

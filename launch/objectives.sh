#!/usr/bin/env bash
# Compares objectives, optimizers and samplers on digits or Fashion-MNIST. Trains the same model
# with each objective and each seed for the same number of steps, scores the runs, and plots their
# scores over steps and over time. Then samples the first DDPM and the first flow with several
# samplers and numbers of steps, and plots the scores against network calls. After a crash or
# Ctrl-C, start it again: it resumes the runs and skips what is done.
#
#   bash launch/objectives.sh [--config.TOPIC.FIELD=VALUE ...]
#   OBJECTIVES="adamw muon" SAMPLERS= bash launch/objectives.sh
#   DATA_SET=fashion SEEDS=0 OBJECTIVES="noise velocity" bash launch/objectives.sh
#
# The flags go to every dit-train. The first start installs the package into .venv. Objectives:
#
#   noise                  DDPM that predicts the noise, trained by AdamW; also called adamw
#   v                      DDPM with --config.diffusion.prediction=v
#   x0_min_snr             DDPM with prediction=x0 and weight=min_snr
#   velocity               flow matching: --config.diffusion.process=linear
#   velocity_logit_normal  the same with time=logit_normal
#   muon                   noise, trained with --config.train.optimizer=muon
#
# Settings, from the environment:
#   DATA_SET    digits, with the model Ti/2, or fashion, with Ti/7; default: digits
#   DATA        for fashion: the folder of the four IDX files, which are downloaded if it lacks one;
#               default: runs/fashion-mnist
#   WORKDIR     the directory of the runs, on a local disk; default: runs/objectives-DATA_SET. The
#               pictures go to plots and samplers
#   OBJECTIVES  what to compare; default: all but muon
#   SEEDS       every objective is trained once with each; default: 0 1 2
#   STEPS       the training steps of each run; default: 2000
#   EVERY       the steps between two scores, a divisor of STEPS; default: 250
#   SAMPLES     how many samples a score takes; default: 1000
#   SAMPLERS    the samplers to compare; default: ddpm ddim heun dpm2m unipc; empty: none.
#               Delete WORKDIR/samplers to compare others, or after more STEPS
#   NUM_STEPS   with each of these numbers of steps; default: 10 20 50 100 250
#   PYTHON      the Python that makes .venv, 3.11 or newer; default: python3

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$root/launch/study.sh"
help_if_asked "$@"
check_fields "$@"
declare -A flags_of=(
  [noise]=''
  [v]='--config.diffusion.prediction=v'
  [x0_min_snr]='--config.diffusion.prediction=x0 --config.diffusion.weight=min_snr'
  [velocity]='--config.diffusion.process=linear'
  [velocity_logit_normal]='--config.diffusion.process=linear --config.diffusion.time=logit_normal'
  [muon]='--config.train.optimizer=muon'
)
must_be_on_disk DATA WORKDIR
DATA_SET=${DATA_SET:-digits}
OBJECTIVES=${OBJECTIVES-noise v x0_min_snr velocity velocity_logit_normal}
SEEDS=${SEEDS-0 1 2} STEPS=${STEPS:-2000} EVERY=${EVERY:-250} SAMPLES=${SAMPLES:-1000}
SAMPLERS=${SAMPLERS-ddpm ddim heun dpm2m unipc} NUM_STEPS=${NUM_STEPS-10 20 50 100 250}
objective='noise|adamw|v|x0_min_snr|velocity|velocity_logit_normal|muon'
sampler='ddpm|ddim|euler|heun|sde|dpm2m|unipc'
must_match DATA_SET 'digits|fashion' 'digits or fashion'
must_match OBJECTIVES " *($objective)( +($objective))* *" "of ${objective//|/, }, with spaces"
must_match SEEDS ' *[0-9]{1,9}( +[0-9]{1,9})* *' 'whole numbers, separated by spaces'
must_match SAMPLERS " *|( *($sampler))( +($sampler))* *" "of ${sampler//|/, }, with spaces"
count='([2-9]|[1-9][0-9]{1,2}|1000)'
must_match NUM_STEPS " *$count( +$count)* *" 'whole numbers in 2 .. 1000, separated by spaces'
[ -z "${DATA:-}" ] || [ "$DATA_SET" = fashion ] \
  || fail "DATA must be set with DATA_SET=fashion only, got '$DATA'"
check_steps
source "$root/launch/environment.sh"
workdir=$(path_of WORKDIR "runs/objectives-$DATA_SET")
FLAGS=$* must_stay "$workdir/study.txt" DATA_SET FLAGS SAMPLES
common=(
  --config.train.learning_rate=1e-3 --config.train.decay_steps=0  # no step is special
  --config.sampling.sampler=ddim --config.sampling.num_steps=50 --config.sampling.cfg_scale=1
  --config.run.keep_checkpoints=1000 "${steps[@]}"
)
config=configs/digits.py:Ti/2
if [ "$DATA_SET" = fashion ]; then
  source "$root/launch/fashion_data.sh"
  data=$(path_of DATA runs/fashion-mnist)
  download_fashion "$data"
  config=configs/fashion.py:Ti/7 common+=(--config.data.path="$data")
fi

unique() {  # WORD...; prints each word once, with commas between them
  local word found=
  for word; do [[ ,$found, = *",$word,"* ]] || found+=${found:+,}$word; done
  echo "$found"
}

compare_samplers() {  # OBJECTIVE
  local run=$1-$first_seed
  local out=$workdir/samplers/$run
  # shellcheck disable=SC2086
  [ -e "$out/sweep.json" ] || dit-evaluate --sweep=sampler="$(unique $SAMPLERS)" \
    --sweep=num_steps="$(unique $NUM_STEPS)" --num_samples="$SAMPLES" --out="$out" "$workdir/$run"
}

# shellcheck disable=SC2086
IFS=, read -ra objectives <<< "$(unique ${OBJECTIVES//adamw/noise})"
for seed in $SEEDS; do
  for objective in "${objectives[@]}"; do
    run=$workdir/$objective-$seed
    read -ra flags <<< "${flags_of[$objective]}"
    train_and_score "$config" "${flags[@]}" --config.seed="$seed" "${common[@]}" "$@"
  done
done
plot_study

read -r first_seed _ <<< "$SEEDS"
ddpm='' flow=''
for objective in "${objectives[@]}"; do
  case ${flags_of[$objective]} in
    *process=linear*) flow=${flow:-$objective} ;;
    *) ddpm=${ddpm:-$objective} ;;
  esac
done
if ! [[ $SAMPLERS =~ ^\ *$ ]]; then
  must_stay "$workdir/samplers/study.txt" SAMPLERS NUM_STEPS STEPS
  for objective in $ddpm $flow; do compare_samplers "$objective"; done
fi
print_time

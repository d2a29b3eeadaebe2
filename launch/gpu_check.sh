#!/usr/bin/env bash
# Checks and measures this code on one GPU in nine minutes: numbers beside the official code's,
# cuDNN's attention, a resumed training; the speed of training and sampling, some beside PyTorch's;
# and the ten largest kernels of the fastest training. Downloads and installs nothing.
#
#   bash launch/gpu_check.sh
#   CHECKS= CASES="train-512-b32-dots-cudnn-scan sample-256-b8-250-cudnn" bash launch/gpu_check.sh
#   MODEL=Ti/4 DTYPE=float32 CASES="train-256-b8-none-xla-scan" bash launch/gpu_check.sh
#
# The results are WORKDIR/results.md, a table, and results.json; WORKDIR/NAME has the log of each
# part. A part that fails, by lack of memory for example, is a row that says why. Start it again, in
# the same WORKDIR, to run what failed or was not started. Exit code 1: a check failed.
#
# A case is train-IMAGE_SIZE-bBATCH-REMAT-ATTENTION-LOOP or sample-IMAGE_SIZE-bBATCH-STEPS-ATTENTION
# and, to run PyTorch too, -peer. LOOP is scan or unroll.
#
# Settings, from the environment:
#   WORKDIR        the directory of the results; default: runs/gpu_check
#   SECONDS_LIMIT  everything ends after so many seconds, and a part after a third; default: 520
#   MODEL          size and patch of the models that are timed; default: XL/2
#   DTYPE          of the arithmetic that is timed, bfloat16 or float32; default: bfloat16
#   CHECKS         of golden, attention and resume; default: all; empty: none
#   CHECK_MODEL    the model of the resumed training; default: Ti/4
#   CASES          what to time, in this order; default: the list below
#   XLA_TRIED      flags of XLA that are tried last, each alone, with the first case;
#                  default: --xla_gpu_enable_triton_gemm=false --xla_gpu_enable_command_buffer=
#   REPEATS        timed steps or samplings, at least 2; default: 5
#   PYTHON         a Python with this package's needs; default: .venv/bin/python, or else python3

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
[ $# = 0 ] || fail "takes no arguments, got '$*'"
must_be_on_disk WORKDIR
SECONDS_LIMIT=${SECONDS_LIMIT:-520} MODEL=${MODEL:-XL/2} CHECK_MODEL=${CHECK_MODEL:-Ti/4}
DTYPE=${DTYPE:-bfloat16} CHECKS=${CHECKS-golden attention resume} REPEATS=${REPEATS:-5}
XLA_TRIED=${XLA_TRIED---xla_gpu_enable_triton_gemm=false --xla_gpu_enable_command_buffer=}
# The most valuable first: a run of nine minutes may not reach the last.
CASES=${CASES-
  train-256-b32-none-cudnn-scan-peer
  sample-256-b8-20-cudnn-peer
  train-256-b256-none-cudnn-scan
  train-256-b256-dots-cudnn-scan
  train-512-b16-none-cudnn-scan-peer
  train-256-b32-none-xla-scan
  train-256-b32-none-cudnn-unroll
  train-512-b64-dots-cudnn-scan
  train-256-b256-full-cudnn-scan
  sample-256-b8-250-cudnn-peer
  train-512-b16-none-xla-scan
  train-512-b64-full-cudnn-scan
  sample-512-b8-20-cudnn-peer
  sample-512-b4-250-cudnn-peer}
read -ra checks <<< "$CHECKS"
read -ra cases <<< "${CASES//$'\n'/ }"
read -ra tried <<< "$XLA_TRIED"
size='(256|512)-b[1-9][0-9]*' attention='(xla|cudnn)'
train="train-$size-(none|dots|full)-$attention-(scan|unroll)"
sample="sample-$size-[1-9][0-9]*-$attention"
must_match SECONDS_LIMIT '[1-9][0-9]*' 'a whole number of at least 1'
must_match REPEATS '[2-9]|[1-9][0-9]+' 'a whole number of at least 2'
must_match DTYPE 'bfloat16|float32' 'bfloat16 or float32'
for setting in MODEL CHECK_MODEL; do
  must_match "$setting" '[A-Za-z]+/[1-9][0-9]*' 'a model such as XL/2'
done
# shellcheck disable=SC2034
for CHECK in "${checks[@]}"; do
  must_match CHECK 'golden|attention|resume' 'golden, attention or resume'
done
[ ${#cases[@]} != 0 ] || tried=()
# shellcheck disable=SC2034
for CASE in "${cases[@]}"; do
  must_match CASE "($train|$sample)(-peer)?" 'a case such as train-256-b32-none-cudnn-scan-peer'
done
workdir=$(path_of WORKDIR runs/gpu_check)
cd "$root"
SECONDS=0
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
mkdir -p "$workdir"
workdir=$(realpath "$workdir")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} DTYPE CHECK_MODEL
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled}

# Runs a command in its own process and writes its log and its status, or nothing if it is done.
# A last word that ends with OUT gets the file of its result there. Sets `folder`.
part() {  # NAME SECONDS_TO_KEEP WORD...
  local limit=$((SECONDS_LIMIT - SECONDS - $2)) longest=$((SECONDS_LIMIT / 3))
  local started=$SECONDS code=0
  folder=$workdir/$1
  mkdir -p "$folder"
  touch "$folder/log" "$folder/flags"
  [ ! -e "$folder/out.json" ] || return 0
  if [ "$limit" -lt 5 ]; then
    echo "124 0" > "$folder/status"
    return
  fi
  echo "$1"
  [ "$limit" -lt "$longest" ] || limit=$longest
  timeout --kill-after=10 "$limit" "${@:3}" --out="$folder/out.json" &> "$folder/log" || code=$?
  echo "$code $((SECONDS - started))" > "$folder/status"
}

# Sets how jax takes the memory of the GPU: all of its share at once, or as it needs it.
with_memory() {  # AT_ONCE SHARE WORD...
  XLA_PYTHON_CLIENT_PREALLOCATE=$1 XLA_CLIENT_MEM_FRACTION=$2 "${@:3}"
}

flags_of() {  # CASE; prints one a line
  local what size batch a b c
  IFS=- read -r what size batch a b c _ <<< "$1"
  echo "--config=configs/imagenet$size.py:$MODEL"
  echo "--config.compute.dtype=$DTYPE"
  echo "--config.train.batch_size=${batch#b}"
  echo "--config.compute.attention=$b"
  if [ "$what" = sample ]; then
    echo "--config.sampling.num_steps=$a"
  else
    echo "--config.compute.remat=$a"
    if [ "$c" = unroll ]; then echo "--config.compute.unroll"; fi
  fi
}

measure() {  # NAME CASE SECONDS_TO_KEEP
  local options=(--warmup=1 --repeats="$REPEATS") memory=(true 0.9) flags
  mapfile -t flags < <(flags_of "$2")
  if [[ $2 = *-peer ]]; then options+=(--peer) memory=(false 0.5); fi  # PyTorch needs the rest
  with_memory "${memory[@]}" part "case-$1" "$3" \
    "$PYTHON" -m dit_jax.cli.bench "${2%%-*}" "${options[@]}" "${flags[@]}"
  printf '%s\n' "${flags[@]}" > "$folder/flags"
}

running=()
for check in "${checks[@]}"; do  # at the same time: nothing of them is timed
  with_memory false 0.25 part "check-$check" 0 "$PYTHON" tests/gpu_check.py "$check" &
  running+=("$!")
done
[ ${#running[@]} = 0 ] || wait "${running[@]}"

for case in "${cases[@]}"; do measure "$case" "$case" 60; done
best=$("$PYTHON" tests/gpu_check.py best --out="$workdir")
if [ "$best" ]; then
  mapfile -t flags < "$workdir/case-$best/flags"
  with_memory true 0.9 part "profile-$best" 0 "$PYTHON" tests/gpu_check.py profile "${flags[@]}"
fi
for flag in "${tried[@]}"; do
  case=${cases[0]%-peer}
  XLA_FLAGS="${XLA_FLAGS:-} $flag" measure "$case${flag//[^a-z0-9_=]/}" "$case" 0
done
"$PYTHON" tests/gpu_check.py table --out="$workdir"

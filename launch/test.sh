#!/usr/bin/env bash
# Runs everything that a change must pass: formatting, lint and the fast tests. Runs the tests of
# the models a second time, in the mode that nnx will make its default.
#
#   bash launch/test.sh [PYTEST ARGUMENT ...]
#
# Arguments go to pytest, for example `-m slow`: then only the tests that they choose run, once.
# The first start installs the package into .venv, which needs the package registry.
#
# Settings, from the environment:
#   PYTHON  the Python that makes .venv, 3.11 or newer; default: python3

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$@"
EXTRAS=dev
source "$root/launch/environment.sh"

ruff format --check .
ruff check .
if [ $# = 0 ]; then
  # The small programs of these tests take longer to compile than to run.
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"
  export XLA_FLAGS="$XLA_FLAGS --xla_llvm_disable_expensive_passes=true"
  # Without the fusion emitters a program compiles in a quarter of the time, and in one piece in a
  # tenth less. Newer versions of jax lack the first, and an unknown flag ends the process.
  flags="$XLA_FLAGS --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  probe='import jax; jax.devices("cpu")'
  if (XLA_FLAGS=$flags JAX_PLATFORMS=cpu exec python -c "$probe") &> /dev/null; then
    export XLA_FLAGS=$flags
  fi
fi
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@"
if [ $# = 0 ]; then
  NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false \
    python -m pytest -n 2 -q -m "not slow" tests/models/test_{dit,vae,inception,classifier}.py
fi

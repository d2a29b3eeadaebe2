#!/usr/bin/env bash
# Everything that a change must pass: formatting, lint and tests, those of the models a second time
# in the mode that nnx is moving to. Needs Python and, the first time, the package registry.
# Arguments go to pytest instead, as -m slow: then the tests that they choose run, and once.
set -euo pipefail
EXTRAS=dev
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff format --check .
ruff check .
python -m pytest -n 2 --dist loadfile "$@"
if [ $# = 0 ]; then
  NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false python -m pytest -n 2 tests/models
fi

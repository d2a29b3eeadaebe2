#!/usr/bin/env bash
# Everything that a change must pass: formatting, lint and tests. Needs Python and, the first time,
# the package registry. Arguments go to pytest, as -m slow.
set -euo pipefail
EXTRAS=dev
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff format --check .
ruff check .
python -m pytest "$@"

#!/usr/bin/env bash
# Sets everything up on a fresh machine and runs the checks: lint, the test suite, and a smoke run of the main path.
# Usage: bash scripts/test.sh [pytest arguments]      e.g. bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment test

export NPROC=32 JAX_PLATFORMS=cpu XDG_CACHE_HOME="${XDG_CACHE_HOME:-$PWD/.venv/cache}"
say "Lint"
ruff check .
ruff format --check .
say "Smoke run of the main path"
python scripts/smoke.py
say "Tests"
exec python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile "$@"

#!/usr/bin/env bash
# Sets everything up on a fresh machine and runs the checks; without arguments: lint, a smoke run of the main path, the quick tests.
# Usage: bash scripts/test.sh [--ci | --slow | --slow-part N | --hardware | --all | --soak [ROUNDS] | --wheel] [--record] [-- pytest arguments]
#        bash scripts/test.sh --matrix ... | --mutate ...      docs/testing.md says what each part is for and what it costs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

extra=test part=${1:-}
case $part in
  --matrix | --mutate) shift ;;
  "" | --ci | --slow | --slow-part | --slow-part=* | --soak | --soak=* | --wheel | --record | --) ;;
  --hardware | --all) extra=test-hardware ;;
  *) sed -n '3,4s/^# *//p' scripts/test.sh >&2; die "does not know $part; what goes to pytest comes after --, as in: bash scripts/test.sh -- -k routing" ;;
esac
setup_environment "$extra"

export NPROC=32 JAX_PLATFORMS=cpu XDG_CACHE_HOME="${XDG_CACHE_HOME:-$PWD/.venv/cache}"
case $part in
  --matrix) exec python scripts/matrix.py "$@" ;;
  --mutate) exec python scripts/mutate.py "$@" ;;
  *) exec python scripts/run_tests.py "$@" ;;
esac

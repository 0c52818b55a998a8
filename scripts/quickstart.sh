#!/usr/bin/env bash
# Sets everything up on a fresh machine and pre-trains a small Switch Transformer on text that comes with Python.
# Usage: bash scripts/quickstart.sh [--config.SECTION.FIELD=VALUE ...]      Run again to continue or to see the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment quickstart

say "Pre-training configs/tiny.py in runs/tiny"
exec flax-switch pretrain --config configs/tiny.py --workdir runs/tiny "$@"

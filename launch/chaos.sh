#!/usr/bin/env bash
# Trains a tiny model, kills it at random moments, damages its files, and compares its end with that of an unbroken run.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2s/^# //p' launch/chaos.sh
    echo "usage: bash launch/chaos.sh [--kills=50] [--seed=0] [--folder=runs/chaos]    the folder is emptied first"
    exit 0
fi
. launch/environment.sh

use_environment .venv/run ""
python launch/chaos.py "$@"

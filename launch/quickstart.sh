#!/usr/bin/env bash
# From nothing to a trained model: installs into a virtual environment of its own, trains on the embedded corpus,
# evaluates, samples and writes a report. If it is run again, it continues the training or finds nothing left to do.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' launch/quickstart.sh
    echo "usage: bash launch/quickstart.sh [--config.section.field=value ...]    RUN=runs/quickstart names the run's folder"
    exit 0
fi
. launch/environment.sh
RUN=${RUN:-runs/quickstart}

use_environment .venv/run ""
armd train --config=experiments/quickstart.py --workdir="$RUN" "$@"
armd eval --run="$RUN" --split=test
armd sample --run="$RUN" --streams=1,2,4,8
armd report --run="$RUN"

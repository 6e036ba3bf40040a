#!/usr/bin/env bash
# Lint and the whole test suite, in a virtual environment of its own. Arguments go to pytest (default: all tests).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2s/^# //p' "$0"
    echo "usage: bash launch/test.sh [pytest arguments]"
    exit 0
fi
. launch/environment.sh

use_environment .venv/test "[test]"
ruff check .
ruff format --check .
# Two workers where there are two cores; a file's tests stay together, so that its slow fixtures are made once.
python -m pytest -n 2 --dist loadfile "$@"

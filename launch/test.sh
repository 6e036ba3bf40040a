#!/usr/bin/env bash
# Lint and the whole test suite, in a virtual environment of its own. Arguments go to pytest (default: all tests).
# Where a newer Python is at hand, the mathematics and the sampler are tested there too, on the newest JAX.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' launch/test.sh
    echo "usage: bash launch/test.sh [pytest arguments]"
    exit 0
fi
. launch/environment.sh

use_environment .venv/test "[test]"
ruff check .
ruff format --check .
# Two workers where there are two cores; a file's tests stay together, so that its slow fixtures are made once.
python -m pytest -n 2 --dist loadfile "$@"
if [ $# -eq 0 ] && newer=$(newer_python); then
    PYTHON=$newer use_environment .venv/newest "[test]"
    python -c 'import jax, platform; print("once more on Python", platform.python_version(), "with jax", jax.__version__)'
    python -m pytest -n 2 --dist loadfile tests/core tests/inference tests/experiments
fi

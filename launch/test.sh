#!/usr/bin/env bash
# Lint, types and tests, in a virtual environment of its own. --fast: lint, types and the tests that are not slow, in
# about two minutes on two cores. Other arguments go to pytest (default: all tests). If a newer Python is at hand, the
# whole run also tests the mathematics and the sampler there, on the newest JAX.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2,4s/^# //p' launch/test.sh
    echo "usage: bash launch/test.sh [--fast] [pytest arguments]"
    exit 0
fi
. launch/environment.sh

whole=$([ $# -eq 0 ] && echo yes || echo no)
kept=""
if [ "${1:-}" = "--fast" ]; then
    shift
    kept="not slow and "
fi
use_environment .venv/test "[test]"
ruff check .
ruff format --check .
mypy --no-incremental  # its cache misses a match that a new name made incomplete
# Two workers for two cores. The tests of a file stay together, so that its slow fixtures are made once.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "${kept}not profiler" "$@" || none=$?
# The profiler of JAX crashes in a process in which other tests have compiled for TPUs or imported TensorFlow.
python -m pytest -m "${kept}profiler" "$@" || alone=$?
# Exit code 5: none of these tests was chosen, as if a file was named. That is an error only if both choose none.
if [ "${none:-0}" -ne 0 ] && { [ "$none" -ne 5 ] || [ "${alone:-0}" -ne 0 ]; }; then exit "$none"; fi
if [ "${alone:-0}" -ne 0 ] && [ "$alone" -ne 5 ]; then exit "$alone"; fi
if [ "$whole" = yes ] && newer=$(newer_python); then
    PYTHON=$newer use_environment .venv/newest "[test]"
    python -c 'import jax, platform; print("once more on Python", platform.python_version(), "with jax", jax.__version__)'
    python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not profiler"
    python -m pytest tests/training/test_train.py -k "resumed or fine_tuning_starts"
fi

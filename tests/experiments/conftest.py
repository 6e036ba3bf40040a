"""Running a benchmark as its users do, for all tests of benchmarks."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments/benchmarks"


@pytest.fixture(scope="session")
def run_benchmark() -> Callable[..., subprocess.CompletedProcess[str]]:
    """(script, *flags) -> the finished process, with what it printed."""

    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parents[1])}
    settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests look at what is printed, and not at times

    def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(FOLDER / script), *flags],
            capture_output=True,
            text=True,
            env=os.environ | settings,
        )

    return run

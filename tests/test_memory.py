"""If memory runs out, one line says how much was asked for and what to lower."""

import errno
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from armd_jax.cli.main import VERBS
from armd_jax.errors import UserError, out_of_memory

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What XLA (CPU, GPU, TPU), NumPy, C++ and the kernel raise, and what the line says of it.
ERRORS = [
    (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 13107200000 bytes."),
        ": 13,107,200,000 bytes (12.21 GiB)",
    ),
    (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB."),
        ": 1,610,612,736 bytes (1.50 GiB)",
    ),
    (RuntimeError("Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0"), ": 2,147,483,648 bytes"),
    (
        RuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.00G of"
            " 15.48G hbm. Exceeded hbm capacity by 5.52G."
        ),
        ": 22,548,578,304 bytes (21.00 GiB)",
    ),
    (RuntimeError("RESOURCE_EXHAUSTED: Attempting to reserve 512.0M at the bottom of memory."), ": 536,870,912 bytes"),
    (
        MemoryError("Unable to allocate 22.9 GiB for an array with shape (3000000, 1024) and data type int64"),
        "(22.90 GiB)",
    ),
    (MemoryError("Unable to allocate 977. MiB for an array with shape (4000000, 64)"), ": 1,024,458,752 bytes"),
    (MemoryError("std::bad_alloc"), ""),
    (RuntimeError("std::bad_alloc"), ""),
    (MemoryError(), ""),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
]


@pytest.mark.parametrize(("error", "said"), ERRORS, ids=[str(error)[:40] for error, _ in ERRORS])
def test_every_way_of_running_out_is_known(error, said):
    """The amount is found in each message that has one, also if the error is the cause of another."""
    assert said in out_of_memory(error) and bool(said) == bool(out_of_memory(error))
    try:
        try:
            raise error
        except type(error) as cause:
            raise KeyError("a thread failed") from cause
    except KeyError as outer:
        assert out_of_memory(outer) == out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Error writing checkpoint: No space left on device"),
        OSError(errno.ENOSPC, "No space left on device"),
        UserError("out of memory.txt: there is no such file"),
        ValueError("shapes do not fit"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error):
    """A full disk has the same code as full memory, and the text of a mistake may be anything."""
    assert out_of_memory(error) is None


def test_every_verb_says_what_to_lower():
    """Each of them has a sentence of its own for that."""
    assert all(verb.IF_MEMORY_RUNS_OUT for verb in VERBS.values())


_LINE = r"error: out of memory: [\d,]{10,} bytes \([\d.,]+ GiB\) were asked for at once; lower "

# Runs command lines under a limit of memory that is set after the first one, when everything is imported.
_PROGRAM = """
import json, resource, sys
from armd_jax.cli import main as cli
first, *lines = json.loads(sys.argv[1])
assert cli.main(first) == 0
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
for argv in lines:
    print(cli.main(argv), file=sys.stderr, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs Linux, which says what a process uses")
def test_memory_that_runs_out_is_one_line(tmp_path, smoke_run):
    """Drawing and scoring beyond a real limit of 1 GiB more than is in use: a line each, and exit code 1."""
    sample = ["sample", f"--run={smoke_run}", "--length=64", f"--out={tmp_path}"]
    lines = [
        [*sample, "--batch=1"],
        [*sample, "--batch=3000000"],
        ["eval", f"--run={smoke_run}", "--batch=4000000", "--draws=0", f"--out={tmp_path}"],
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(lines)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    shown = [line for line in done.stderr.splitlines() if line.startswith("error: ") or line in ("0", "1", "2")]
    assert shown[1::2] == ["1", "1"], done.stderr
    for line, lower in zip(shown[::2], ("--batch, --length", "--batch"), strict=True):
        assert re.match(_LINE, line), line
        assert lower in line


# The limit is set before anything is imported, and is far above what the libraries themselves reserve.
_TRAINING = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**34, resource.getrlimit(resource.RLIMIT_AS)[1]))
from armd_jax.cli import main as cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which holds a process to such a limit")
def test_training_beyond_memory_is_one_line(tmp_path, smoke_config, corpus):
    """A batch that needs some 80 GB where 16 GiB are allowed: the fields to change, exit code 1, no traceback."""
    command = ["train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.data.path={corpus}", "--config.training.batch_size=100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _TRAINING, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(_LINE, last), last
    assert "training.batch_size" in last and "training.microbatches" in last

"""Freed memory stays with the process: the second large allocation faults no pages in again."""

import platform
import subprocess
import sys

import pytest

from armd_jax.training import host_memory

pytestmark = pytest.mark.slow

_SCRIPT = """
import numpy as np, resource
from armd_jax.training import host_memory

if {keep}:
    assert host_memory.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty({mebibytes} * 2**20, np.uint8)[::4096] = 1  # one byte a page; freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.parametrize("mebibytes", [128, 2304])
def test_freed_memory_is_used_again(mebibytes):
    """Page faults of the second of two equal allocations, with and without the setting; also beyond 2 GiB."""
    if platform.libc_ver()[0] != "glibc":
        assert not host_memory.keep_freed_memory()
        return
    counts = []
    for keep in (False, True):
        script = _SCRIPT.format(keep=keep, mebibytes=mebibytes)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    without, kept = counts
    assert kept < without / 10, (without, kept)

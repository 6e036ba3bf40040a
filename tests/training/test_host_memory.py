"""Freed memory stays with the process: the second large allocation faults no pages in again."""

import platform
import subprocess
import sys

from armd_jax.training import host_memory

_SCRIPT = """
import numpy as np, resource
from armd_jax.training import host_memory

if {keep}:
    assert host_memory.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)  # 128 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_freed_memory_is_used_again():
    """Page faults of the second of two equal allocations, with and without the setting."""
    if platform.libc_ver()[0] != "glibc":
        assert not host_memory.keep_freed_memory()
        return
    counts = []
    for keep in (False, True):
        script = _SCRIPT.format(keep=keep)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    without, kept = counts
    assert kept < without / 10, (without, kept)

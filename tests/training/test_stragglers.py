"""Which process the others wait for."""

import os
import socket
import subprocess
import sys

import pytest

from armd_jax.training import stragglers

_TWO = """
import sys
from jax.experimental import multihost_utils
from armd_jax.training import distributed, stragglers
process = int(sys.argv[2])
distributed.initialize("auto", sys.argv[1], 2, process)
hosts = stragglers.Stragglers()
for number, seconds in enumerate((0.01, 0.6)):
    if process == 1:
        hosts.note(seconds, 1.0)
    multihost_utils.sync_global_devices(f"noted {number}")
    if process == 0:
        print({name: round(value, 6) for name, value in hosts.note(0.1, 1.0).items()})
    multihost_utils.sync_global_devices(f"read {number}")
"""


def test_the_slowest_is_named_if_it_is_behind():
    """By how much of a step, against the median of the others; small differences and single processes have no name."""
    assert stragglers.slowest({0: 0.1, 1: 0.1, 2: 0.7, 3: 0.3}, 2.0) == (2, pytest.approx(0.3))
    assert stragglers.slowest({0: 0.1, 1: 0.15}, 1.0) is None
    assert stragglers.slowest({0: 5.0}, 1.0) is None and stragglers.slowest({}, 1.0) is None
    assert stragglers.slowest({0: 0.0, 1: 1.0}, 0.0) is None


def test_a_single_process_notes_nothing():
    """There is nobody to compare it with."""
    assert stragglers.Stragglers().note(1.0, 1.0) == {}


@pytest.mark.slow
def test_two_processes_know_of_each_other():
    """Process 0 names process 1 as soon as that notes that it is slow, and what it noted before is replaced."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", _TWO, address]
    processes = [
        subprocess.Popen(
            [*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for number in range(2)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert ended[0][0].splitlines()[-2:] == ["{}", "{'train/slowest_process': 1.0, 'train/behind': 0.5}"], ended

"""Traces of single steps: whole or absent, and no run computes anything else because of them."""

import contextlib
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import pytest

from armd_jax.compilation import operations
from armd_jax.training import profiling
from armd_jax.training.profiling import Profiler
from armd_jax.training.stopwatch import Stopwatch

pytestmark = pytest.mark.profiler


@jax.jit
def _step(x_DD: jax.Array) -> jax.Array:
    return jnp.tanh(x_DD @ x_DD)


def _train(profiler: Profiler, steps: range, signal_at: int = 0) -> None:
    x_DD = jnp.ones((64, 64))
    for step in steps:
        if step == signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        profiler.before(step)
        x_DD = _step(x_DD)
        profiler.after(step, x_DD)


def _traces(run: pathlib.Path) -> list[str]:
    """Names in the folder of traces, hidden ones too."""
    folder = run / profiling.FOLDER
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_the_steps_that_the_config_names_are_traced(tmp_path):
    """The folder has the name of the first step, and the trace the operations of that many steps and no others."""
    _step(jnp.ones((64, 64))).block_until_ready()
    told = []
    counts = []
    for wanted in ((3, 1), (3, 4)):
        run = tmp_path / str(wanted[1])
        with Profiler(run, wanted, Stopwatch(), told.append) as profiler:
            _train(profiler, range(1, 10))
        assert _traces(run) == ["step-3"]
        counts.append(sum(one.count for one in operations.traced(profiling.newest(run))))
    assert counts[0] > 0 and counts[1] == 4 * counts[0]
    assert len(told) == 2 and str(run / "profile/step-3") in told[1]


def test_a_signal_asks_for_the_next_steps(tmp_path):
    """SIGUSR1 traces once, from the next step on; what it did before is restored."""
    before = signal.getsignal(signal.SIGUSR1)
    watch = Stopwatch()
    with Profiler(tmp_path, (), watch, lambda text: None) as profiler:
        _train(profiler, range(1, 20), signal_at=7)
    assert _traces(tmp_path) == ["step-7"]
    assert watch.seconds()["profiling"] > 0
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_killed_profile_leaves_nothing(tmp_path):
    """An error inside a trace leaves no folder, and what a killed process left is removed by the next one."""
    with contextlib.suppress(ZeroDivisionError), Profiler(tmp_path, (2, 5), Stopwatch(), print) as profiler:
        _train(profiler, range(1, 4))
        raise ZeroDivisionError
    assert _traces(tmp_path) == []
    (tmp_path / "profile" / ".step-2.x" / "plugins").mkdir(parents=True)
    with Profiler(tmp_path, (2, 2), Stopwatch(), print) as profiler:
        assert _traces(tmp_path) == []
        _train(profiler, range(1, 6))
        _train(profiler, range(1, 6))  # the same steps again, as after a kill: the new trace takes the old one's place
    assert _traces(tmp_path) == ["step-2"]


def test_a_full_disk_and_a_second_profiler_stop_nobody(tmp_path):
    """Training goes on without a profile, and a line says why."""
    told = []
    jax.profiler.start_trace(tmp_path / "mine")
    try:
        with Profiler(tmp_path / "run", (2, 2), Stopwatch(), told.append) as profiler:
            _train(profiler, range(1, 6))
    finally:
        jax.profiler.stop_trace()
    (line,) = told
    assert line.startswith("step 2: no profile (") and _traces(tmp_path / "run") == []
    (tmp_path / "profile").write_text("")
    with Profiler(tmp_path, (2, 2), Stopwatch(), told.append) as profiler:
        _train(profiler, range(1, 6))
    assert len(told) == 2 and told[1].startswith("step 2: no profile (")


def test_a_process_that_traces_nothing_takes_the_signal(tmp_path):
    """Of several processes one traces; the others go on."""
    with Profiler(None, (2, 2), Stopwatch(), print) as profiler:
        _train(profiler, range(1, 6), signal_at=2)
    assert _traces(tmp_path) == []

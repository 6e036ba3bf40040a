"""Where the wall-clock of a run went, from its events alone."""

import contextlib
import os
import subprocess
import sys
import time
import types

import pytest

from armd_jax import config as configs
from armd_jax import typed
from armd_jax.training import goodput, run_log, stopwatch
from armd_jax.training.stopwatch import Stopwatch


def _row(event: str, step: int, time: float, began: float | None = None, **seconds: float) -> dict:
    row = {"event": event, "step": step, "time": time, "seconds": seconds}
    return row if began is None else row | {"began": began}


# Two processes: the first is killed at about 160, 4 steps after its checkpoint; nothing runs until 200.
KILLED = [
    _row("start", 0, 110.0, began=100.0, starting=6.0, preparing=4.0),
    _row("spent", 10, 130.0, starting=6.0, preparing=4.0, compiling=8.0, training=11.0, waiting=1.0),
    {"event": "save", "step": 10},
    _row("spent", 14, 155.0, starting=6.0, preparing=4.0, compiling=8.0, training=31.0, waiting=2.0, saving=4.0),
    _row("resume", 10, 207.0, began=200.0, starting=5.0, restoring=2.0),
    _row("end", 20, 230.0, starting=5.0, restoring=2.0, compiling=3.0, training=15.0, saving=2.0, evaluating=3.0),
]


def test_seconds_add_up_to_the_wall_clock():
    """From the begin of the first process to the last event, over a kill, each second in one category."""
    found = goodput.of(KILLED)
    assert found.seconds == {
        "training": 26.0, "waiting": 1.0, "evaluating": 3.0, "saving": 6.0, "compiling": 11.0, "restoring": 2.0,
        "preparing": 4.0, "profiling": 0.0, "starting": 11.0, "lost": 21.0, "not_running": 45.0,
    }  # fmt: skip
    assert found.wall_seconds == sum(found.seconds.values()) == 130.0 == 230.0 - 100.0
    assert (found.lost_steps, found.processes) == (4, 2)
    assert set(found.seconds) == set(typed.choices(goodput.Category))


def test_steps_are_lost_once_and_in_part():
    """A process that goes on from the middle of what an earlier one noted loses that part; nothing is lost twice."""
    events = [
        _row("start", 0, 0.0, began=0.0),
        _row("spent", 10, 10.0, training=10.0),
        _row("resume", 5, 10.0, began=10.0),
        _row("spent", 10, 15.0, training=5.0),
        _row("resume", 2, 15.0, began=15.0),
        _row("end", 12, 25.0, training=10.0),
    ]
    found = goodput.of(events)
    assert (found.seconds["lost"], found.seconds["training"], found.lost_steps) == (13.0, 12.0, 13)
    assert found.wall_seconds == 25.0


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"event": "start", "step": 0, "time": 5.0}, {"event": "end", "step": 3, "time": 9.0}],  # an earlier version's
        [_row("spent", 3, 10.0, training=3.0)],
        [{"event": "start", "step": 0, "time": float("nan"), "seconds": {}}, {"step": "x", "time": 1, "seconds": 3}],
    ],
)
def test_events_that_do_not_tell(events):
    """There is no goodput rather than a wrong one."""
    assert goodput.of(events) is None


def test_rows_that_make_no_sense_are_passed_over():
    """Clocks that were set back, names that nobody knows and numbers that are none change nothing of the rest."""
    strange = [
        {"event": "spent", "step": 12, "time": 157.0, "seconds": {"training": "much", "nothing": 3.0}},
        {"event": "spent", "step": -1, "time": 158.0, "seconds": {"training": 1e300}},
        {"event": "spent", "step": 2**70, "time": 158.0, "seconds": {"training": 1.0}},
    ]
    assert goodput.of([*KILLED[:2], *strange[1:], *KILLED[2:]]) == goodput.of(KILLED)
    assert goodput.of([*KILLED, strange[0]]).wall_seconds >= 130.0


def test_a_stopwatch_counts_every_moment_once():
    """One activity at a time, blocks inside others too, and the whole is the time that passed."""
    began = time.time() - 5.0
    watch = Stopwatch(began)
    time.sleep(0.02)
    with watch.during("preparing"):
        time.sleep(0.03)
    watch.now("training")
    with watch.during("saving"):
        time.sleep(0.01)
    seconds = watch.seconds()
    assert seconds["preparing"] >= 0.03 and seconds["saving"] >= 0.01 and seconds["starting"] >= 5.02
    assert seconds["training"] < 0.02
    assert watch.elapsed() == pytest.approx(time.time() - began, abs=0.02)


class _Metric(float):
    """A number on a device, which may still be computed."""

    ready = True

    def is_ready(self) -> bool:
        return self.ready


def test_waits_are_fractions_of_the_time_between_rows(monkeypatch):
    """Each step of 1 s: 0.2 s without a batch, and 0.3 s of other work on the host, which counts if the device is done.

    All steps but step 3 are done before the next is dispatched. An evaluation counts for nothing.
    """
    now, rows = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = configs.from_config_dict({"training": {"batch_size": 2, "log_every": 1, "tensorboard": False}})
    watch = Stopwatch()
    log = run_log.RunLog(config, False, watch)
    with contextlib.ExitStack() as stack:
        log.open(stack, None, 0, 0)
        log._writer = types.SimpleNamespace(write=lambda at, values: rows.append(values), event=lambda *_, **__: None)
        for done in range(1, 6):
            watch.now("waiting")
            now[0] += 0.2
            watch.now("training")
            log.before_step()
            metric = _Metric(0.0)
            metric.ready = done != 3
            now[0] += 0.5
            log.read(done, {"train/loss": 1.0, "train/grad_norm": 1.0, "train/skipped": metric})
            now[0] += 0.3
            if done == 4:
                log.flush()
                now[0] += 100.0
                log.evaluated(done, {})
        log.flush()
    waits = [(row.get("train/data_wait"), row.get("train/host_wait")) for row in rows]
    assert waits[0] == (None, None)
    # Between rows 1 and 2 step 3 is dispatched, after step 2 was done; between rows 2 and 3 step 4, with 3 under way.
    assert waits[1] == pytest.approx((0.2, 0.3)) and waits[2] == pytest.approx((0.2, 0.0))
    assert waits[3] == pytest.approx((0.0, 0.0))  # from row 3 to the evaluation, no step was dispatched
    assert waits[4] == pytest.approx((0.2, 0.0))


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells when a process began")
def test_a_process_knows_when_it_began():
    """To a hundredth of a second, before Python's own start."""
    assert stopwatch.process_began() < time.time()
    code = "import time; from armd_jax.training import stopwatch; print(stopwatch.process_began())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert before - 0.02 <= float(done.stdout) < time.time() and float(done.stdout) < before + 0.5

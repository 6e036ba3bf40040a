"""Real signals to a real training process: saved, left with the documented code, continued to the same end."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from armd_jax.training import checkpoint_listing
from armd_jax.training.preemption import Preemption


def _start(workdir: pathlib.Path, smoke_config: str, corpus: pathlib.Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "armd_jax", "train", f"--config={smoke_config}", f"--workdir={workdir}"]
    command += [f"--config.data.path={corpus}", f"--config.training.num_steps={steps}"]
    command += ["--config.training.checkpoint_every=1000", "--config.training.eval_every=0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _rows(workdir: pathlib.Path, name: str) -> list[dict]:
    path = workdir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while len(_rows(workdir, "metrics.jsonl")) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.usefixtures("heeded")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_leaves(tmp_path, smoke_config, corpus, number):
    """Exit code 75 within seconds, a checkpoint of that very step though none was due, and an event."""
    process = _start(tmp_path / "run", smoke_config, corpus, 100_000)
    _wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    last = _rows(tmp_path / "run", "events.jsonl")[-1]
    assert last["event"] == "stop" and f"stopped by a signal after step {last['step']}" in out
    assert number.name in err
    found = checkpoint_listing.inspect(tmp_path / "run")
    assert [(one.step, one.fault) for one in found] == [(last["step"], "")]
    assert _rows(tmp_path / "run", "metrics.jsonl")[-1]["step"] == last["step"]


def test_the_second_signal_leaves_at_once(tmp_path):
    """While a step takes long, a second signal ends the process without waiting for it."""
    script = (
        "import time\nfrom armd_jax.training.preemption import Preemption\n"
        "with Preemption() as preemption:\n    print('ready', flush=True)\n"
        "    while True:\n        time.sleep(0.01)\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saving after this step" in process.stderr.readline() + process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


WARNINGS = [signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", WARNINGS)
def test_a_warning_asks_for_a_stop_however_often_it_comes(capsys, number):
    """A lost terminal, a time limit that is near, a limit on CPU time: the run is saved, and repeats do not end it.

    A SIGTERM after the warning, as schedulers send it, leaves the time to save as well.
    """
    before = signal.getsignal(number)
    with Preemption():
        pass
    assert signal.getsignal(number) == before
    with Preemption() as preemption:
        assert not preemption.requested(1)
        for sent in (number, number, number, signal.SIGTERM):
            os.kill(os.getpid(), sent)
            assert preemption.requested(2)
    os.kill(os.getpid(), number)  # while the process ends
    err = capsys.readouterr().err
    assert f"{number.name}: saving after this step\n" in err and err.count("saving") == 1


@pytest.mark.parametrize("number", WARNINGS)
def test_an_ignored_warning_stays_ignored(number):
    """Started with `nohup`, a training outlives its terminal."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), number)
            assert not preemption.requested(1)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.usefixtures("heeded")
def test_a_warning_reaches_all_processes(monkeypatch):
    """One process of several passes a warning on, once, as the SIGTERM at which JAX makes all of them stop together."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    try:
        with Preemption():
            for number in (*WARNINGS, signal.SIGHUP):
                os.kill(os.getpid(), number)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)

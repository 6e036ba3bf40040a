"""Two real processes with two devices each, over loopback: one training, stopped and ended together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from armd_jax.cli import main as cli
from armd_jax.errors import UserError
from armd_jax.training import checkpoint_listing, distributed

pytestmark = pytest.mark.slow

STEPS = 12


def _command(workdir: pathlib.Path, smoke_config: str, corpus: pathlib.Path, steps: int = STEPS) -> list[str]:
    command = [sys.executable, "-m", "armd_jax", "train", f"--config={smoke_config}", f"--workdir={workdir}"]
    command += [f"--config.data.path={corpus}", f"--config.training.num_steps={steps}"]
    command += ["--config.training.checkpoint_every=4", "--config.training.eval_every=6", "--config.mesh.fsdp=2"]
    return [*command, "--config.order.sbp_steps=0", "--config.optimizer.schedule=constant"]


def _start(command: list[str], processes: int, cache: pathlib.Path, devices: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # toy models: compiling takes longer than running
    started = []
    for number in range(processes):
        words = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={number}"]
        words = words if processes > 1 else []
        started.append(
            subprocess.Popen(
                [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        )
    return started


def _end(processes: list[subprocess.Popen], timeout: float = 180) -> list[tuple[int, str]]:
    """Exit code and stderr of every process; none outlives the test."""
    deadline = time.monotonic() + timeout
    ended = []
    try:
        for process in processes:
            _, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            ended.append((process.returncode, err))
    finally:
        for process in processes:
            process.kill()
    return ended


def _rows(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    path = workdir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _losses(workdir: pathlib.Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in _rows(workdir) if "train/loss" in row}


def _wait_for_step(processes: list[subprocess.Popen], workdir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 150
    while max(_losses(workdir), default=0) < step:
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, smoke_config, corpus) -> pathlib.Path:
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    ((code, err),) = _end(_start(_command(workdir, smoke_config, corpus), 1, workdir, devices=4))
    assert code == 0, err
    return workdir


def test_two_processes_train_like_one(tmp_path, smoke_config, corpus, one_process):
    """Losses agree to 1e-4; process 0 alone writes; on 1 process and on 2 again the run sees the same batches."""
    workdir = tmp_path / "run"
    for processes, steps in ((2, 4), (1, 8), (2, 12)):
        command = _command(workdir, smoke_config, corpus, steps)
        ended = _end(_start(command, processes, tmp_path, devices=4 // processes))
        assert [code for code, _ in ended] == [0] * processes, ended
        assert all("resolved config" not in err and "step" not in err for _, err in ended[1:])
    ours, theirs = _losses(workdir), _losses(one_process)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-4), step
    events = [
        (row["event"], row["step"]) for row in _rows(workdir, "events.jsonl") if row["event"] not in ("save", "spent")
    ]
    assert events == [("start", 0), ("end", 4), ("resume", 4), ("end", 8), ("resume", 8), ("end", 12)]


def test_a_tensor_axis_across_processes(tmp_path, smoke_run, smoke_config, corpus):
    """Two processes that hold halves of the weights read the same rows, begin with weights from elsewhere, spread over
    both, and train like one process."""
    base = [sys.executable, "-m", "armd_jax", "train", f"--config={smoke_config}", f"--config.data.path={corpus}"]
    base += [f"--config.training.init_from={smoke_run}", "--config.training.num_steps=3", "--config.order.sbp_steps=0"]
    for name, processes in (("one", 1), ("two", 2)):
        command = [*base, f"--workdir={tmp_path / name}", f"--config.mesh.tensor={processes}"]
        ended = _end(_start(command, processes, tmp_path, devices=1))
        assert [code for code, _ in ended] == [0] * processes, ended
    ours, theirs = _losses(tmp_path / "two"), _losses(tmp_path / "one")
    assert list(ours) == [1, 2, 3] and theirs[1] < 4  # an untrained model has ln 257 = 5.5
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-4), step


_DIAGNOSIS = """
import dataclasses, sys
import jax, numpy as np
from armd_jax import config as configs
from armd_jax.training import distributed, faults, placement, sharding, state
distributed.initialize("auto", sys.argv[1].split("=")[1], *(int(word.split("=")[1]) for word in sys.argv[2:]))
values = configs.default_config_dict()
values.model.update(vocab_size=9, max_length=8, num_layers=2, two_stream_layers=1, width=16, num_heads=2)
values.order.update(max_permuted=4)
values.training.update(batch_size=4)
config = configs.from_config_dict(values)
mesh = sharding.make_mesh(config.mesh)
here, tokens = sharding.rows_here(mesh, 4), np.zeros((4, 8), np.int32)
tokens[3, 5] = 10**6  # no such token: NaN
batch = sharding.global_rows(mesh, 4, here, tokens[here])
print(faults.first_non_finite(placement.for_training(config, mesh), state.create(config, mesh), batch))
"""


def test_a_fault_is_found_wherever_it_is(tmp_path):
    """Every process names the same rows and places, also where another process has them: all go on together."""
    processes = _start([sys.executable, "-c", _DIAGNOSIS], 2, tmp_path)
    try:
        ended = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for out, err in ended:
        assert "{'tensor': 'nll', 'rows': [3], 'positions': [5]}" in out, err


def test_sigterm_to_one_stops_both(tmp_path, smoke_config, corpus):
    """Both save the same step and leave with code 75; the next life resumes from that step."""
    workdir = tmp_path / "run"
    processes = _start(_command(workdir, smoke_config, corpus, 100_000), 2, tmp_path)
    _wait_for_step(processes, workdir, 3)
    processes[1].send_signal(signal.SIGTERM)
    ended = _end(processes, timeout=60)
    assert [code for code, _ in ended] == [75, 75], ended
    last = _rows(workdir, "events.jsonl")[-1]
    assert last["event"] == "stop"
    newest = checkpoint_listing.inspect(workdir)[-1]
    assert (newest.step, newest.fault) == (last["step"], "")

    # SIGKILL to one: the other ends within half a minute, with a message, and the run can be continued.
    processes = _start(_command(workdir, smoke_config, corpus, 100_000), 2, tmp_path)
    _wait_for_step(processes, workdir, last["step"] + 6)
    assert ("resume", last["step"]) in [(row["event"], row["step"]) for row in _rows(workdir, "events.jsonl")]
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    (code, err), (killed, _) = _end(processes, timeout=60)
    assert time.monotonic() - began < 30 and killed == -signal.SIGKILL
    assert code not in (0, 2, 75) and err.strip()
    assert not checkpoint_listing.inspect(workdir)[-1].fault


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coordinator=127.0.0.1:9"], "go together"),
        (["--coordinator=127.0.0.1:9", "--num-processes=2", "--process-id=2"], "process ids run from 0"),
        (["--coordinator=nowhere", "--num-processes=2", "--process-id=0"], "expected HOST:PORT"),
        (["--distributed=maybe"], "invalid choice"),
        (["--num-processes=two"], "invalid int"),
    ],
)
def test_wrong_flags(tmp_path, capsys, smoke_config, words, message):
    """One line, exit code 2, nothing created."""
    assert cli.main(["train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}", *words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # inside an allocation, but not under srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
        ({"JOB_COMPLETION_INDEX": "0"}, False),
        ({"JOB_COMPLETION_INDEX": "0", "JAX_COORDINATOR_ADDRESS": "job-0:1234"}, True),
    ],
)
def test_several_processes_are_expected_where_the_environment_says_so(environment, several):
    """What `--distributed=auto` goes by."""
    assert distributed.several_expected(environment) == several


def test_nothing_to_join_is_an_error(monkeypatch):
    """`--distributed=on` on a machine that belongs to no cluster says so."""

    def none_found(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", none_found)
    with pytest.raises(UserError, match="no other processes were found"):
        distributed.initialize("on")

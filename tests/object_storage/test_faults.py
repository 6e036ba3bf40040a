"""Trainings in a store that fails: kills, 503s, slow answers, torn uploads; to the bit like one on a disk."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from armd_jax import files, remote

HERE = pathlib.Path(__file__).parent
ARMD = [sys.executable, "-m", "armd_jax"]
# Each at every Nth request, of which there are many more in gs://, where Orbax writes checkpoints itself.
FAULTS = {
    "gs": ["--unavailable=307", "--slow=293", "--torn=31", "--silent=47"],
    "s3": ["--unavailable=97", "--slow=89", "--torn=31", "--silent=47"],
}
# What makes a checkpoint count, and is stored last.
LAST_OF = {"gs": "commit_success.txt", "s3": "_CHECKPOINT_METADATA"}

pytestmark = pytest.mark.slow


def _digests(run: str, step: int) -> dict[str, int]:
    """The digest of every array of a checkpoint."""
    checkpoint = remote.checkpoint_folder(remote.local(run)) / str(step)
    found: dict[str, int] = json.loads((checkpoint / "meta" / "metadata").read_text())["digests"]
    assert len(found) > 30
    return found


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_killed_runs_go_on(tmp_path, smoke_config, smoke_run, corpus, ports, serve, environment, metrics, scheme):
    """A training that is killed, in a store with all kinds of faults, ends like one on a disk, to the bit."""
    kills, run = int(os.environ.get("ARMD_KILLS", "2")), f"{scheme}://bucket/killed"
    store = remote.Copy(scheme, run, "read")  # as it is, without faults

    def saves() -> int:
        found = [store.read_small(f"checkpoints/{step}/{LAST_OF[scheme]}") for step in (10, 20, 30, 40)]
        return len(found) - found.count(None)

    def lives() -> list[str]:
        return store.names_below(".lock")

    with serve(str(HERE / "faulty_proxy.py"), "PORT", str(ports[scheme]), *FAULTS[scheme]) as proxy:
        leads = os.environ | environment(proxy, proxy) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in smoke_run
        command = [*ARMD, "train", f"--config={smoke_config}", f"--config.data.path={corpus}"]
        command += [f"--workdir={run}"]
        for number in range(kills):
            # Every third life ends when it has saved once more; the others sooner, each at another place.
            progress, delay = (saves, 0.0) if number % 3 == 0 else (lives, 0.4 * number)
            before = progress()
            process = subprocess.Popen(command, env=leads, stderr=subprocess.DEVNULL)
            while progress() == before and process.poll() is None:
                time.sleep(0.05)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
        for _ in range(3):  # if the last save fails, it is told, and the same command goes on
            ended = subprocess.run(command, env=leads, capture_output=True, text=True)
            if ended.returncode == 0 or "the run can go on from step" not in ended.stderr:
                break
        assert ended.returncode == 0, ended.stderr
        with urllib.request.urlopen(f"http://127.0.0.1:{proxy}/faults") as answer:
            faults = json.load(answer)
    assert [kind for kind, number in faults.items() if number] == ["unavailable", "slow", "torn", "silent"]
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_text(store.read_small(name))
    assert metrics(tmp_path / "metrics.jsonl") == metrics(smoke_run / "metrics.jsonl")
    events = [row["event"] for row in files.read_json_lines(tmp_path / "events.jsonl")]
    assert events.count("resume") >= 1
    assert _digests(run, 40) == _digests(str(smoke_run), 40)
    lasted = [event for event in events if event != "spent"]
    print(f"{scheme}: {kills} kills, faults {faults}, events {lasted}")


def _train(command: list[str], processes: int, devices: int) -> None:
    """Runs a training in several processes of this machine, with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    leads = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    words = [[coordinator, f"--num-processes={processes}", f"--process-id={number}"] for number in range(processes)]
    started = [
        subprocess.Popen([*command, *(each if processes > 1 else [])], env=leads, stderr=subprocess.PIPE)
        for each in words
    ]
    ended = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, ended


def test_another_mesh(tmp_path, smoke_config, corpus, ports, metrics):
    """Two processes share a run in a bucket, and one goes on with it over other devices: to the bit as on a disk."""
    command = [*ARMD, "train", f"--config={smoke_config}", f"--config.data.path={corpus}"]
    command += ["--config.order.sbp_steps=0", "--config.optimizer.schedule=constant", "--config.model.num_layers=1"]
    command += ["--config.training.checkpoint_every=4", "--config.training.eval_every=100"]
    runs = [f"{tmp_path}/run", "gs://bucket/mesh/run", "s3://bucket/mesh/run"]
    for run in runs[:2]:
        _train([*command, f"--workdir={run}", "--config.training.num_steps=4", "--config.mesh.fsdp=2"], 2, 1)
    # In s3:// a run has one process: that of the disk is copied there.
    remote.Copy("s3", runs[2], "read").files.put(runs[0], "bucket/mesh/run", recursive=True)
    found = []
    for run in runs:
        _train([*command, f"--workdir={run}", "--config.training.num_steps=8", "--config.mesh.fsdp=4"], 1, 4)
        found.append((_digests(run, 8), metrics(remote.local(run) / "metrics.jsonl")))
    assert found[0] == found[1] == found[2]
    assert [row["step"] for row in found[0][1] if "train/loss" in row] == list(range(1, 9))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_an_answer_that_is_lost(ports, serve, environment, monkeypatch, scheme):
    """Whoever created an object, such as a lease, knows it although it was told of an object that exists."""
    import s3fs

    with serve(str(HERE / "faulty_proxy.py"), "PORT", str(ports[scheme]), "--silent=2") as proxy:
        for name, value in environment(proxy, proxy).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        copy = remote.Copy(scheme, f"{scheme}://bucket/lost", "write")
        assert copy.write_small("one", "mine", new=True)
        assert copy.write_small("two", "mine", new=True)  # its first answer is lost
        assert not copy.write_small("two", "yours", new=True) and copy.read_small("two") == "mine"
        with urllib.request.urlopen(f"http://127.0.0.1:{proxy}/faults") as answer:
            assert json.load(answer)["silent"] >= 1
    s3fs.S3FileSystem.clear_instance_cache()

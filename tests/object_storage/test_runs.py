"""Runs, exports and data in buckets, against servers on loopback: an emulator of GCS, and moto for S3."""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from armd_jax import files, remote
from armd_jax.cli import main as cli
from armd_jax.errors import UserError
from armd_jax.training import lease, run_log

NEEDED = ("gcsfs", "s3fs", "gcp_storage_emulator", "moto")
if not all(map(importlib.util.find_spec, NEEDED)):
    pytest.skip(f"needs {', '.join(NEEDED)}", allow_module_level=True)

TESTS = pathlib.Path(__file__).parent
SECRET = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def _server(*command: str) -> Iterator[str]:
    """The address of a server. PORT in the command is a free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(port) if word == "PORT" else word for word in command]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _gcs(address: str) -> dict[str, str]:
    return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}


@pytest.fixture(scope="module")
def stores() -> Iterator[dict[str, str]]:
    """Both servers, each with the bucket `bucket`; the environment that leads there is set, and returned."""
    gcs = _server(str(TESTS / "object_store.py"), "PORT")
    s3 = _server("-m", "moto.server", "-H", "127.0.0.1", "-p", "PORT")
    with gcs as gcs_address, s3 as s3_address, pytest.MonkeyPatch.context() as patch:
        found = _gcs(gcs_address) | SECRET | {"AWS_ENDPOINT_URL": s3_address}
        for name, value in found.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield found
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["gs", "s3"])
def bucket(request, stores) -> Iterator[str]:
    """The address of a bucket."""
    yield f"{request.param}://bucket"
    remote.forget_all()


def _metrics(file: pathlib.Path) -> list[dict[str, object]]:
    rows = files.read_json_lines(file)
    return [{name: row[name] for name in row if name not in run_log.SPEED} for row in rows]


@pytest.mark.slow
def test_a_run_in_a_bucket(tmp_path, capsys, smoke_config, smoke_run, corpus, bucket, quick_compilation):
    """Prepared, trained, listed, sampled, exported and reported in a bucket: the same as on a disk."""
    prepared, run, export = (f"{bucket}/whole/{name}" for name in ("prepared", "run", "export"))
    prepare = ["prepare", f"--source={corpus}", f"--out={prepared}", "--tokenizer=bytes", "--length=64"]
    assert cli.main(prepare) == 0
    assert cli.main(["train", f"--config={smoke_config}", f"--workdir={run}", f"--config.data.path={prepared}"]) == 0
    for verb in ("checkpoints", "report"):
        assert cli.main([verb, f"--run={run}"]) == 0
    assert cli.main(["export", f"--run={run}", f"--out={export}"]) == 0
    assert cli.main(["export", f"--run={smoke_run}", f"--out={tmp_path / 'export'}"]) == 0
    capsys.readouterr()
    samples = []
    for one in (run, export, tmp_path / "export"):
        assert cli.main(["sample", f"--run={one}", "--prompt=the", "--json"]) == 0
        samples.append(json.loads(capsys.readouterr().out)["samples"])
    texts = [[sample["text"] for sample in one] for one in samples]
    assert texts[0] == texts[1] == texts[2]
    copy = remote.local(export)
    name = "model.safetensors"
    assert (copy / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    copy = remote.local(run)
    assert _metrics(copy / "metrics.jsonl") == _metrics(smoke_run / "metrics.jsonl")
    assert (copy / "report.html").is_file()
    config = files.read_json(copy / "config.json")
    assert config["data"]["path"] == prepared and "armd-copy" not in json.dumps(config)


@pytest.mark.slow
def test_killed_runs_go_on(tmp_path, smoke_config, smoke_run, corpus, stores):
    """A training that is killed, in a store that fails every 50th request, ends like one on a disk, to the bit."""
    with _server(str(TESTS / "object_store.py"), "PORT", "0.02") as address:
        command = [
            sys.executable,
            "-m",
            "armd_jax",
            "train",
            f"--config={smoke_config}",
            f"--config.data.path={corpus}",
        ]
        environment = os.environ | _gcs(address) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in smoke_run
        for kills in range(int(os.environ.get("ARMD_KILLS", "2"))):
            process = subprocess.Popen(
                [*command, "--workdir=gs://bucket/run"], env=environment, stderr=subprocess.DEVNULL
            )
            before = _saves(address)
            while _saves(address) == before and process.poll() is None:
                time.sleep(0.05)
            time.sleep(0.1 * kills)  # at another place each time
            process.send_signal(signal.SIGKILL)
            process.wait()
        ended = subprocess.run([*command, "--workdir=gs://bucket/run"], env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        here = tmp_path / "export"
        export = [sys.executable, "-m", "armd_jax", "export", "--run=gs://bucket/run", f"--out={here}"]
        assert subprocess.run(export, env=environment, capture_output=True).returncode == 0
        (tmp_path / "metrics.jsonl").write_bytes(_object(address, "run/metrics.jsonl"))
        assert _metrics(tmp_path / "metrics.jsonl") == _metrics(smoke_run / "metrics.jsonl")
        events = [json.loads(line)["event"] for line in _object(address, "run/events.jsonl").decode().splitlines()]
        assert events.count("resume") >= 1
    assert cli.main(["export", f"--run={smoke_run}", f"--out={tmp_path / 'other'}"]) == 0
    assert (here / "model.safetensors").read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()


def _object(address: str, name: str) -> bytes:
    while True:
        try:
            with urllib.request.urlopen(f"{address}/bucket/{name}") as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return b""
            assert error.code == 503  # some requests fail on purpose


def _saves(address: str) -> int:
    """How many checkpoints have been written to their end; only steps up to 40."""
    return sum(bool(_object(address, f"run/checkpoints/{step}/commit_success.txt")) for step in (10, 20, 30, 40))


def test_one_training_at_a_time(bucket):
    """The run of a living training is refused; that of a dead one is taken over, and whoever was only stalled stops."""
    address = f"{bucket}/lease-of-{os.getpid()}"
    copy = remote.Copy("gs" if bucket.startswith("gs") else "s3", address, "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "BEAT", 0.2)
        patch.setattr(lease, "LEASE", 2.0)
        with lease.held(copy), pytest.raises(UserError, match="a training is running in it"), lease.held(copy):
            pass
        with lease.held(copy):  # it was released
            number = max(copy.names_below(".lock"))
        dead = subprocess.Popen([sys.executable, "-c", "pass"])
        dead.wait()
        content = "\n".join(["token", "process", lease._machine(), str(dead.pid), "0", "held"])
        copy.write_small(f".lock/{int(number) + 1:08d}", content)
        with lease.held(copy):
            mine = lease._held[address]
            assert copy.names_below(".lock") == [f"{int(number) + 2:08d}"]
            assert not copy.write_small(f".lock/{int(number) + 2:08d}", "x", new=True)
            copy.write_small(f".lock/{int(number) + 3:08d}", "taken by another")
            time.sleep(1.0)
            assert mine.lost
            with pytest.raises(UserError, match="taken over"):
                mine.store()


def test_of_several_one_takes_the_lease(bucket):
    """Several trainings that begin together: one of them gets the run."""
    address, got, lost = f"{bucket}/race-{os.getpid()}", [], []
    copies = [remote.Copy("gs" if bucket.startswith("gs") else "s3", address, "run") for _ in range(4)]
    done = threading.Barrier(4)

    def take(copy: remote.Copy) -> None:
        try:
            with lease.held(copy):
                got.append(copy)
                done.wait(20)
        except UserError:
            lost.append(copy)
            done.wait(20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "BEAT", 0.2)
        threads = [threading.Thread(target=take, args=(copy,)) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 1 and len(lost) == 3


def test_what_makes_files_count_is_stored_last(bucket, monkeypatch):
    """A store that ends in the middle leaves no folder that looks whole; nor is a checkpoint fetched in part."""
    address = f"{bucket}/torn-{os.getpid()}"
    folder = remote.copy_for(address, "write")
    copy = remote.copy_of(folder)
    for name in ("config.json", "weights", "sub/manifest.json", "sub/rows", ".hidden", "checkpoints/5/state/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "checkpoints/5/_CHECKPOINT_METADATA").write_text("x")
    sent = []
    monkeypatch.setattr(remote.Copy, "_send", lambda self, path, key: sent.append(path.name))
    copy.store()
    assert sent[-2:] == ["manifest.json", "config.json"] and ".hidden" not in sent
    assert ("x" in sent) == (copy.scheme == "s3")  # Orbax writes checkpoints in gs:// itself
    monkeypatch.undo()
    copy.files.pipe_file(f"{address.split('://')[1]}/checkpoints/6/state/x", b"torn")
    copy.files.pipe_file(f"{address.split('://')[1]}/seen", b"1")
    remote.forget_all()
    again = remote.local(address)
    assert (again / "seen").is_file() and not (again / "checkpoints").exists()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("export --run={run} --out=gs://no-such-bucket/x", "no such bucket"),
        ("export --run={run} --out=s3://no-such-bucket/x", "no such bucket"),
        ("eval --run=gs://bucket/none", "there is no such folder"),
        ("train --config={config} --workdir=s3://no-such-bucket/x", "no such bucket"),
        ("train --config={config} --workdir=new --config.data.path=gs://bucket/none", "no prepared data there"),
    ],
)
def test_mistakes(stores, smoke_run, smoke_config, capsys, tmp_path, monkeypatch, line, why):
    """One line that names the address, exit code 2, and nothing on the disk."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.format(run=smoke_run, config=smoke_config).split()) == 2
    (err,) = capsys.readouterr().err.splitlines()
    assert err.startswith("error: ") and "://" in err and why in err
    assert not list(tmp_path.iterdir()) and not remote._copies


def test_no_extra(stores, capsys, monkeypatch):
    """Without the libraries, one line names the extra."""
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError(protocol)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    assert cli.main(["eval", "--run=gs://bucket/run"]) == 2
    assert "pip install -e '.[cloud]'" in capsys.readouterr().err


@pytest.mark.slow
def test_who_may_not(stores, smoke_run, tmp_path):
    """Denied writes and missing credentials are one line each, before any work."""
    export = [sys.executable, "-m", "armd_jax", "export", f"--run={smoke_run}"]
    with _server(str(TESTS / "object_store.py"), "PORT", "0", "--deny-writes") as address:
        done = subprocess.run([*export, "--out=gs://bucket/x"], env=os.environ | _gcs(address), capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"access is denied" in done.stderr
    bare = {name: value for name, value in os.environ.items() if name not in SECRET}
    bare |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    done = subprocess.run([*export, "--out=s3://bucket/x"], env=bare, capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"no credentials" in done.stderr


@pytest.mark.slow
def test_a_run_that_was_copied_into_a_bucket(stores, smoke_run, smoke_config, corpus, capsys):
    """It is a run like another. If what makes its checkpoints count was not copied, nothing of it is removed."""
    store = remote.Copy("gs", "gs://bucket/copied", "read").files
    store.put(str(smoke_run), "bucket/copied", recursive=True)
    sample = ["sample", "--run=gs://bucket/copied", "--max-new-tokens=2"]
    assert cli.main(sample) == 0
    for name in store.find("bucket/copied"):
        if name.endswith("commit_success.txt"):
            store.rm_file(name)
    before = store.find("bucket/copied")
    capsys.readouterr()
    train = ["train", f"--config={smoke_config}", "--workdir=gs://bucket/copied", f"--config.data.path={corpus}"]
    for command in (train, sample):
        assert cli.main(command) == 2
        (err,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "gs://bucket/copied/checkpoints" in err and "commit_success.txt are missing" in err
    assert store.find("bucket/copied") == before

"""Runs, exports and data in buckets, against servers on loopback: an emulator of GCS, and moto for S3."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from armd_jax import files, remote
from armd_jax.cli import main as cli
from armd_jax.data import mixture
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.training import lease


@pytest.mark.slow
def test_a_run_in_a_bucket(tmp_path, capsys, smoke_config, smoke_run, corpus, bucket, quick_compilation, metrics):
    """Text, prepared, trained on, listed, sampled, exported and reported in a bucket: the same as on a disk."""
    text, prepared, run, export = (f"{bucket}/whole/{name}" for name in ("text.jsonl", "prepared", "run", "export"))
    remote.Copy("gs" if bucket.startswith("gs") else "s3", bucket, "read").files.put(str(corpus), text.split("://")[1])
    prepare = ["prepare", f"--source={text}", f"--out={prepared}", "--tokenizer=bytes", "--length=64"]
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
    assert metrics(copy / "metrics.jsonl") == metrics(smoke_run / "metrics.jsonl")
    assert (copy / "report.html").is_file()
    config = files.read_json(copy / "config.json")
    assert config["data"]["path"] == prepared and "armd-copy" not in json.dumps(config)


@pytest.mark.slow
def test_parts_in_a_bucket(tmp_path, capsys, corpus, bucket):
    """Each made and merged by a command that has nothing of the others on its disk, and stored with its note last.

    What a command has left that was killed while it stored a part, or what was merged, is replaced.
    """
    text, below = f"{bucket}/parts/text.jsonl", f"{bucket.split('://')[1]}/parts/rows"
    store = remote.Copy("gs" if bucket.startswith("gs") else "s3", bucket, "read").files
    store.put(str(corpus), text.split("://")[1])
    for name in (".parts/00000-of-00002/train.tokens", "/train-00007.array_record", "/tokenizer/left"):
        store.pipe_file(below + name, b"torn")
    prepare = ["prepare", f"--source={text}", "--tokenizer=bytes", "--length=64"]
    assert cli.main([*prepare, f"--out={tmp_path / 'whole'}"]) == 0
    prepare.append(f"--out={bucket}/parts/rows")
    assert cli.main([*prepare, "--shard=1/2"]) == 0
    assert f"{bucket}/parts/rows.parts/00001-of-00002: " in capsys.readouterr().out
    assert cli.main([*prepare, "--merge=2"]) == 2
    assert f"error: {bucket}/parts/rows.parts: 1 of 2 parts missing: 0;" in capsys.readouterr().err
    assert cli.main([*prepare, "--shard=0/2"]) == cli.main([*prepare, "--merge=2"]) == 0
    rows = remote.local(f"{bucket}/parts/rows")
    names = {file.relative_to(rows) for file in rows.rglob("*") if file.is_file()}
    assert names == {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert all((rows / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    assert sorted(["part.json", "train.records", "train.tokens"], key=remote._turn)[-1] == "part.json"


def test_a_mixture_of_folders_in_a_bucket(tmp_path, bucket, corpus):
    """Opened by their addresses, found again by them as a run notes them, and named by them in what a run keeps."""
    lines = corpus.read_text().splitlines(keepends=True)
    for name, part in {"a": lines[:30], "b": lines[30:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        command = ["prepare", f"--source={tmp_path / name}.jsonl", "--tokenizer=bytes", "--length=64"]
        assert cli.main([*command, f"--out={bucket}/mixed/{name}"]) == 0
        assert cli.main([*command, f"--out={tmp_path / name}"]) == 0
    there = DataConfig(mixture=(f"{bucket}/mixed/a:3", f"{bucket}/mixed/b:1"))
    here = DataConfig(mixture=(f"{tmp_path}/a:3", f"{tmp_path}/b:1"))
    data, section = mixture.open_chosen(there, 64)
    assert data.digest == mixture.open_chosen(here, 64)[0].digest and mixture.names_of(data) == ("a", "b")
    assert section.tokenizer == f"{bucket}/mixed/a/tokenizer"
    remote.forget_all()
    noted = [pathlib.Path(f"{bucket}/mixed/{name}") for name in "ab"]
    gone = DataConfig(mixture=("a:3", "b:1"))
    assert mixture.find(gone, noted, data.digest).digest == data.digest
    with pytest.raises(UserError, match=f"^data.mixture: '{bucket}/mixed/c' is no folder that `armd prepare` wrote"):
        mixture.open_chosen(DataConfig(mixture=(f"{bucket}/mixed/c:1",)), 64)


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


def _copy(address: str) -> remote.Copy:
    return remote.Copy("gs" if address.startswith("gs") else "s3", address, "run")


def test_storing_for_long_does_not_end_a_lease(bucket, monkeypatch):
    """While an object is stored for longer than a lease lasts, beats go on, and another training is refused."""
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "LEASE", 1.0)
    monkeypatch.setattr(lease, "_has_died", lambda content: False)
    mine, other = (_copy(f"{bucket}/long-{os.getpid()}") for _ in range(2))
    slow, send = threading.Event(), remote.Copy._send
    monkeypatch.setattr(remote.Copy, "_send", lambda *args: (slow.set(), time.sleep(2.5), send(*args)))
    with lease.held(mine):
        mine.folder.mkdir(exist_ok=True)
        (mine.folder / "large").write_text("large")
        assert slow.wait(10)
        with pytest.raises(UserError, match="a training is running in it"), lease.held(other):
            pass
    assert other.read_small("large") == "large"


@pytest.mark.parametrize("later", [1, 2])
def test_whoever_was_taken_over_stores_nothing(bucket, later):
    """Also if the one that took over has ended meanwhile, and was followed by another."""
    copy, address = _copy(f"{bucket}/over-{later}-{os.getpid()}"), f"{bucket}/over-{later}-{os.getpid()}"
    with lease.held(copy):
        mine = lease._held[address]
        copy.folder.mkdir(exist_ok=True)
        number = mine._number + later
        copy.write_small(f".lock/{number:08d}", "another")
        copy.write_small("metrics.jsonl", "theirs")
        (copy.folder / "metrics.jsonl").write_text("mine")
    assert mine.lost
    assert copy.read_small("metrics.jsonl") == "theirs" and copy.read_small(f".lock/{number:08d}") == "another"


def test_half_a_fetch_is_not_stored(bucket, monkeypatch):
    """A fetch that breaks off leaves the object in the bucket as it was."""
    address = f"{bucket}/half-{os.getpid()}"
    _copy(address).write_small("whole", "all of it")
    copy = _copy(address)

    def broken(key: str, path: str) -> None:
        pathlib.Path(path).write_text("all")
        raise OSError("the connection is gone")

    monkeypatch.setattr(copy.files, "get_file", broken)
    with pytest.raises(UserError, match="cannot be reached"), lease.held(copy):
        pass
    monkeypatch.undo()
    copy.store()
    assert copy.read_small("whole") == "all of it" and not (copy.folder / "whole").exists()


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


@pytest.mark.slow
def test_a_run_that_was_copied_into_a_bucket(ports, smoke_run, smoke_config, corpus, capsys):
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

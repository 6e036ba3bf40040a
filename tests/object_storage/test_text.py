"""Text in buckets: read like text on a disk, each object when it is opened, with little space."""

import gzip
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from armd_jax import config as configs
from armd_jax import files, remote
from armd_jax.cli import main as cli
from armd_jax.data import bucket_files, packing, text_files
from armd_jax.data.corpora import open_corpus
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.training import run_data


def _lines(name: str) -> bytes:
    return "".join(json.dumps({"text": f"{name} says {n * n} and é\n" * 9}) + "\n" for n in range(40)).encode()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    """A folder with text in all kinds of files, and with others."""
    folder = tmp_path_factory.mktemp("text") / "text"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"plain text\r\n" * 50)
    (folder / "b.jsonl").write_bytes(_lines("b"))
    (folder / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(_lines("c")))
    (folder / "deep" / "d.json").write_bytes(_lines("d"))
    if (zstd := text_files._zstd()) is not None:
        (folder / "deep" / "e.jsonl.zst").write_bytes(zstd.compress(_lines("e")))
    table = pyarrow.table({"text": [f"row {n} of a table" for n in range(30)]})
    pyarrow.parquet.write_table(table, folder / "deep" / "er" / "f.parquet")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "README.md").write_text("about the text")
    (folder / "g.csv").write_text("1,2")
    (folder / "settings.json").write_text("[1]")
    return folder


@pytest.fixture
def there(bucket, text) -> str:
    """The address of the same folder in a bucket."""
    store = remote.Copy("gs" if bucket.startswith("gs") else "s3", bucket, "read").files
    root = bucket.split("://")[1]
    if not store.exists(f"{root}/text/a.txt"):
        for file in text.rglob("*"):
            if file.is_file():
                store.pipe_file(f"{root}/text/{file.relative_to(text).as_posix()}", file.read_bytes())
    return f"{bucket}/text"


def _prepared(source: str, out: pathlib.Path, *more: str) -> dict[str, object]:
    """What `armd prepare` wrote, without what names the source."""
    assert cli.main(["prepare", f"--source={source}", f"--out={out}", "--length=16", "--workers=1", *more]) == 0
    written: dict[str, object] = {
        path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    manifest = json.loads(written.pop("manifest.json"))
    del manifest["source"]["description"]
    for file in manifest["source"]["files"]:
        del file["mtime_ns"]
    return written | {"manifest": manifest}


@pytest.mark.parametrize(
    ("glob", "more"),
    [
        ("", ["--tokenizer=sentencepiece", "--vocab-size=290"]),
        ("/**/*.json*", ["--tokenizer=bytes"]),
        ("/b.jsonl", ["--tokenizer=bytes"]),
    ],
)
def test_prepared_like_a_folder(text, there, tmp_path, monkeypatch, capsys, glob, more):
    """Rows, tokenizer, fingerprint and what is left out are those of a copy on the disk, also with no space to keep."""
    monkeypatch.setattr(bucket_files, "KEPT", 1500)
    ours = _prepared(there + glob, tmp_path / "ours", *more)
    said = capsys.readouterr().err
    theirs = _prepared(f"{text}{glob}", tmp_path / "theirs", *more)
    assert ours == theirs and len(ours) > 3
    assert "armd-copy" not in said
    if not glob:
        for why in ("'g.csv' (a table", "'.hidden.txt' (hidden", "'README.md' (", "'settings.json' (its first"):
            assert why in said


def test_little_stays_on_the_disk(there, monkeypatch):
    """With no space to keep anything, one object at a time is on the disk, and all are read to their end, twice."""
    monkeypatch.setattr(bucket_files, "KEPT", 1)
    config = DataConfig(path=f"{there}/**/*.json*", split_by_name=False, valid_fraction=0.0, test_fraction=0.0)
    corpus, folder = open_corpus(config), remote.copy_for(there, "text")
    for _ in range(2):
        count = 0
        for _ in corpus.documents("train"):
            count += 1
            with_content = [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_blocks]
            assert len(with_content) == 1
        assert count % 40 == 0 and count >= 120


def test_what_is_known_is_not_fetched(there, tmp_path):
    """Text whose rows are there already is known by what the store lists, until it changes."""
    config = DataConfig(path=there, tokenizer="bytes")
    first = packing.prepare(config, 16, tmp_path, progress=False)
    kept = bucket_files._texts.copy()
    assert kept and all("b.jsonl" in {path.name for path in text._fetched} for text in kept.values())
    remote.forget_all()
    again = packing.prepare(config, 16, tmp_path, progress=False)
    assert again.digest == first.digest
    fetched = [path.name for text in bucket_files._texts.values() for path in text._fetched]
    assert set(fetched) <= {"d.json", "settings.json"}  # whose first lines decide


def test_a_full_disk_is_no_fault_of_the_store(there, full_disk):
    """Text that does not fit here is told as anything else that does not fit."""
    folder = pathlib.Path(bucket_files.laid_out(there))
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        bucket_files.here(folder / "b.jsonl")


def test_a_change_is_noticed(there):
    """An object that is replaced while it is read is an error in one line; afterwards its new content is read."""
    config = DataConfig(path=f"{there}-changes/*.jsonl", split_by_name=False, valid_fraction=0.0, test_fraction=0.0)
    copy = remote.copy_of(remote.copy_for(f"{there}-changes", "write"))
    content = [_lines(name) for name in "xy"]
    assert len(content[0]) == len(content[1])
    key = f"{copy.address.split('://')[1]}/one.jsonl"
    copy.files.pipe_file(key, content[0])
    before = open_corpus(config)
    assert next(before.documents("train")).startswith("x says")
    remote.forget_all()
    corpus = open_corpus(config, {(one.name, one.bytes, one.mtime_ns): one.sha256 for one in before.files})
    copy.files.pipe_file(key, content[1])
    with pytest.raises(UserError, match="one.jsonl: has changed since it was listed"):
        list(corpus.documents("train"))
    after = open_corpus(config)
    assert after.fingerprint != before.fingerprint
    assert next(after.documents("train")).startswith("y says")


def test_a_cache_in_a_bucket(there, tmp_path, monkeypatch):
    """Rows that one run prepared into `data.cache_dir` are taken by the next one, on whatever machine."""
    values = configs.default_config_dict()
    values.data.update(path=there, tokenizer="bytes", cache_dir=f"{there}-cache")
    values.model.update(max_length=16)
    values.order.update(max_permuted=1)
    config = configs.from_config_dict(values)
    first, _ = run_data.prepare(config, tmp_path / "one", progress=False)
    digest = first.digest
    remote.forget_all()
    monkeypatch.setattr(packing, "_write", lambda *_: pytest.fail("it was prepared once more"))
    again, _ = run_data.prepare(config, tmp_path / "two", progress=False)
    assert again.digest == digest and "armd-copy-" in str(again.folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damaged", ["error", "skip"])
def test_damage_is_named_by_its_address(there, tmp_path, capsys, damaged):
    """In the error, and in the manifest of what was prepared without it."""
    copy = remote.copy_of(remote.copy_for(f"{there}-damaged", "write"))
    copy.files.pipe_file(f"{copy.address.split('://')[1]}/one.jsonl", _lines("x") + b"{broken\n")
    command = ["prepare", f"--source={there}-damaged", f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--length=16"]
    assert cli.main([*command, *(["--skip-damaged"] if damaged == "skip" else [])]) == (0 if damaged == "skip" else 2)
    name = f"{there}-damaged/one.jsonl, line 41"
    if damaged == "error":
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert name in line
    else:
        left_out = files.read_json(tmp_path / "out" / "manifest.json")["left_out"]
        assert left_out["train"]["first_damaged"].startswith(name)


def test_names_that_lead_out_are_passed_over(ports):
    """Objects whose names have empty parts or `..` are no files, here or above."""
    copy = remote.Copy("s3", "s3://bucket/names", "read")
    for name in ("fine.txt", "deep/fine.txt", "a//b.txt", "a/../../c.txt", "folder/"):
        copy.files.pipe_file(f"bucket/names/{name}", b"text")
    copy.files.pipe_file("bucket/names-of-others/d.txt", b"text")
    assert sorted(copy.objects()) == ["deep/fine.txt", "fine.txt"]
    assert len(copy.files.find("bucket/names/")) >= 4

"""Text files: every format is read byte for byte, names give the splits, and bad content names its file and line."""

import gzip
import json

import numpy as np
import pytest

from armd_jax.config import DataConfig
from armd_jax.data import text_files
from armd_jax.data.corpora import open_corpus
from armd_jax.data.splits import SPLITS
from armd_jax.errors import UserError

TEXT = "  one\r\n\ttwo  \n\n\u2581 caf\u00e9 \U0001f600"
JSON_LINES = (json.dumps({"body": TEXT}) + "\n" + json.dumps({"body": " \n"}) + "\n\n").encode()
# A file of every format that holds TEXT.
EXAMPLES = {
    ".txt": TEXT.encode(),
    ".md": TEXT.encode(),
    ".txt.gz": gzip.compress(TEXT.encode()),
    ".jsonl": JSON_LINES,
    ".jsonl.gz": gzip.compress(JSON_LINES),
}
GZIPPED = gzip.compress(np.random.default_rng(0).bytes(10_000).hex().encode())


def texts(corpus):
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def write_jsonl(file, items):
    content = "".join(json.dumps(item) + "\n" for item in items).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_text_is_kept_byte_for_byte(tmp_path, suffix):
    """In every format, alone and in a folder beside files that are not text, whatever comes before the suffix."""
    for name in (f"a{suffix}", f"notes.jsonl{suffix}"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(EXAMPLES[suffix])
        (folder / f".hidden{suffix}").write_bytes(b"\0")
        (folder / "picture.png").write_bytes(b"\0")
        for path in (folder, folder / name):
            config = DataConfig(path=str(path), text_field="body", valid_fraction=0.0, test_fraction=0.0)
            assert texts(open_corpus(config)) == {"train": [TEXT]}


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_every_format_is_in_the_messages_and_names_splits(tmp_path, suffix):
    (tmp_path / "picture.png").write_bytes(b"")
    for path in (tmp_path, tmp_path / "picture.png"):
        with pytest.raises(UserError, match=f"{suffix}(,|$)"):
            open_corpus(DataConfig(path=str(path)))
    for split in SPLITS:
        (tmp_path / f"wiki-{split}{suffix}").write_bytes(EXAMPLES[suffix])
    assert open_corpus(DataConfig(path=str(tmp_path), text_field="body")).splits == SPLITS


def test_no_suffix_hides_another():
    """A file has one format, whatever the order of the table."""
    for one in text_files.SUFFIXES:
        assert [other for other in text_files.SUFFIXES if one.endswith(other)] == [one]


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki-train.md", "wiki-validation.txt", "wiki-test.txt"),
        ("train/0.txt", "dev/0.txt", "test/train-like-not.txt"),
        ("train-00000-of-00001.txt", "val.txt", "test_0.txt"),
    ],
)
def test_file_and_folder_names_give_the_splits(tmp_path, names):
    for name, split in zip(names, SPLITS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {split}")
    for path in (str(tmp_path), f"{tmp_path}/**/*"):
        assert texts(open_corpus(DataConfig(path=path))) == {split: [f"text of {split}"] for split in SPLITS}


def test_named_splits_are_not_completed_but_for_validation(tmp_path):
    write_jsonl(tmp_path / "train.jsonl.gz", [{"text": f"train {index}"} for index in range(100)])
    write_jsonl(tmp_path / "valid.jsonl.gz", [{"text": "valid"}])
    assert open_corpus(DataConfig(path=str(tmp_path))).splits == ("train", "valid")
    (tmp_path / "valid.jsonl.gz").rename(tmp_path / "test.jsonl.gz")
    parts = texts(open_corpus(DataConfig(path=str(tmp_path))))
    assert parts["test"] == ["valid"] and len(parts["valid"]) == 5 and len(parts["train"]) == 95
    (tmp_path / "other.txt").write_text("which split?")
    with pytest.raises(UserError, match="'other.txt' names no split"):
        open_corpus(DataConfig(path=str(tmp_path)))


def test_fingerprint_follows_contents_and_names_but_not_the_place(tmp_path):
    def fingerprint(folder, name, text):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        return open_corpus(DataConfig(path=str(tmp_path / folder))).fingerprint

    first = fingerprint("1", "a.txt", "text")
    assert fingerprint("2", "a.txt", "text") == first
    assert len({first, fingerprint("3", "a.txt", "texT"), fingerprint("4", "b.txt", "text")}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff", r"a\.txt, line 2: not UTF-8 text \(byte 9\)"),
        ("a.txt", b"one\ntwo\0", r"a\.txt, line 2: holds a NUL character"),
        ("a.txt.gz", GZIPPED[:-100], r"a\.txt\.gz: damaged or truncated gzip"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz: damaged or truncated gzip"),
        ("a.jsonl.gz", GZIPPED[:50] + b"\xff\xff" + GZIPPED[52:], r"a\.jsonl\.gz"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"a\.jsonl, line 3: no text in field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: no text in field 'text'"),
        ("a.jsonl", b'"text"\n', r"a\.jsonl, line 1: no text in field 'text'"),
        ("a.jsonl", b'{"text": "\\u0000"}\n', r"a\.jsonl, line 1: holds a NUL"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: holds half a surrogate"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8"),
    ],
)
def test_hostile_content_names_the_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(open_corpus(DataConfig(path=str(tmp_path / name))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "no such file or folder"),
        ("*.txt", "no file there ends in"),
        ("", "no file there ends in"),
        ("picture.png", "cannot read this kind of file"),
    ],
)
def test_source_that_is_not_there(tmp_path, path, message):
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_corpus(DataConfig(path=f"{tmp_path}/{path}"))

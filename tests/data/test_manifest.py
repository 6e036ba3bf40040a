"""The manifest: folders prepared by earlier versions stay readable, and no value in one is believed unchecked."""

import json

import pytest

from armd_jax import typed
from armd_jax.data.manifest import MANIFEST_FILE, Counts, Shard, known_files, read_manifest, write_manifest
from armd_jax.data.reading import LeftOut, SourceFile
from armd_jax.errors import UserError
from armd_jax.names import Split

# As written by the first version of format 2.
STORED = """\
{
  "format": 2,
  "row_length": 100,
  "dtype": "<u2",
  "shard_rows": 50,
  "tokenizer": {
    "request": "bpe 8adb",
    "kind": "bpe",
    "hash": "8adb",
    "vocab_size": 400,
    "end_of_text": 0,
    "lossless": true
  },
  "source": {
    "description": "caf\\u00e9.jsonl (1 file, 33,083 bytes)",
    "fingerprint": "aa59"
  },
  "split_rule": "documents of all files; damaged documents left out; taken from train, by document hash: valid 0.05",
  "left_out": {
    "train": {
      "empty": 1,
      "damaged": 2,
      "first_damaged": "caf\\u00e9.jsonl, line 151: not UTF-8 text (byte 13)"
    }
  },
  "splits": {
    "train": {
      "documents": 3,
      "bytes": 20311,
      "words": 3500,
      "tokens": 6301,
      "rows": 64,
      "shards": [
        {
          "file": "train-00000.array_record",
          "rows": 50,
          "bytes": 65752,
          "sha256": "0f"
        },
        {
          "file": "train-00001.array_record",
          "rows": 14,
          "bytes": 65536,
          "sha256": "1f"
        }
      ]
    },
    "valid": {
      "documents": 1,
      "bytes": 1100,
      "words": 201,
      "tokens": 300,
      "rows": 3,
      "shards": [
        {
          "file": "valid-00000.array_record",
          "rows": 3,
          "bytes": 65536,
          "sha256": "2f"
        }
      ]
    }
  }
}
"""


def test_manifest_on_disk_is_the_same_byte_for_byte(tmp_path):
    """What earlier versions wrote is read, and written again with the same keys in the same order."""
    (tmp_path / MANIFEST_FILE).write_text(STORED)
    manifest = read_manifest(tmp_path)
    assert manifest.splits["train"].counts == Counts(documents=3, bytes=20311, words=3500, tokens=6301, rows=64)
    assert manifest.splits["valid"].shards == (Shard("valid-00000.array_record", 3, 65536, "2f"),)
    assert manifest.left_out["train"] == LeftOut(1, 2, "caf\u00e9.jsonl, line 151: not UTF-8 text (byte 13)")
    assert (manifest.tokenizer.kind, manifest.dtype, manifest.row_length) == ("bpe", "<u2", 100)
    (tmp_path / "again").mkdir()
    write_manifest(tmp_path / "again", manifest)
    assert (tmp_path / "again" / MANIFEST_FILE).read_bytes() == STORED.encode()


def test_source_files_are_recorded_and_may_be_missing(tmp_path):
    """Folders of earlier versions do not say which files they were made from; nothing is known of these."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / MANIFEST_FILE).write_text(STORED)
    assert read_manifest(tmp_path / "old").source.files is None and not known_files(tmp_path)
    about = json.loads(STORED)
    about["source"]["files"] = [{"name": "a/b.txt", "bytes": 3, "mtime_ns": -5, "sha256": "3f"}]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / MANIFEST_FILE).write_text(json.dumps(about))
    manifest = read_manifest(tmp_path / "new")
    assert manifest.source.files == (SourceFile("a/b.txt", 3, -5, "3f"),)
    write_manifest(tmp_path / "new", manifest)
    assert read_manifest(tmp_path / "new") == manifest
    assert known_files(tmp_path) == known_files(tmp_path / "new") == {("a/b.txt", 3, -5): "3f"}


@pytest.mark.parametrize("split", typed.choices(Split))
def test_shards_are_named_after_any_split(tmp_path, split):
    (tmp_path / MANIFEST_FILE).write_text(STORED.replace("valid", split) if split != "train" else STORED)
    assert split in read_manifest(tmp_path).splits


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 3, "format 3 is not the 2 of this version"),
        ("format", "2", "format '2' is not the 2 of this version"),
        ("format", 2.0, "format=2.0: expected int"),
        ("row_length", 0, "its rows or shards are empty"),
        ("shard_rows", -50, "its rows or shards are empty"),
        ("row_length", 10**30, "its counts contradict one another"),
        ("dtype", "<f4", "dtype='<f4' is not known"),
        ("tokenizer.kind", "words", "tokenizer.kind='words' is not known"),
        ("tokenizer.end_of_text", -1, "one of its counts is negative"),
        ("tokenizer.lossless", 1, "tokenizer.lossless=1: expected bool"),
        ("source", "text", "source='text': expected a section"),
        ("source.more", 1, "unknown field 'source.more'"),
        ("source.files", 3, "source.files=3: expected a section"),
        ("source.files", [{"name": "a", "bytes": -1, "mtime_ns": 0, "sha256": ""}], "one of its counts is negative"),
        ("source.files", [{"name": "a", "bytes": 1, "sha256": ""}], "source.files.mtime_ns is missing"),
        ("left_out.train.damaged", -2, "one of its counts is negative"),
        ("left_out.dev", {"empty": 0, "damaged": 0, "first_damaged": ""}, "split='dev' is not known"),
        ("splits.train.tokens", 6401, "its counts contradict one another"),
        ("splits.train.tokens", None, "splits.train.tokens=None: expected int"),
        ("splits.valid.documents", -1, "one of its counts is negative"),
        ("splits.train.shards", [], "its counts contradict one another"),
        ("splits.train", "gone", "it has no train split"),
        ("splits.valid.shards", "gone", "splits.valid.shards is missing"),
        ("source.fingerprint", "gone", "source.fingerprint is missing"),
        ("format", "gone", "format is missing"),
    ],
)
def test_wrong_value_is_named(tmp_path, path, value, message):
    about = json.loads(STORED)
    *parents, last = path.split(".")
    node = about
    for name in parents:
        node = node[name]
    if value == "gone":
        del node[last]
    else:
        node[last] = value
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(about))
    with pytest.raises(UserError, match=rf"manifest\.json: .*{message}.* prepare"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000, b"\0"])
def test_file_that_is_no_manifest(tmp_path, content):
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged manifest: .*; delete the folder") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)

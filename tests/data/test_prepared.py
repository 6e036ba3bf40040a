"""Prepared folders that are given: recognised by what they hold, opened without any text, and refused if they do not
fit."""

import dataclasses
import json
import shutil

import pytest

from armd_jax.data import packing, prepared, tokenizers
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder in bytes, on a machine without its text. Tests only read it."""
    place = tmp_path_factory.mktemp("prepared")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": f"document {n}\n"}) + "\n" for n in range(60)))
    config = DataConfig(path=str(place / "text.jsonl"), tokenizer="bytes")
    packing.prepare_into(config, LENGTH, place / "prep", progress=False)
    (place / "text.jsonl").unlink()
    return place / "prep"


def test_a_prepared_folder_is_recognised_by_what_it_holds(folder, tmp_path, monkeypatch):
    """Spelled in any way; but not a folder of text beside which another program has put a manifest.json."""
    assert prepared.folder_of(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    for path in ("prep", "./prep", "prep/", "../" + folder.parent.name + "/prep"):
        assert prepared.folder_of(path).resolve() == folder
    (tmp_path / "manifest.json").write_text('{"files": ["a.txt"]}')
    (tmp_path / "a.txt").write_text("text")
    for path in ("", str(tmp_path), str(tmp_path / "a.txt"), "missing", "tfds:lm1b", "*.txt", str(folder.parent)):
        assert prepared.folder_of(path) is None


def test_rows_bring_their_tokenizer(folder):
    """The default tokenizer, and a folder that is not on this machine, give way to that of the rows. The config that
    comes back names it, so that it says what is trained."""
    config = DataConfig(path=str(folder))
    for asked in (config, dataclasses.replace(config, tokenizer="/another/machine/gpt2", vocab_size=9)):
        data, resolved = prepared.open_chosen(folder, asked, LENGTH)
        assert data.tokenizer.kind == "bytes" and data.splits == ("train", "valid", "test")
        assert tokenizers.ready_made(resolved).hash == data.tokenizer.hash
    for asked in ("bytes", str(folder / "tokenizer")):
        asked = dataclasses.replace(config, tokenizer=asked)
        assert prepared.open_chosen(folder, asked, LENGTH)[1] == asked


@pytest.mark.parametrize(
    ("fields", "length", "message"),
    [
        ({}, 64, r"its rows have 32 tokens, but model.max_length=64; set model.max_length=32, or .*--length=64"),
        ({"vocab_size": 300}, LENGTH, r"another tokenizer \(bytes, 257 tokens\) than data.tokenizer='sentencepiece'"),
        ({"tokenizer": "WORDS"}, LENGTH, r"another tokenizer \(bytes, 257 tokens\) than data.tokenizer='.*WORDS'"),
        ({"tokenizer": "EMPTY"}, LENGTH, r"EMPTY holds no tokenizer"),
    ],
)
def test_rows_that_do_not_fit_are_refused(folder, tmp_path, fields, length, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "WORDS").mkdir()
    (tmp_path / "WORDS" / "vocab.txt").write_text("[UNK]\n[SEP]\ndocument\n")
    if "tokenizer" in fields:
        fields = {"tokenizer": str(tmp_path / fields["tokenizer"])}
    with pytest.raises(UserError, match=message):
        prepared.open_chosen(folder, DataConfig(path=str(folder), **fields), length)


def test_rows_are_found_by_their_digest(folder, tmp_path):
    """In the folder itself, right below it, and among damaged ones; a folder that is being written is none."""
    digest = packing.open_prepared(folder).digest
    assert prepared.open_rows([folder], digest).folder == folder
    for name in (".prep.partial-host-1-aa", "a", "z"):
        shutil.copytree(folder, tmp_path / "cache" / name)
    (tmp_path / "cache" / "a" / "manifest.json").write_text("{")
    for roots in ([tmp_path / "cache"], [tmp_path / "missing", tmp_path / "cache"]):
        assert prepared.open_rows(roots, digest).folder == tmp_path / "cache" / "z"
    assert prepared.open_rows([folder, tmp_path / "cache"], "another") is None
    shard = tmp_path / "cache" / "z" / "train-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="this shard is damaged"):
        prepared.open_rows([tmp_path / "cache"], digest)

"""Splits: every document is in one of them, the same on every machine and whatever else the source holds."""

import hashlib
import json

import pytest

from armd_jax import typed
from armd_jax.data.corpora import open_corpus
from armd_jax.data.splits import SPLIT_NAMES, SPLITS
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import Split


def texts(corpus):
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def write_jsonl(file, documents):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def test_every_split_is_known_by_its_own_name():
    """The list of splits and the words that sources use for them follow from the one `Literal`."""
    assert typed.choices(Split) == SPLITS
    assert all(SPLIT_NAMES[split] == split for split in SPLITS) and set(SPLIT_NAMES.values()) == set(SPLITS)


def test_split_follows_the_text_not_its_position(tmp_path):
    """Equal documents are in the same split, also if there are more of them or they come in another order."""
    documents = [f"document {index} " * 20 for index in range(60)]
    write_jsonl(tmp_path / "a.jsonl", documents + documents)
    write_jsonl(tmp_path / "b.jsonl", reversed(documents))
    once = texts(open_corpus(DataConfig(path=str(tmp_path / "b.jsonl"), valid_fraction=0.1)))
    twice = texts(open_corpus(DataConfig(path=str(tmp_path / "a.jsonl"), valid_fraction=0.1)))
    for split in SPLITS:
        assert once[split] and sorted(once[split] * 2) == sorted(twice[split])
    assert sorted(sum(once.values(), [])) == sorted(documents)


def test_share_passes_over_a_document_that_is_too_large(tmp_path):
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"{index} " * (20_000 if index % 3 == 0 else 50))
    parts = texts(open_corpus(DataConfig(path=str(tmp_path), valid_fraction=0.002, test_fraction=0.002)))
    for split in ("valid", "test"):
        assert parts[split] and max(map(len, parts[split])) < 1000


def test_one_document_is_cut_in_order_at_line_ends(tmp_path):
    text = "".join(f"line {index}\n" for index in range(1000)) + "no line end"
    (tmp_path / "one.txt").write_text(text)
    parts = texts(open_corpus(DataConfig(path=str(tmp_path / "one.txt"), valid_fraction=0.1, test_fraction=0.2)))
    assert "".join(part for split in SPLITS for part in parts[split]) == text
    assert all(len(part) == 1 for part in parts.values())
    assert parts["train"][0].endswith("\n") and parts["valid"][0].endswith("\n")
    assert len(parts["test"][0]) == pytest.approx(0.2 * len(text), rel=0.01)


def test_one_document_without_lines_is_cut_at_characters(tmp_path):
    (tmp_path / "one.txt").write_text("abcde" * 2000)
    parts = texts(open_corpus(DataConfig(path=str(tmp_path / "one.txt"))))
    assert [len(parts[split][0]) for split in SPLITS] == [9000, 500, 500]


def test_fraction_zero_means_no_such_split(tmp_path):
    (tmp_path / "one.txt").write_text("abcde\n" * 2000)
    corpus = open_corpus(DataConfig(path=str(tmp_path / "one.txt"), valid_fraction=0.0, test_fraction=0.0))
    assert corpus.splits == ("train",) and texts(corpus)["train"] == ["abcde\n" * 2000]
    with pytest.raises(UserError, match="no 'valid' split"):
        corpus.documents("valid")


def test_too_few_documents_to_split(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("word " * 100 + str(index))
    with pytest.raises(UserError, match="nothing of 3 documents would be left for data.valid_fraction=0.05"):
        texts(open_corpus(DataConfig(path=str(tmp_path))))
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(UserError, match="nothing of one document would be left for data.valid_fraction"):
        texts(open_corpus(DataConfig(path=str(tmp_path / "short.txt"))))


def test_split_hash_is_sha256_of_the_text(tmp_path):
    """The rule is a promise: a held-out document stays held out in every later version."""
    documents = [f"{index:03d}" for index in range(100)]
    write_jsonl(tmp_path / "a.jsonl", documents)
    parts = texts(open_corpus(DataConfig(path=str(tmp_path / "a.jsonl"), valid_fraction=0.1, test_fraction=0.1)))
    in_hash_order = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert parts["valid"] == sorted(in_hash_order[:10]) and parts["test"] == sorted(in_hash_order[10:20])

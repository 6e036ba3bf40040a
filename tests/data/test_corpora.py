"""Corpora: every kind of source is reached by a path of its own, and re-reading gives the same documents."""

import pytest

from armd_jax import typed
from armd_jax.data.corpora import SourceKind, open_corpus, source_kind
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

# For every kind of source, values of `data.path` that mean it.
PATHS = {
    "embedded": [""],
    "tfds": ["tfds:lm1b", "tfds:/data/lm1b/1.0.0"],
    "files": ["text.txt", "/folder", "**/*.jsonl", "a:b", "tfds", "./tfds:x"],
}


@pytest.mark.parametrize("kind", typed.choices(SourceKind))
def test_every_kind_of_source_has_its_paths(kind):
    assert {source_kind(path) for path in PATHS[kind]} == {kind}


def test_documents_can_be_read_again_and_again(tmp_path):
    """Also after a pass that was not finished."""
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"document {index}\n" * 9)
    corpus = open_corpus(DataConfig(path=str(tmp_path)))
    for split in corpus.splits:
        first = list(corpus.documents(split))
        assert next(corpus.documents(split)) == first[0]
        assert list(corpus.documents(split)) == first


def test_unknown_split_is_an_error(tmp_path):
    (tmp_path / "one.txt").write_text("abcde\n" * 2000)
    corpus = open_corpus(DataConfig(path=str(tmp_path / "one.txt"), test_fraction=0.0))
    with pytest.raises(UserError, match="no 'test' split; it has train, valid"):
        corpus.check_split("test")

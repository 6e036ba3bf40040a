"""Held-out text to score a run with."""

import dataclasses
import pathlib

from armd_jax.config import Config
from armd_jax.data import packing
from armd_jax.data.corpora import open_corpus
from armd_jax.data.packing import PreparedData


def find(run: pathlib.Path, config: Config, split: str, source: str | None = None) -> PreparedData:
    """The prepared text to score."""
    data, length = config.data, config.model.max_length
    roots = [run / "data", *([pathlib.Path(data.cache_dir)] if data.cache_dir else [])]
    trained_on = data.tokenizer
    data = dataclasses.replace(data, tokenizer=str(run / "tokenizer"))
    candidates = [data]
    if source is not None:
        data = candidates[0] = dataclasses.replace(data, path=source)
    elif trained_on in ("sentencepiece", "bytes"):
        candidates.insert(0, dataclasses.replace(data, tokenizer=trained_on))
    corpus = open_corpus(data)
    corpus.check_split(split)
    for candidate in candidates:
        for root in roots:
            if packing.folder_for(candidate, corpus, length, root).is_dir():
                return packing.prepare(candidate, length, root, corpus=corpus)
    return packing.prepare(data, length, roots[0], corpus=corpus)

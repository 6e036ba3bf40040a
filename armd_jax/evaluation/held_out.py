"""The held-out text of a run, prepared for evaluation."""

import dataclasses
import pathlib

from armd_jax.config import Config, is_named_tokenizer
from armd_jax.data import packing
from armd_jax.data.corpora import open_corpus
from armd_jax.data.packing import PreparedData
from armd_jax.names import Split


def find(
    run: pathlib.Path, config: Config, split: Split, source: str | None = None, rows: pathlib.Path | None = None
) -> PreparedData:
    """The text of a run's data, or other text, as rows of the run's tokens.

    It is looked for in the run's folder, in the `data.cache_dir` of the run's config and in `rows`, and if it is in
    none of them, it is prepared in `rows`. Nothing is ever written to `data.cache_dir`, because a run that came from
    elsewhere must not choose where to write.

    run: the folder of a training run or an export, with the files of its tokenizer in `tokenizer/`.
    config: the run's config, as `config.read(run)` reads it.
    split: "train", "valid" or "test"; the text must have it.
    source: other text, which the run's tokenizer is used for: a file, a folder, a glob or "tfds:NAME".
        None: the text that the run was trained on.
    rows: the folder in whose `data` rows are prepared if there are none yet. None: the run's folder.
    Raises UserError if there is no such text or split, if the tokenizer cannot be read, or if the folder cannot be
    written.
    """
    length, cache = config.model.max_length, config.data.cache_dir
    fresh = (run if rows is None else rows) / "data"
    roots = [run / "data", *([pathlib.Path(cache)] if cache else []), fresh]
    # The config names the tokenizer that training asked for; the files of the tokenizer itself are in the run.
    data = dataclasses.replace(config.data, tokenizer=str(run / "tokenizer"))
    candidates = [data]
    if source is not None:
        data = candidates[0] = dataclasses.replace(data, path=source)
    elif is_named_tokenizer(config.data.tokenizer):
        # The name of a prepared folder depends on what was asked for, and training asked for this name.
        candidates.insert(0, config.data)
    corpus = open_corpus(data)
    corpus.check_split(split)
    for candidate in candidates:
        for root in roots:
            if packing.folder_for(candidate, corpus, length, root).is_dir():
                return packing.prepare(candidate, length, root, corpus=corpus)
    return packing.prepare(data, length, fresh, corpus=corpus)

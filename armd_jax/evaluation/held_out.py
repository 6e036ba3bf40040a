"""The held-out text of a run, prepared for evaluation."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import assert_never

from armd_jax import remote
from armd_jax.config import Config
from armd_jax.data import manifest as manifests
from armd_jax.data import mixture, packing, prepared
from armd_jax.data.corpora import open_corpus, source_kind
from armd_jax.data.mixture import Data
from armd_jax.data.packing import PreparedData
from armd_jax.data_config import is_named_tokenizer
from armd_jax.errors import UserError
from armd_jax.names import Split
from armd_jax.training import run_data
from armd_jax.training import workdir as workdirs


def chosen_split(split: Split | None, there: Sequence[Split]) -> Split:
    """The split that is asked for; if none is, the test split if there is one, and else the validation split."""
    if split is not None:
        return split
    return "test" if "test" in there else "valid"


def find(
    run: pathlib.Path, config: Config, split: Split | None, source: str | None = None, rows: pathlib.Path | None = None
) -> Data:
    """The rows of a run, or other text as rows of the run's tokens.

    A run's own rows are taken wherever they lie (`run_data.own_rows`), and the text is not looked at. If they are gone,
    or in an export, which has none, the text that the config names is looked for, as prepared by an earlier call, in
    the run's folder, in the `data.cache_dir` of its config and in `rows`; if it is nowhere, it is prepared in `rows`.

    A run that came from elsewhere must not choose what is run here, nor where to write. So its config names no TFDS
    dataset, which a builder would have to open, and nothing is ever written to its `data.cache_dir`.

    run: the folder of a training run or an export, with the files of its tokenizer in `tokenizer/`.
    config: the run's config, as `config.read(run)` reads it.
    split: "train", "valid" or "test"; the text must have it, or what `chosen_split` makes of None.
    source: other text, which the run's tokenizer is used for: a file, a folder, a glob or "tfds:NAME"; or a prepared
        folder. None: the text that the run was trained on.
    rows: the folder in whose `data` rows are prepared if there are none yet. None: the run's folder.
    Raises UserError if there is no such text or split, if the tokenizer cannot be read, or if the folder cannot be
    written.
    """
    data = run_data.own_rows(run, config) if source is None else None
    if data is None and source is None and config.data.mixture:
        try:
            data, _ = mixture.open_chosen(config.data, config.model.max_length)
        except UserError as error:
            raise UserError(f"{error}; or give the text with --data") from error
        if workdirs.trained_on(run) is not None:
            raise UserError(f"{run}: data.mixture names other rows than it was trained on; give the text with --data")
    elif data is None:
        path = config.data.path if source is None else source
        chosen = prepared.folder_of(path)
        data = packing.open_prepared(chosen) if chosen else _from_text(run, config, split, source, rows)
        trained = workdirs.trained_on(run) if source is None else None
        if trained is not None and trained.digest != data.digest:
            raise UserError(
                f"{run}: its own rows are gone, and data.path={path!r} names other text than it was trained on;"
                " give the text with --data"
            )
    data.counts(chosen_split(split, data.splits))  # an error if there is no such split
    return data


def _from_text(
    run: pathlib.Path, config: Config, split: Split | None, source: str | None, rows: pathlib.Path | None
) -> PreparedData:
    """The text that `source` names, or the config if it is None, as rows of the run's tokens."""
    length, cache = config.model.max_length, config.data.cache_dir
    fresh = (run if rows is None else rows) / "data"
    roots = [run / "data", *([remote.local(cache)] if cache else []), fresh]
    # The config names the tokenizer that training asked for; the files of the tokenizer itself are in the run.
    data = dataclasses.replace(config.data, tokenizer=str(run / "tokenizer"), tfds_data_dir="")
    candidates = [data]
    if source is not None:
        data = candidates[0] = dataclasses.replace(data, path=source)
    else:
        _check_only_text(run, config)
        if is_named_tokenizer(config.data.tokenizer):
            # The name of a prepared folder depends on what was asked for, and training asked for this name.
            candidates.insert(0, config.data)
    known = {name: sha for root in roots for name, sha in manifests.known_files(root).items()}
    corpus = open_corpus(data, known)
    corpus.check_split(chosen_split(split, corpus.splits))
    for candidate in candidates:
        for root in roots:
            if packing.folder_for(candidate, corpus, length, root).is_dir():
                return packing.prepare(candidate, length, root, corpus=corpus)
    return packing.prepare(data, length, fresh, corpus=corpus)


def _check_only_text(run: pathlib.Path, config: Config) -> None:
    """Raises UserError if the stored config names a source that opening it would run code for."""
    kind = source_kind(config.data.path)
    match kind:
        case "embedded" | "files":
            pass
        case "tfds":
            raise UserError(
                f"{run}: holds no rows of its own, and a stored config does not choose a TFDS dataset to open; if you"
                f" trust it, give it yourself: --data={config.data.path}"
            )
        case _:
            assert_never(kind)

"""Prepared folders that are given, not made: by `data.path`, or as the rows that a run was trained on."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from armd_jax import remote
from armd_jax.data import tokenizers
from armd_jax.data.corpora import Corpus
from armd_jax.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    TokenizerIdentity,
    prepared_below,
    read_manifest,
)
from armd_jax.data.packing import PreparedData, open_prepared
from armd_jax.data_config import DataConfig, is_named_tokenizer
from armd_jax.errors import UserError


def folder_of(path: str) -> Path | None:
    """The prepared folder that a path names; None if it names anything else.

    A manifest.json alone does not make one, because other programs write files of that name beside text.
    """
    folder = remote.copy_for(path)
    if (copy := remote.copy_of(folder)) is not None:
        if copy.read_small(MANIFEST_FILE) is None or not copy.names_below(TOKENIZER_FOLDER):
            return None  # before all of what may be text is fetched
        copy.fetch()
    is_one = bool(path) and (folder / MANIFEST_FILE).is_file() and (folder / TOKENIZER_FOLDER).is_dir()
    return folder if is_one else None


def open_chosen(
    folder: Path, config: DataConfig, length: int, field: str = "data.path"
) -> tuple[PreparedData, DataConfig]:
    """The prepared folder that `config.path` names, and the config with the tokenizer of its rows.

    The folder brings its splits and its tokenizer, and needs no text. `data.tokenizer` may stay at its default. If it
    names a folder that is not on this machine, it says nothing about the rows either.

    field: that of the user's config that names it.
    Raises UserError if the rows do not have `length` tokens, or were made with another tokenizer than `config` names.
    """
    manifest = read_manifest(folder)
    if manifest.row_length != length:
        raise UserError(
            f"{field}={config.path!r}: its rows have {manifest.row_length} tokens, but model.max_length={length};"
            f" set model.max_length={manifest.row_length}, or prepare the text with --length={length}"
        )
    own = remote.spelled(str(folder / TOKENIZER_FOLDER))
    default = (config.tokenizer, config.vocab_size) == (DataConfig.tokenizer, DataConfig.vocab_size)
    here = is_named_tokenizer(config.tokenizer) or remote.local(config.tokenizer).exists()
    fits = here and made_with(config, manifest.tokenizer)
    if here and not fits and not default:
        identity = manifest.tokenizer
        raise UserError(
            f"{field}={config.path!r}: its rows were made with another tokenizer ({identity.kind},"
            f" {identity.vocab_size} tokens) than data.tokenizer={config.tokenizer!r}; set data.tokenizer={own!r}, or"
            " prepare the text with that tokenizer"
        )
    return open_prepared(folder), config if fits else dataclasses.replace(config, tokenizer=own)


def made_with(config: DataConfig, identity: TokenizerIdentity) -> bool:
    """Whether the tokenizer is the one that `config` asks for, as far as that can be told without training it."""
    ready = tokenizers.ready_made(config)
    return tokenizers.request_of(config) == identity.request if ready is None else ready.hash == identity.hash


def comes_from(manifest: Manifest, corpus: Corpus) -> bool:
    """Whether a prepared folder holds the documents of a corpus, in the same splits."""
    of_folder = manifest.source.fingerprint, manifest.split_rule
    return of_folder == (corpus.fingerprint, corpus.split_rule)


def open_rows(roots: Iterable[Path], digest: str) -> PreparedData | None:
    """The prepared folder in `roots` (see `prepared_below`) whose digest this is; None if there is none.

    Raises UserError if there is one, but its files do not fit its manifest.
    """
    for root in roots:
        for folder, manifest in prepared_below(root):
            if isinstance(manifest, Manifest) and manifest.digest == digest:
                return open_prepared(folder)
    return None

"""The `data` section of a config: where text comes from, and how it becomes rows of tokens."""

import dataclasses
import functools
from typing import TypeGuard

from armd_jax import files, names, remote, typed
from armd_jax.errors import UserError

_field = typed.field
_path = functools.partial(typed.field, check=files.check_local)  # the field names files on this machine
_place = functools.partial(typed.field, check=remote.check_place)  # or a folder in object storage


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    path: str = _place("")  # a file, a folder, a glob, or "tfds:NAME" for a TFDS dataset; empty: the embedded corpus
    text_field: str = "text"  # the field of .jsonl objects and TFDS examples that holds the text
    # Whether words in the names of files and folders, such as train, valid and test, give the splits.
    split_by_name: bool = _field(True)
    tfds_data_dir: str = _path("", may_change=True, optional=True)  # where TFDS datasets are; empty: TFDS's own default
    tokenizer: str = _place("sentencepiece")  # that (trained on the text), "bytes", or a folder of vocabulary files
    vocab_size: int = _field(2048, at_least=1)  # of a tokenizer that is trained
    valid_fraction: float = _field(0.05, fraction="open")  # held out for validation if the source brings no such split
    test_fraction: float = _field(0.05, fraction="open")
    shard_rows: int = _field(8192, at_least=1)  # rows per file
    cache_dir: str = _place("", may_change=True, optional=True)  # where prepared data are kept; empty: <workdir>/data
    damaged: names.Damaged = "error"  # whether a document that is not text is an error, or is skipped and counted


def is_named_tokenizer(tokenizer: str) -> TypeGuard[names.NamedTokenizer]:
    """Whether `data.tokenizer` names a kind of tokenizer. If not, it is a folder of vocabulary files."""
    return tokenizer in typed.choices(names.NamedTokenizer)


def check(data: DataConfig) -> None:
    """Raises UserError if no data could be prepared like this."""
    if data.valid_fraction + data.test_fraction >= 1:
        raise UserError("data.valid_fraction + data.test_fraction: must leave something to train on")

"""The `data` section of a config: where text comes from, and how it becomes rows of tokens."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeGuard, assert_never

from armd_jax import files, names, remote, typed
from armd_jax.errors import UserError, shown

_field = typed.field
_path = functools.partial(typed.field, check=files.check_local)  # the field names files on this machine
_place = functools.partial(typed.field, check=remote.check_place)  # or a folder in object storage
_WEIGHT = re.compile(r"\d{1,9}(\.\d{1,9})?|\.\d{1,9}")


def check_mixture(entries: Sequence[str], where: str) -> None:
    """Raises UserError if an entry is not FOLDER:WEIGHT with a weight above 0, or if a folder is named twice."""
    named: set[str] = set()
    for entry in entries:
        path, _, weight = entry.rpartition(":")  # the last colon: an address such as gs://bucket/folder has another
        if not path or not _WEIGHT.fullmatch(weight) or not Fraction(weight):
            raise UserError(
                f"{where}={shown(entry)}: expected a prepared folder and its weight, a number above 0 of at most 9"
                " digits before and after the point, as in prepared/wiki:0.7"
            )
        remote.check_place(path, where)
        if path in named:
            raise UserError(f"{where}={shown(entry)}: this folder is named twice")
        named.add(path)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    path: str = _place("")  # a file, a folder, a glob, or "tfds:NAME" for a TFDS dataset; empty: the embedded corpus
    text_field: str = "text"  # the field of .jsonl objects and TFDS examples that holds the text
    # In place of `path`: folders that `armd prepare` wrote, each with its weight, such as ("wiki:0.7", "code:0.3"). The
    # share of the training rows that come from a folder is its weight divided by the sum of all weights.
    mixture: tuple[str, ...] = _field((), check=check_mixture)
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
    # Whether a row begins anew at each document in it: attention, orders and positions stay within the document.
    reset: names.Reset = "none"
    end_of_text: int = _field(-1, at_least=-1, may_change=True)  # reset=document: the id. -1: that of the tokenizer


def is_named_tokenizer(tokenizer: str) -> TypeGuard[names.NamedTokenizer]:
    """Whether `data.tokenizer` names a kind of tokenizer. If not, it is a folder of vocabulary files."""
    return tokenizer in typed.choices(names.NamedTokenizer)


def mixture(data: DataConfig) -> tuple[tuple[str, Fraction], ...]:
    """The folders that `data.mixture` names, each with its share of the training rows, exact and one in sum.

    The weights have been checked by `check_mixture`.
    """
    parts = [entry.rpartition(":") for entry in data.mixture]
    total = sum(Fraction(weight) for _, _, weight in parts)
    return tuple((path, Fraction(weight) / total) for path, _, weight in parts)


def described(data: DataConfig, named: Callable[[str], str] = str) -> str:
    """What text the config names, for people; empty for the embedded corpus. named: how to write a path."""
    if data.mixture:
        return ", ".join(f"{float(share):.2%} {named(path)}" for path, share in mixture(data))
    return named(data.path)


def check(data: DataConfig) -> None:
    """Raises UserError if no data could be prepared like this."""
    if data.mixture and data.path:
        raise UserError(f"data.path={data.path!r}: data.mixture names the text already; set data.path to nothing")
    if data.valid_fraction + data.test_fraction >= 1:
        raise UserError("data.valid_fraction + data.test_fraction: must leave something to train on")


def check_reset(
    data: DataConfig, kind: names.ModelKind, attention: names.AttentionKind, permute: names.Permutation | None
) -> None:
    """Raises UserError if rows cannot begin anew at each document.

    kind, attention: of the model. permute: how orders are shuffled; None: they are not.
    """
    match data.reset:
        case "none":
            return
        case "document":
            where = f"data.reset={data.reset!r}"
        case _:
            assert_never(data.reset)
    if kind in typed.choices(names.MaskModel):
        raise UserError(f"{where}: model.kind={kind!r} sees whole rows; set data.reset='none'")
    if attention not in typed.choices(names.PlainAttention):
        known = ", ".join(typed.choices(names.PlainAttention))
        raise UserError(f"{where}: model.attention={attention!r} sees the row from its start; use one of {known}")
    match permute:
        case "reinsert":
            raise UserError(
                f"{where}: order.permute={permute!r} moves tokens into other documents; use scatter or window"
            )
        case "scatter" | "window" | None:
            pass
        case _:
            assert_never(permute)

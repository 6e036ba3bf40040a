"""What a user asks to be written: rows of known ids and of places to fill, checked."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from armd_jax.errors import UserError
from armd_jax.inference.schedule import ABSENT, FREE

Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray
PerRow = int | Sequence[int] | np.ndarray


def known_rows(
    max_length: int,
    vocab_size: int,
    batch: int | None,
    length: PerRow | None,
    prompt: Ids | None,
    evidence: Ids | None,
    max_new_tokens: PerRow | None,
    seed: PerRow,
) -> np.ndarray:
    """Known ids [B, N] int64 at natural positions, FREE where to generate, ABSENT behind the end of a shorter row.

    The arguments are those of `LanguageModel.generate`. Raises UserError if they do not fit one another.
    """
    if batch is not None and batch < 1:
        raise UserError(f"batch={batch}: must be at least 1")
    if prompt is not None and evidence is not None:
        raise UserError("prompt and evidence_BN: give one of the two; a prompt can be written into the evidence")
    name = "prompt" if evidence is None else "evidence_BN"
    given = _rows(name, prompt if evidence is None else evidence, low=0 if evidence is None else -1, high=vocab_size)
    counts = {len(given) if len(given) > 1 else 1, batch or 1}
    counts |= {np.size(value) for value in (length, max_new_tokens, seed) if value is not None}
    if len(counts - {1}) > 1:
        several = " and ".join(str(count) for count in sorted(counts - {1}))
        raise UserError(
            f"{several} texts were asked for: batch, and the rows of prompt, evidence_BN, length, max_new_tokens and"
            " seed, have to agree on one number"
        )
    rows = max(counts)
    if len(given) == 1:
        given = given * rows
    lengths = _lengths(max_length, name, given, length, max_new_tokens)
    known_BN = np.full((rows, max(lengths)), ABSENT, np.int64)
    for row, (ids, total) in enumerate(zip(given, lengths, strict=True)):
        known_BN[row, :total] = FREE
        known_BN[row, : len(ids)] = ids
    return known_BN


def _lengths(
    max_length: int, name: str, given: list[np.ndarray], length: PerRow | None, max_new_tokens: PerRow | None
) -> list[int]:
    """The length of every row, which is at least that of its known ids."""
    rows = len(given)
    if max_new_tokens is not None:
        if length is not None or name == "evidence_BN":
            other = "length" if length is not None else "evidence_BN"
            raise UserError(f"max_new_tokens and {other}: give one of the two")
        new = np.broadcast_to(whole_numbers("max_new_tokens", max_new_tokens), (rows,))
        if (new < 0).any():
            raise UserError(f"max_new_tokens={new.min()}: must be at least 0")
        lengths = [len(ids) + int(more) for ids, more in zip(given, new, strict=True)]
        for row, total in enumerate(lengths):
            if total > max_length:
                raise UserError(
                    f"row {row}: a prompt of {len(given[row])} tokens and max_new_tokens={new[row]} are longer than"
                    f" {max_length}, the model's max_length"
                )
    elif length is None:
        lengths = [len(ids) if name == "evidence_BN" else max_length for ids in given]
    else:
        lengths = np.broadcast_to(whole_numbers("length", length), (rows,)).tolist()
    for row, (ids, total) in enumerate(zip(given, lengths, strict=True)):
        if not 1 <= total <= max_length:
            raise UserError(f"length={total}: must be in 1 .. {max_length}, the model's max_length")
        if len(ids) > total:
            raise UserError(f"{name}: row {row} has {len(ids)} tokens, which are longer than length={total}")
        if name == "evidence_BN" and len(ids) != total:
            raise UserError(f"evidence_BN: row {row} has {len(ids)} places, but length={total}")
    return lengths


def _rows(name: str, ids: Ids | None, low: int, high: int) -> list[np.ndarray]:
    """The rows of ids, int64; one without ids if there are none."""
    if ids is None:
        return [np.zeros((0,), np.int64)]
    if isinstance(ids, str | bytes):
        raise UserError(f"{name}: expected token ids, whole numbers (lm.tokenizer.encode gives a text's), got a text")
    several = any(isinstance(row, Sequence) or getattr(row, "ndim", 0) for row in ids)
    rows = [whole_numbers(name, row) for row in (ids if several else [ids])]
    for row in rows:
        if row.ndim != 1:
            raise UserError(f"{name}: expected ids [N], or a list of ids for each text, got a row of shape {row.shape}")
        check_ids(name, row, low, high)
    if not rows:
        raise UserError(f"{name}: has no rows")
    return rows


def seeds(seed: PerRow, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What the random numbers of each row are made from: a seed [B] int32, and the number of the row under it."""
    if isinstance(seed, int) and not 0 <= seed < 2**31:  # NumPy would have no number that large
        raise UserError(f"seed={seed}: must be in [0, 2**31)")
    given = whole_numbers("seed", seed)
    if given.ndim > 1 or (given.ndim and given.size != rows):
        raise UserError(f"seed: expected a number, or one for each of the {rows} texts")
    if ((given < 0) | (given >= 2**31)).any():
        raise UserError(f"seed={given.min() if (given < 0).any() else given.max()}: must be in [0, 2**31)")
    numbers = np.zeros(rows) if given.ndim else np.arange(rows)
    return np.broadcast_to(given, (rows,)).astype(np.int32), numbers.astype(np.int32)


def check_streams(known_BN: np.ndarray, streams: int) -> None:
    """Raises UserError if there are more streams than free places in any row."""
    free = int((known_BN == FREE).sum(axis=1).max())
    if streams < 1:
        raise UserError(f"streams={streams}: must be at least 1")
    if 0 < free < streams:
        raise UserError(f"streams={streams} exceeds the {free} positions left to generate: use fewer streams")


def check_ids(name: str, ids: np.ndarray, low: int, vocab_size: int) -> None:
    """Raises UserError if one of the ids is none of the vocabulary."""
    wrong = (ids < low) | (ids >= vocab_size)
    if wrong.any():
        raise UserError(f"{name}: id {ids[wrong][0]} is outside the vocabulary of {vocab_size}")


def whole_numbers(name: str, ids: Any) -> np.ndarray:
    """The ids as int64. Raises UserError if they are no whole numbers."""
    try:
        ids = np.asarray(ids)
    except ValueError as error:
        raise UserError(f"{name}: its rows differ in length") from error
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"{name}: expected token ids, whole numbers (lm.tokenizer.encode gives a text's), got {ids.dtype}"
        )
    return ids.astype(np.int64)

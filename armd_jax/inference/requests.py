"""What a user asks to be written: rows of known ids and of places to fill, checked."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from armd_jax.errors import UserError
from armd_jax.inference.draw import Draw
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
    numbers = {
        what: _per_row(what, value)
        for what, value in (("length", length), ("max_new_tokens", max_new_tokens), ("seed", seed))
        if value is not None
    }
    counts = {len(given), batch or 1, *(len(each) for each in numbers.values())} - {1}
    if len(counts) > 1:
        several = " and ".join(map(str, sorted(counts)))
        raise UserError(
            f"{several} texts were asked for: batch, and the rows of prompt, evidence_BN, length, max_new_tokens and"
            " seed, have to agree on one number"
        )
    rows = max(counts, default=1)
    if len(given) == 1:
        given = given * rows
    lengths = _lengths(max_length, name, given, numbers.get("length"), numbers.get("max_new_tokens"))
    known_BN = np.full((rows, max(lengths)), ABSENT, np.int64)
    for row, (ids, total) in enumerate(zip(given, lengths, strict=True)):
        known_BN[row, :total] = FREE
        known_BN[row, : len(ids)] = ids
    return known_BN


def seeds(seed: PerRow, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What the random numbers of each row are made from: a seed [B] int32, and the number of the row under it."""
    given = np.asarray(_per_row("seed", seed))
    if ((given < 0) | (given >= 2**31)).any():
        raise UserError(f"seed={given.min() if (given < 0).any() else given.max()}: must be in [0, 2**31)")
    numbers = np.arange(rows) if np.ndim(seed) == 0 else np.zeros(rows)
    return np.broadcast_to(given, (rows,)).astype(np.int32), numbers.astype(np.int32)


def check_types(how: Mapping[str, Any]) -> None:
    """Raises UserError if an argument of `LanguageModel.generate` is not of its type, or no number at all."""

    def real(value: Any) -> bool:
        return isinstance(value, int | float | np.number) and not isinstance(value, bool) and value == value

    def reals(value: Any) -> bool:
        return real(value) or np.ndim(value) == 1 and len(value) > 0 and all(map(real, value))

    def strings(value: Any) -> bool:
        return isinstance(value, str) or isinstance(value, Sequence) and all(isinstance(each, str) for each in value)

    def whole(value: Any) -> bool:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)

    for name, fits, what in (
        ("temperature", reals, "a number, or one for each text"),
        ("top_p", lambda value: value is None or reals(value), "a number, or one for each text"),
        ("top_k", lambda value: value is None or whole(value), "a whole number"),
        ("streams", lambda value: value == "auto" or whole(value), "a whole number, or 'auto'"),
        ("mode", lambda value: isinstance(value, str), "the name of a mode"),
        ("max_entropy", real, "a number of nats"),
        ("end_bias", real, "a number of nats"),
        ("stop", strings, "a text, or a list of texts"),
    ):
        if name in how and not fits(how[name]):
            raise UserError(f"{name}={how[name]!r:.40}: expected {what}")


def stream_starts(known_BN: np.ndarray, starts: Literal["gaps"] | Ids) -> list[np.ndarray]:
    """The free places of each row at which streams begin. Raises UserError if a place is not free.

    starts: "gaps": the first free place of each gap; or natural positions, for all texts or for each.
    """
    if isinstance(starts, int):
        raise UserError(f"starts={starts}: expected a list of positions, or one for each text")
    if isinstance(starts, str):
        if starts != "gaps":
            raise UserError(f'starts={starts!r}: expected positions, or "gaps"')
        free_BN = known_BN == FREE
        begins_BN = free_BN.copy()
        begins_BN[:, 1:] &= ~free_BN[:, :-1]
        return [np.flatnonzero(begins_N) for begins_N in begins_BN]
    rows = _rows("starts", starts, low=-(2**31), high=2**31)
    rows = rows * len(known_BN) if len(rows) == 1 else rows
    if len(rows) != len(known_BN):
        raise UserError(f"starts: {len(rows)} lists were given for {len(known_BN)} texts")
    for known_N, places in zip(known_BN, rows, strict=True):
        free = set(np.flatnonzero(known_N == FREE).tolist())
        if wrong := [place for place in places.tolist() if place not in free]:
            raise UserError(f"starts: position {wrong[0]} is no free position of its text")
    return rows


def check_rows(draw: Draw, rows: int) -> None:
    """Raises UserError if temperature or top_p has numbers for another number of texts."""
    for name, numbers in (("temperature", draw.temperature), ("top_p", draw.top_p)):
        if numbers is not None and numbers.ndim and len(numbers) != rows:
            raise UserError(f"{name}: {len(numbers)} numbers were given for {rows} texts")


def _lengths(
    max_length: int, name: str, given: list[np.ndarray], length: list[int] | None, max_new_tokens: list[int] | None
) -> list[int]:
    """The length of every row, at least that of its known ids. A list of numbers has one for all rows, or all."""
    rows = len(given)
    if max_new_tokens is not None:
        if length is not None or name == "evidence_BN":
            other = "length" if length is not None else "evidence_BN"
            raise UserError(f"max_new_tokens and {other}: give one of the two")
        if min(max_new_tokens) < 0:
            raise UserError(f"max_new_tokens={min(max_new_tokens)}: must be at least 0")
        new = max_new_tokens * (rows if len(max_new_tokens) == 1 else 1)
        lengths = [len(ids) + more for ids, more in zip(given, new, strict=True)]
        for row, total in enumerate(lengths):
            if total > max_length:
                raise UserError(
                    f"row {row}: a prompt of {len(given[row])} tokens and max_new_tokens={new[row]} are longer than"
                    f" {max_length}, the model's max_length"
                )
    elif length is None:
        lengths = [len(ids) if name == "evidence_BN" else max_length for ids in given]
    else:
        lengths = length * (rows if len(length) == 1 else 1)
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
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__") or getattr(ids, "ndim", 1) == 0:
        raise UserError(
            f"{name}: expected token ids, whole numbers (lm.tokenizer.encode gives a text's), got {ids!r:.40}"
        )
    several = any(isinstance(row, Sequence) or getattr(row, "ndim", 0) for row in ids)
    rows = [whole_numbers(name, row) for row in (ids if several else [ids])]
    for row in rows:
        if row.ndim != 1:
            raise UserError(f"{name}: expected ids [N], or a list of ids for each text, got a row of shape {row.shape}")
        check_ids(name, row, low, high)
    return rows


def _per_row(name: str, value: PerRow) -> list[int]:
    """A number for all texts, or one for each, as a list of one or of all. Raises UserError if it is neither."""
    numbers: Any = value.tolist() if hasattr(value, "tolist") else value
    numbers = list(numbers) if isinstance(numbers, Sequence) and not isinstance(numbers, str) else [numbers]
    if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise UserError(f"{name}={value!r:.40}: expected a whole number, or one for each text")
    return numbers


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

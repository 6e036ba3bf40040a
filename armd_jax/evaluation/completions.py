"""Texts that continue prompts or fill gaps, from a .jsonl file into another, which an interrupted command continues."""

import dataclasses
import json
import pathlib
import re
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from armd_jax import files
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.inference.language_model import Generation, LanguageModel
from armd_jax.inference.schedule import FREE

# A gap of so many tokens: [[5]], [[1 token]], [[8 tokens]].
_GAP = re.compile(r"\[\[(\d{1,6})(?: tokens?)?\]\]")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How texts are drawn; see `LanguageModel.generate`. It is kept with every text.

    max_new_tokens: tokens that continue a prompt; None: as many as fit into the model's max_length.
    """

    streams: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    stop_at_end: bool = True


@dataclasses.dataclass(frozen=True)
class Request:
    """One text that is asked for. row: the line's object. known: token ids, and FREE where to generate."""

    row: dict[str, Any]
    known: tuple[int, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was done. texts: written now. skipped: found in the file. tokens: drawn, in network calls of `seconds`."""

    texts: int
    skipped: int
    tokens: int
    seconds: float
    tokens_per_second: float


def complete(
    lm: LanguageModel,
    prompts: pathlib.Path,
    out: pathlib.Path,
    settings: Settings,
    batch: int,
    progress: bool,
) -> Summary:
    """Appends a row to `out` for every line of `prompts` that it has none of yet, in batches of similar lengths.

    A text depends on its line and on the settings, and not on the batch. Raises UserError if a line cannot be used, or
    if `out` holds texts that were drawn with other settings.
    """
    if lm.tokenizer is None:
        raise UserError("this model has no tokenizer: use lm.generate")
    if not lm.config.has_orders:
        raise UserError("--prompts: a denoiser (model.kind) writes one text at a time; give --prompt")
    if batch < 1:
        raise UserError(f"--batch={batch}: must be at least 1")
    requests = read(prompts, lm.tokenizer, settings, lm.config.max_length)
    files.drop_partial_line(out)
    done = _done(out, settings)
    waiting = [request for request in requests if json.dumps(request.row["id"]) not in done]
    # The longest come first: if memory does not suffice, that shows at once.
    waiting.sort(key=lambda request: len(request.known), reverse=True)
    tokens = sum(request.known.count(FREE) for request in waiting)
    drawn, seconds = 0, 0.0
    with tqdm(desc="sampling", total=tokens, unit="token", unit_scale=True, disable=not progress, leave=False) as bar:
        for start in range(0, len(waiting), batch):
            chosen = waiting[start : start + batch]
            began = time.perf_counter()
            made = lm.generate(
                streams=settings.streams,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                evidence_BN=[request.known for request in chosen],
                seed=[request.seed for request in chosen],
                stop_at_end=settings.stop_at_end,
            )
            seconds += time.perf_counter() - began
            drawn += int((made.call_BN > 0).sum())
            rows = [_row(lm.tokenizer, request, made, at, settings) for at, request in enumerate(chosen)]
            files.append(out, "".join(json.dumps(row) + "\n" for row in rows))
            bar.update(sum(request.known.count(FREE) for request in chosen))
    return Summary(len(waiting), len(requests) - len(waiting), drawn, seconds, drawn / seconds if seconds else 0.0)


def read(file: pathlib.Path, tokenizer: Tokenizer, settings: Settings, max_length: int) -> list[Request]:
    """The lines of a file of prompts. Raises UserError if one cannot be used, or two have the same id.

    A line is an object with `prompt`, a text to continue, and possibly `suffix`, a text to end with, or with `text`,
    which has gaps such as `[[8 tokens]]`. It may have an `id` (by default the number of the line), `max_new_tokens` and
    `seed` (by default that of the settings plus the number of the line). Whatever else it has is passed on.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    requests: list[Request] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _checked(json.loads(line), number)
            known = _known(row, tokenizer, settings.max_new_tokens, max_length)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file}:{number}: is not a JSON object: {error}") from error
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from error
        before = places.setdefault(json.dumps(row["id"]), number)
        if before != number:
            raise UserError(f"{file}:{number}: has the id {row['id']!r} of line {before}; ids have to differ")
        requests.append(Request(row, known, row.get("seed", (settings.seed + number - 1) % 2**31)))
    if not requests:
        raise UserError(f"--prompts={file}: has no prompts")
    return requests


def _checked(row: Any, number: int) -> dict[str, Any]:
    """The object of a line, with an id. Raises UserError if a field has a wrong type."""
    if not isinstance(row, dict):
        raise UserError(f'expected an object such as {{"prompt": "…"}}, got {type(row).__name__}')
    row = {"id": number} | row
    if ("prompt" in row) == ("text" in row):
        raise UserError("needs either prompt, a text to continue, or text, which has gaps such as [[8 tokens]]")
    if "text" in row and {"suffix", "max_new_tokens"} & set(row):
        raise UserError("suffix and max_new_tokens belong to prompt; a text says itself where its gaps are")
    for name, kinds, what in (
        ("id", (str, int), "a text or a whole number"),
        ("prompt", (str,), "a text"),
        ("suffix", (str,), "a text"),
        ("text", (str,), "a text"),
        ("max_new_tokens", (int,), "a whole number"),
        ("seed", (int,), "a whole number"),
    ):
        if name in row and (not isinstance(row[name], kinds) or isinstance(row[name], bool)):
            raise UserError(f"{name}={row[name]!r}: expected {what}")
    for name in ("max_new_tokens", "seed"):
        if name in row and not 0 <= row[name] < 2**31:
            raise UserError(f"{name}={row[name]}: must be in [0, 2**31)")
    return row


def _known(row: dict[str, Any], tokenizer: Tokenizer, max_new_tokens: int | None, max_length: int) -> tuple[int, ...]:
    """The ids of a line's text, and FREE in its gaps."""
    if "text" in row:
        known = with_gaps(row["text"], tokenizer)
    else:
        before, after = tokenizer.encode(row["prompt"]), tokenizer.encode(row.get("suffix", ""))
        room = max_length - len(before) - len(after)
        more = row.get("max_new_tokens", max_new_tokens)
        known = [*before, *[FREE] * (max(room, 0) if more is None else more), *after]
    if len(known) > max_length:
        raise UserError(f"its {len(known)} tokens are more than {max_length}, the model's max_length")
    if FREE not in known:
        raise UserError(f"leaves nothing to generate within {max_length} tokens, the model's max_length")
    return tuple(known)


def with_gaps(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text with gaps such as `[[5]]` or `[[8 tokens]]`, and FREE for each token of a gap."""
    known: list[int] = []
    for number, part in enumerate(_GAP.split(text)):
        known += [FREE] * int(part) if number % 2 else tokenizer.encode(part)
    return known


def _done(out: pathlib.Path, settings: Settings) -> set[str]:
    """The ids of the rows that a file has. Raises UserError if they were drawn with other settings."""
    done = set()
    for number, row in enumerate(files.read_json_lines(out), start=1):
        if "id" not in row or row.get("settings") != dataclasses.asdict(settings):
            raise UserError(
                f"--out={out}: line {number} is no text that was drawn with these settings; name another file"
            )
        done.add(json.dumps(row["id"]))
    return done


def _row(tokenizer: Tokenizer, request: Request, made: Generation, at: int, settings: Settings) -> dict[str, Any]:
    """The line of a finished text: what was asked for, the text, and what was written into each gap."""
    assert made.log_prob_BN is not None
    end = int(made.end_B[at])
    tokens, length = made.tokens_BN[at], len(request.known)
    free = np.asarray(request.known) == FREE
    drawn = made.call_BN[at, :length] > 0
    inside = np.arange(length) < end
    edges = np.flatnonzero(np.diff(free.astype(int), prepend=0, append=0))
    gaps = [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return request.row | {
        "text": tokenizer.decode(tokens[:end].tolist()),
        "filled": [tokenizer.decode([int(tokens[place]) for place in gap if place < end]) for gap in gaps],
        "ended": end < length,
        "num_tokens": int((drawn & inside).sum()),
        "num_cut": int((drawn & ~inside).sum()),
        "log_prob": float(made.log_prob_BN[at, :length][free & inside].sum()),
        "settings": dataclasses.asdict(settings),
    }


def as_text(summary: Summary, out: pathlib.Path) -> str:
    """The summary as text for a terminal."""
    skipped = f"; {summary.skipped:,} were there" if summary.skipped else ""
    speed = f"{summary.tokens:,} tokens, {summary.tokens_per_second:,.0f} per second"
    return f"{out}: {summary.texts:,} texts written{skipped} ({speed})"

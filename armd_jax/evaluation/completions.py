"""Texts that continue prompts or fill gaps, from a .jsonl file into another, which an interrupted command continues."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from armd_jax import files
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError, shown
from armd_jax.inference import generation
from armd_jax.inference.generation import Generation
from armd_jax.inference.language_model import MAX_ENTROPY, LanguageModel
from armd_jax.inference.schedule import FREE
from armd_jax.names import DecodingMode

# A gap of so many tokens: [[5]], [[1 token]], [[8 tokens]].
_GAP = re.compile(r"\[\[([0-9]{1,1000})(?: tokens?)?\]\]")


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
    mode: DecodingMode = "strided"
    max_entropy: float = MAX_ENTROPY
    end_bias: float = 0.0
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """One text that is asked for.

    row: the line's object. known: token ids, and FREE where to generate. gaps: where each gap begins and ends.
    """

    row: dict[str, Any]
    known: tuple[int, ...]
    gaps: tuple[tuple[int, int], ...]
    seed: int

    @property
    def digest(self) -> str:
        """What tells this text from others of the same settings."""
        return hashlib.sha256(json.dumps([self.known, self.gaps, self.seed]).encode()).hexdigest()[:16]


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
    of_all = _as_json(dataclasses.asdict(settings)) | {"model": fingerprint(lm)}
    done = _done(out, of_all, {_key(request.row): request.digest for request in requests})
    files.drop_partial_line(out)
    waiting = [request for request in requests if _key(request.row) not in done]
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
                mode=settings.mode,
                max_entropy=settings.max_entropy,
                end_bias=settings.end_bias,
                stop=settings.stop,
            )
            seconds += time.perf_counter() - began
            drawn += int((made.call_BN > 0).sum())
            texts = lm.texts(made)
            rows = [_row(lm.tokenizer, request, made, at, texts[at], of_all) for at, request in enumerate(chosen)]
            files.append(out, "".join(json.dumps(row) + "\n" for row in rows))
            bar.update(sum(request.known.count(FREE) for request in chosen))
    return Summary(len(waiting), len(requests) - len(waiting), drawn, seconds, drawn / seconds if seconds else 0.0)


def read(file: pathlib.Path, tokenizer: Tokenizer, settings: Settings, max_length: int) -> list[Request]:
    """The lines of a file of prompts. Raises UserError if one cannot be used, or two have the same id.

    A line is an object with `prompt`, a text to continue, and possibly `suffix`, a text to end with, or with `text`,
    which has gaps such as `[[8 tokens]]`. It may have an `id` (by default the number of the line), with a prompt
    `max_new_tokens`, and a `seed` (by default made from that of the settings and the number of the line). Whatever else
    it has is passed on.
    """
    try:
        # Not `splitlines`: a text may hold other separators of lines than this one.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    requests: list[Request] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _checked(json.loads(line), number)
            known, gaps = _known(row, tokenizer, settings.max_new_tokens, max_length)
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from error
        except (ValueError, RecursionError) as error:  # not only JSONDecodeError: a number may have too many digits
            raise UserError(f"{file}:{number}: is not a JSON object: {error}") from error
        before = places.setdefault(_key(row), number)
        if before != number:
            raise UserError(f"{file}:{number}: has the id {shown(row['id'])} of line {before}; ids have to differ")
        drawn = hashlib.sha256(f"{settings.seed} {number}".encode()).digest()
        requests.append(Request(row, known, gaps, row.get("seed", int.from_bytes(drawn[:4], "big") >> 1)))
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
        value = row.get(name)
        if name in row and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise UserError(f"{name}={shown(value)}: expected {what}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise UserError(f"{name}={shown(value)}: is not UTF-8 text")
    for name in ("max_new_tokens", "seed"):
        if name in row and not 0 <= row[name] < 2**31:
            raise UserError(f"{name}={row[name]}: must be in [0, 2**31)")
    return row


def _known(
    row: dict[str, Any], tokenizer: Tokenizer, max_new_tokens: int | None, max_length: int
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The ids of a line's text with FREE in its gaps, and where each gap begins and ends."""
    parts: list[list[int] | int]
    if "text" in row:
        parts = with_gaps(row["text"], tokenizer)
    else:
        before, after = tokenizer.encode(row["prompt"]), tokenizer.encode(row.get("suffix", ""))
        more = row.get("max_new_tokens", max_new_tokens)
        parts = [before, max(max_length - len(before) - len(after), 0) if more is None else more, after]
    # Summed up before a list is made: a gap may claim to be larger than memory.
    length = sum(part if isinstance(part, int) else len(part) for part in parts)
    if length > max_length:
        raise UserError(f"its {length} tokens are more than {max_length}, the model's max_length")
    known: list[int] = []
    gaps = []
    for part in parts:
        if isinstance(part, int):
            gaps.append((len(known), len(known) + part))
        known += [FREE] * part if isinstance(part, int) else part
    if FREE not in known:
        raise UserError(f"leaves nothing to generate within {max_length} tokens, the model's max_length")
    return tuple(known), tuple(gaps)


def with_gaps(text: str, tokenizer: Tokenizer) -> list[list[int] | int]:
    """The ids of the parts of a text, and between them the sizes of its gaps, such as `[[5]]` or `[[8 tokens]]`."""
    return [int(part) if number % 2 else tokenizer.encode(part) for number, part in enumerate(_GAP.split(text))]


def _key(row: dict[str, Any]) -> str:
    """The id of a line in a form in which 1 is not "1"."""
    return json.dumps(row["id"])


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are read again from a file: a tuple is a list there, and infinity is no number."""
    finite = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
    }
    plain: dict[str, Any] = json.loads(json.dumps(finite))
    return plain


def fingerprint(lm: LanguageModel) -> str:
    """A digest of the first numbers of every parameter, by which the weights of two models differ."""
    first = [np.asarray(leaf.ravel()[:16]).tobytes() for leaf in jax.tree.leaves(lm.params)]
    return hashlib.sha256(b"".join(first)).hexdigest()[:16]


def _done(out: pathlib.Path, of_all: dict[str, Any], digests: dict[str, str]) -> set[str]:
    """The ids of the rows that a file has.

    of_all: what all rows have in common. digests: of the requests, by id. Raises UserError if the file holds anything
    else than texts of these requests that were drawn in this way.
    """
    if not out.exists():
        return set()
    content = out.read_bytes()
    # A last line without its end was cut short by a kill. It is ours if lines of ours stand before it.
    rows = files.read_json_lines(out)[: content.count(b"\n")]
    done = set()
    for number in range(1, max(content.count(b"\n"), 1 if content else 0) + 1):
        row = rows[number - 1] if number <= len(rows) else {}
        if "id" not in row or row.get("settings") != of_all or digests.get(_key(row)) != row.get("request"):
            raise UserError(
                f"--out={out}: line {number} is no text of these prompts that this model drew with these settings; name"
                " another file"
            )
        done.add(_key(row))
    return done


def _row(
    tokenizer: Tokenizer, request: Request, made: Generation, at: int, text: str, of_all: dict[str, Any]
) -> dict[str, Any]:
    """The line of a finished text: what was asked for, the text, and what was written into each gap."""
    assert made.log_prob_BN is not None
    end, tokens, length = int(made.end_B[at]), made.tokens_BN[at], len(request.known)
    drawn = made.call_BN[at, :length] > 0
    inside = drawn & (np.arange(length) < end)
    filled, stopped = [], False
    for start, stop in request.gaps:
        part = tokenizer.decode(tokens[start : min(stop, end)].tolist())
        at_stop = generation.cut(part, made.stop)
        stopped |= at_stop is not None
        filled.append(part[:at_stop])
    return request.row | {
        "text": text,
        "filled": filled,
        "ended": end < length or stopped,
        "num_tokens": int(inside.sum()),
        "num_cut": int((drawn & ~inside).sum()),
        "log_prob": float(made.log_prob_BN[at, :length][inside].sum()),
        "request": request.digest,
        "settings": of_all,
    }


def as_text(summary: Summary, out: pathlib.Path) -> str:
    """The summary as text for a terminal."""
    skipped = f"; {summary.skipped:,} were there" if summary.skipped else ""
    speed = f"{summary.tokens:,} tokens, {summary.tokens_per_second:,.0f} per second"
    return f"{out}: {summary.texts:,} texts written{skipped} ({speed})"

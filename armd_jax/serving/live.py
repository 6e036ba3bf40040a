"""`/api/generate`: a text for the page, with what every network call has written."""

import time
from collections.abc import AsyncIterator
from typing import Any, assert_never

import numpy as np

from armd_jax.data.tokenizers import Tokenizer
from armd_jax.inference import schedule
from armd_jax.inference.schedule import FREE
from armd_jax.serving.batching import Asked, Progress, Text


async def lines(tokenizer: Tokenizer, text: Text, changes: AsyncIterator[None]) -> AsyncIterator[dict[str, Any]]:
    """One object at the beginning, one for every call, and one at the end.

    The first has `length`, `given` (place and text of each known token), `seed` and `most_calls`. One of a call has
    `call`, `seconds` since the request came, and `tokens`: place, text and probability of each. The last has `text`,
    `end` (places from there on are no part of it), `calls`, `tokens`, `seconds` and `finish_reason`.
    """
    asked = text.asked
    told = -1  # calls
    async for _ in changes:
        progress = text.progress
        if progress is None:
            continue
        if told < 0:
            given = [[place, tokenizer.token_text(token)] for place, token in enumerate(asked.known) if token != FREE]
            most, told = _most_calls(asked), 0
            yield {"length": len(asked.known), "given": given, "seed": asked.seed, "most_calls": most}
        seconds = time.perf_counter() - text.arrived
        for call in range(told + 1, progress.num_calls + 1):
            yield {"call": call, "seconds": seconds, "tokens": _made(tokenizer, progress, call)}
        told = progress.num_calls
        if progress.finished:
            whole = tokenizer.decode(progress.tokens_N[: progress.end].tolist())
            ended = progress.end < len(asked.known)
            yield {
                "text": whole,
                "end": progress.end,
                "calls": progress.num_calls,
                "tokens": int((progress.call_N > 0).sum()),
                "seconds": seconds,
                "finish_reason": "stop" if ended else "length",
            }
            return


def _most_calls(asked: Asked) -> int:
    """How many calls a text takes at most, from which the page makes its colours."""
    free = asked.known.count(FREE)
    match asked.mode:
        case "strided":
            return schedule.num_calls(free, asked.streams)
        case "lossless":
            return free
        case "confident":
            return 2 * free  # a step takes two
        case _:
            assert_never(asked.mode)


def _made(tokenizer: Tokenizer, progress: Progress, call: int) -> list[list[Any]]:
    """Place, text and probability of the tokens of one call."""
    places = np.flatnonzero(progress.call_N == call).tolist()
    tokens_N, log_prob_N = progress.tokens_N, progress.log_prob_N
    return [[at, tokenizer.token_text(int(tokens_N[at])), float(np.exp(log_prob_N[at]))] for at in places]

"""Compiling, before the first request comes, the programs that most requests need."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator

from tqdm import tqdm

from armd_jax.inference.language_model import LanguageModel
from armd_jax.inference.schedule import FREE, SHORTEST
from armd_jax.serving.batching import Asked, Batcher


def usual(lm: LanguageModel, max_batch: int) -> list[list[Asked]]:
    """A batch for each of these programs.

    For every capacity that a context may have: one text and a full batch, both drawn from left to right; one text that
    takes the likeliest token; and one text in the number of streams that the page begins with.
    """
    one = Asked(known=(), seed=0)
    batches = [[one], [one] * max_batch, [dataclasses.replace(one, temperature=0.0)]]
    batches.append([dataclasses.replace(one, streams=4)])
    return [
        [dataclasses.replace(each, known=(0, *[FREE] * (length - 1))) for each in batch]
        for length in _lengths(lm.config.max_length)
        for batch in batches
    ]


def compile_usual(lm: LanguageModel, batcher: Batcher, max_batch: int, progress: bool) -> None:
    """Makes the first call of each of them. Some are compiled at the same time, one on each core."""
    batches = usual(lm, max_batch)
    with (
        concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as threads,
        tqdm(desc="compiling", total=len(batches), unit="program", disable=not progress, leave=False) as bar,
    ):
        for _ in threads.map(lambda batch: next(batcher.steps(batch)), batches):
            bar.update()


def _lengths(longest: int) -> Iterator[int]:
    """A length for every capacity: powers of two, and the longest that the model takes."""
    length = SHORTEST
    while length < longest:
        yield length
        length *= 2
    yield longest

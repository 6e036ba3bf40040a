"""Batches of prepared rows: a pure function of (seed, step) for training, every token exactly once for evaluation."""

import sys
from collections.abc import Iterator

import grain
import numpy as np
from grain.experimental import index_shuffle

from armd_jax.data.packing import PreparedData
from armd_jax.data.shards import PackedRows

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4
# `index_shuffle` permutes at least 2^16 places and walks on until it is back among those that exist. Up to here, that
# takes so long (1 ms an index over 20 rows) that a whole epoch is permuted instead.
FEW_ROWS = 1024


def batch_indices(step: int, batch_size: int, seed: int, num_rows: int) -> np.ndarray:
    """int64[batch_size]: the rows of training step `step`, over all processes.

    Epochs follow one another without a gap, so that a batch may hold the end of one and the start of the next. Every
    epoch is another permutation of all rows.
    """
    places = step * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(places, num_rows)
    if num_rows <= FEW_ROWS:
        first = int(epochs[0])  # the epochs of a batch follow one another
        permutations = np.stack([_permutation(seed, epoch, num_rows) for epoch in range(first, int(epochs[-1]) + 1)])
        return permutations[epochs - first, places]
    seeds = {epoch: int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]) for epoch in map(int, set(epochs))}
    return np.array(
        [
            index_shuffle(int(place), max_index=num_rows - 1, seed=seeds[int(epoch)], rounds=4)
            for epoch, place in zip(epochs, places, strict=True)
        ],
        np.int64,
    )


def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """int64[num_rows]: the rows of an epoch, sorted by a random number each. The same in every version of NumPy."""
    return np.argsort(np.random.SeedSequence([seed, epoch]).generate_state(num_rows, np.uint64), kind="stable")


class _BatchSource:
    """A Grain data source whose item k is the whole batch of step k; faster than letting Grain gather single rows."""

    def __init__(
        self, rows: PackedRows, num_rows: int, batch_size: int, seed: int, start_step: int, part: np.ndarray | None
    ) -> None:
        self._rows, self._num_rows, self._batch_size = rows, num_rows, batch_size
        self._seed, self._start_step = seed, start_step
        self._part = slice(None) if part is None else part

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        indices = batch_indices(self._start_step + index, self._batch_size, self._seed, self._num_rows)
        return np.stack([self._rows[row] for row in indices[self._part]])


class TrainBatches:
    """An endless iterator of (step, tokens_BN), and a context manager. `close` ends the threads that read ahead."""

    def __init__(self, source: _BatchSource, start_step: int) -> None:
        options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        self._items = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        self._step = start_step

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> tuple[int, np.ndarray]:
        tokens_BN = next(self._items)
        self._step += 1
        return self._step - 1, tokens_BN

    def close(self) -> None:
        self._items.close()

    def __enter__(self) -> "TrainBatches":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def train_batches(
    prepared: PreparedData,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    part: np.ndarray | None = None,
) -> TrainBatches:
    """Training batches from `start_step` on: (step, tokens int32[batch_size, N]), read ahead.

    Only full rows are used, because a partly filled last row would train on padding.

    part: int[rows], if given: which rows of the batch are read and returned. Every process reads its own part of the
      same global batch.
    """
    num_rows = prepared.counts("train").tokens // prepared.length
    return TrainBatches(_BatchSource(prepared.rows("train"), num_rows, batch_size, seed, start_step, part), start_step)


def eval_batches(
    prepared: PreparedData, split: str, batch_size: int, max_batches: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row of `split` once, in order: (tokens int32[batch_size, N], valid bool[batch_size, N]).

    Every token of the split is valid exactly once. The padding of the last row and the rows that fill up the last batch
    hold end-of-text and are not valid.

    max_batches: return at most this many batches. None: all.
    Raises UserError if there is no such split.
    """
    counts, rows = prepared.counts(split), prepared.rows(split)
    starts = range(0, counts.rows, batch_size)
    return (_eval_batch(prepared, rows, start, batch_size, counts.tokens) for start in starts[:max_batches])


def _eval_batch(
    prepared: PreparedData, rows: PackedRows, start: int, batch_size: int, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    tokens_BN = np.full((batch_size, prepared.length), prepared.tokenizer.end_of_text, np.int32)
    for row in range(start, min(start + batch_size, len(rows))):
        tokens_BN[row - start] = rows[row]
    places_BN = start * prepared.length + np.arange(tokens_BN.size).reshape(tokens_BN.shape)
    return tokens_BN, places_BN < num_tokens

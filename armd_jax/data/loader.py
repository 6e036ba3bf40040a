"""Batches of prepared rows: a pure function of (seed, step) for training, every token exactly once for evaluation."""

import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

from armd_jax.data.interleaving import Interleaving
from armd_jax.data.mixture import Data, shares_of, sources_of
from armd_jax.data.shards import PackedRows

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4
# `index_shuffle` permutes at least 2^16 places and walks on until it is back among those that exist. Up to here, that
# takes so long (1 ms an index over 20 rows) that a whole epoch is permuted instead.
FEW_ROWS = 1024


def batch_rows(data: Data, step: int, batch_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of training step `step` come from, over all processes: the number of the source, and its row.

    Both are int64[batch_size]. Every source has epochs of its own. Only full rows are used, because a partly filled
    last row would train on padding.
    """
    numbers, places = Interleaving(shares_of(data))(step * batch_size + np.arange(batch_size))
    rows = np.empty_like(places)
    for number, source in enumerate(sources_of(data)):
        here = numbers == number
        if here.any():
            rows[here] = rows_at(places[here], seed, number, source.counts("train").tokens // source.length)
    return numbers, rows


def rows_at(places: np.ndarray, seed: int, source: int, num_rows: int) -> np.ndarray:
    """int64[places]: the rows at these ascending places of a source, which is known by its number.

    Epochs follow one another without a gap, so that a batch may hold the end of one and the start of the next. Every
    epoch is another permutation of all rows.

    The first source has the number 0 and with it the permutations of a source that is the only one: zeros at the end of
    what a `SeedSequence` is made of change nothing.
    """
    epochs, places = np.divmod(places, num_rows)
    if num_rows <= FEW_ROWS:
        first = int(epochs[0])  # the epochs of a batch follow one another
        every = range(first, int(epochs[-1]) + 1)
        permutations = np.stack([_permutation([seed, epoch, source], num_rows) for epoch in every])
        return permutations[epochs - first, places]
    seeds = {
        epoch: int(np.random.SeedSequence([seed, epoch, source]).generate_state(1)[0])
        for epoch in map(int, set(epochs))
    }
    return np.array(
        [
            index_shuffle(int(place), max_index=num_rows - 1, seed=seeds[int(epoch)], rounds=4)
            for epoch, place in zip(epochs, places, strict=True)
        ],
        np.int64,
    )


def _permutation(entropy: list[int], num_rows: int) -> np.ndarray:
    """int64[num_rows]: the rows of an epoch, sorted by a random number each. The same in every version of NumPy."""
    return np.argsort(np.random.SeedSequence(entropy).generate_state(num_rows, np.uint64), kind="stable")


class _BatchSource:
    """A Grain data source whose item k is the whole batch of step k; faster than letting Grain gather single rows."""

    def __init__(self, data: Data, batch_size: int, seed: int, start_step: int, part: np.ndarray | None) -> None:
        self._data, self._batch_size, self._seed, self._start_step = data, batch_size, seed, start_step
        self._rows = [source.rows("train") for source in sources_of(data)]
        self._part = slice(None) if part is None else part

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        numbers, rows = batch_rows(self._data, self._start_step + index, self._batch_size, self._seed)
        chosen = zip(numbers[self._part], rows[self._part], strict=True)
        return np.stack([self._rows[number][row] for number, row in chosen])


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
    data: Data,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    part: np.ndarray | None = None,
) -> TrainBatches:
    """Training batches from `start_step` on: (step, tokens int32[batch_size, N]), read ahead.

    part: int[rows], if given: which rows of the batch are read and returned. Every process reads its own part of the
      same global batch.
    """
    return TrainBatches(_BatchSource(data, batch_size, seed, start_step, part), start_step)


def eval_batches(
    data: Data, split: str, batch_size: int, max_batches: int | None = None, chosen: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row of `split` once, in order: (tokens int32[batch_size, N], valid bool[batch_size, N]).

    Every token of the split is valid exactly once. The padding of the last row and the rows that fill up the last batch
    hold end-of-text and are not valid. Of a mixture, one source follows another, and each has a last row of its own.

    max_batches: return at most this many batches. None: all.
    chosen: the numbers of the rows that are returned, in this order. None: all.
    Raises UserError if there is no such split.
    """
    wanted = range(data.counts(split).rows) if chosen is None else chosen
    starts = range(0, len(wanted), batch_size)
    sources = [(source.rows(split), source.counts(split).tokens) for source in sources_of(data, split)]
    batches = (wanted[start : start + batch_size] for start in starts[:max_batches])
    return (_eval_batch(data, sources, numbers, batch_size) for numbers in batches)


def _eval_batch(
    data: Data, sources: Sequence[tuple[PackedRows, int]], numbers: Sequence[int], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of these numbers. sources: the rows of each, and how many tokens they hold."""
    tokens_BN = np.full((batch_size, data.length), data.tokenizer.end_of_text, np.int32)
    valid_BN = np.zeros(tokens_BN.shape, bool)
    ends = np.cumsum([len(rows) for rows, _ in sources])
    for place, number in enumerate(numbers):
        source = int(np.searchsorted(ends, number, side="right"))
        rows, num_tokens = sources[source]
        row = number - int(ends[source]) + len(rows)
        tokens_BN[place] = rows[row]
        valid_BN[place] = row * data.length + np.arange(data.length) < num_tokens
    return tokens_BN, valid_BN

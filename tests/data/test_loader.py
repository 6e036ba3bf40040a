"""Batches: a pure function of (seed, step) in training; every token exactly once in evaluation."""

import threading
import time

import numpy as np
import pytest

from armd_jax.data import loader, packing
from armd_jax.data.loader import eval_batches, rows_at, train_batches
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

LENGTH, BATCH = 16, 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Rows whose tokens differ from row to row; no split's last row is full."""
    folder = tmp_path_factory.mktemp("loader")
    (folder / "text.txt").write_text("".join(f"{index:05d}\n" for index in range(150)))
    config = DataConfig(path=str(folder), tokenizer="bytes", valid_fraction=0.2, test_fraction=0.02, shard_rows=9)
    return packing.prepare(config, LENGTH, folder / "cache", progress=False)


def take(prepared, steps, **arguments):
    with train_batches(prepared, **({"batch_size": BATCH, "seed": 3, "start_step": 0} | arguments)) as batches:
        return [next(batches) for _ in range(steps)]


def batch_indices(step, batch_size, seed, num_rows):
    return rows_at(step * batch_size + np.arange(batch_size), seed, 0, num_rows)


def test_batches_depend_on_seed_and_step_only(prepared):
    first = take(prepared, 30)
    assert [step for step, _ in first] == list(range(30))
    assert all(tokens.shape == (BATCH, LENGTH) and tokens.dtype == np.int32 for _, tokens in first)
    for start in (1, 13, 29):  # the first epoch ends between these
        ((step, tokens),) = take(prepared, 1, start_step=start)
        assert step == start and (tokens == first[start][1]).all()
    assert any((a != b).any() for (_, a), (_, b) in zip(first, take(prepared, 30, seed=4), strict=True))


def test_processes_share_the_batch_of_one(prepared):
    whole = take(prepared, 5, start_step=7)
    for part in ([0, 1, 2], [3, 4, 5], [1, 4]):
        for (step, tokens), found in zip(whole, take(prepared, 5, start_step=7, part=np.array(part)), strict=True):
            assert found[0] == step and (found[1] == tokens[part]).all()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 64, loader.FEW_ROWS, loader.FEW_ROWS + 1])
def test_every_epoch_is_a_permutation_of_its_own(num_rows):
    batch_size = 7
    steps = -(-4 * num_rows // batch_size)
    indices = np.concatenate([batch_indices(step, batch_size, 11, num_rows) for step in range(steps)])
    epochs = indices[: 4 * num_rows].reshape(4, num_rows)
    assert (np.sort(epochs) == np.arange(num_rows)).all()
    if num_rows >= 64:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert abs(np.corrcoef(epochs[0], np.arange(num_rows))[0, 1]) < 0.5


def test_few_rows_cost_little():
    """A batch of 512 over 20 rows spans 26 epochs, and takes no noticeable part of a step."""
    times = []
    for step in range(3):
        start = time.perf_counter()
        indices = batch_indices(step, 512, 3, 20)
        times.append(time.perf_counter() - start)
        assert indices.shape == (512,) and indices.dtype == np.int64
    assert min(times) < 0.05


def test_steps_far_out_are_reached_at_once(prepared):
    assert (batch_indices(10**9, 512, 2**31 - 1, 9_000_000) < 9_000_000).all()
    ((step, _),) = take(prepared, 1, start_step=10**9)
    assert step == 10**9


def test_training_sees_every_full_row_and_no_padding(prepared):
    counts, rows = prepared.counts("train"), prepared.rows("train")
    num_full = counts.tokens // LENGTH
    assert counts.rows == num_full + 1
    seen = np.concatenate([tokens for _, tokens in take(prepared, num_full, batch_size=1)])
    expected = np.stack([rows[index] for index in range(num_full)])
    assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))


def test_close_ends_the_reading_threads(prepared):
    before = set(threading.enumerate())
    batches = train_batches(prepared, BATCH, 0, 0)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_evaluation_sees_every_token_once(prepared, split, batch_size):
    counts, rows = prepared.counts(split), prepared.rows(split)
    assert counts.tokens % LENGTH
    batches = list(eval_batches(prepared, split, batch_size))
    assert len(batches) == -(-counts.rows // batch_size)
    for tokens, valid in batches:
        assert tokens.shape == valid.shape == (batch_size, LENGTH)
        assert tokens.dtype == np.int32 and valid.dtype == bool
        assert (tokens[~valid] == prepared.tokenizer.end_of_text).all()
    expected = np.concatenate([rows[index] for index in range(len(rows))])[: counts.tokens]
    assert (np.concatenate([tokens[valid] for tokens, valid in batches]) == expected).all()


def test_evaluation_may_see_chosen_rows(prepared):
    """Rows come by their numbers, in any order and across batches, the partly filled last one as it is."""
    rows, valid = (np.concatenate(parts) for parts in zip(*eval_batches(prepared, "test", 1), strict=True))
    last = len(rows) - 1
    batches = list(eval_batches(prepared, "test", 2, None, [last, 0, 1]))
    assert [tokens.shape for tokens, _ in batches] == [(2, LENGTH)] * 2
    assert (np.concatenate([tokens for tokens, _ in batches])[:3] == rows[[last, 0, 1]]).all()
    assert (np.concatenate([seen for _, seen in batches])[:3] == valid[[last, 0, 1]]).all()
    assert not batches[1][1][1].any()


def test_evaluation_may_stop_early_and_knows_its_splits(prepared):
    whole = list(eval_batches(prepared, "valid", 3))
    for batch, expected in zip(eval_batches(prepared, "valid", 3, max_batches=2), whole[:2], strict=True):
        assert all((a == b).all() for a, b in zip(batch, expected, strict=True))
    with pytest.raises(UserError, match="no 'dev' split"):
        eval_batches(prepared, "dev", 3)

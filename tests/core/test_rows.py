"""Neighbours: the tokens beside a target, if an earlier block holds them, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import block_mask, order
from armd_jax.core.rows import START, UNSEEN, rows_for_training


def _neighbours(drawn: order.Order) -> tuple[np.ndarray, np.ndarray]:
    """Left and right neighbours of the first row's targets at natural positions; the token at position p is 10 + p."""
    tokens_BN = jnp.broadcast_to(10 + jnp.arange(drawn.shape[1], dtype=jnp.int32), drawn.shape)
    rows = rows_for_training(tokens_BN, drawn, block_mask.build(drawn))
    positions_N = np.asarray(drawn.positions_BN[0])
    found = []
    for ids_BG in (rows.g_left_BG, rows.g_right_BG):
        natural = np.zeros(len(positions_N), int)
        natural[positions_N] = np.asarray(ids_BG[0])
        found.append(natural)
    return found[0], found[1]


def test_natural_order():
    """Every token sees the one before it and never the one after it."""
    left, right = _neighbours(order.left_to_right(1, 5))
    assert left.tolist() == [START, 10, 11, 12, 13]
    assert right.tolist() == [UNSEEN] * 5


def test_strided_order():
    """A stream's token sees the one before it in the same stream. The end of a stream sees the head of the next."""
    left, right = _neighbours(order.strided(1, 6, 2))  # streams 0 1 2 and 3 4 5; position 0 and 3 come first
    assert left.tolist() == [START, 10, 11, UNSEEN, 13, 14]
    assert right.tolist() == [UNSEEN, UNSEEN, 13, UNSEEN, UNSEEN, UNSEEN]


def test_a_gap_sees_both_sides():
    """With evidence on both sides of a gap, its ends see their neighbours, and evidence sees what precedes it."""
    known = np.asarray([True, True, False, False, True])
    left, right = _neighbours(order.left_to_right(1, 5, known))
    assert left.tolist() == [START, 10, 11, 12, UNSEEN]
    assert right.tolist() == [UNSEEN, UNSEEN, UNSEEN, 14, UNSEEN]


@pytest.mark.parametrize("seed", range(3))
def test_random_blocks_by_their_definition(seed):
    """For random blocks, exactly the neighbours in earlier blocks are seen."""
    rng = np.random.default_rng(seed)
    positions, length = rng.permutation(12), 12
    blocks = [[int(p) for p in part] for part in np.split(positions, np.sort(rng.choice(np.arange(1, 12), 4, False)))]
    number = {p: index for index, block in enumerate(blocks) for p in block}
    left, right = _neighbours(order.from_blocks(blocks))
    for p in range(length):
        for found, beside in ((left[p], p - 1), (right[p], p + 1)):
            seen = number.get(beside, length) < number[p]
            assert found == (START if beside < 0 else 10 + beside if seen else UNSEEN)

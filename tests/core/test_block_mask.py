"""Prefix lengths against the definition of the two relations, and their pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armd_jax.core import block_mask, order
from armd_jax.core.rows import START, rows_for_training

pytestmark = pytest.mark.usefixtures("quick_compilation")


@st.composite
def partitions(draw) -> list[list[int]]:
    """A permutation cut into blocks; few lengths, so that few shapes are compiled."""
    length = draw(st.sampled_from([1, 2, 5, 8]))
    positions = draw(st.permutations(range(length)))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    return [list(positions[a:b]) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(partitions())
def test_lengths_are_the_two_relations(blocks):
    """Strictly causal sees block(i) < block(n), causal block(i) <= block(n), the start token being block 0."""
    ids = np.asarray([b for b, members in enumerate(blocks, start=1) for _ in members])
    context = np.concatenate([[0], ids])
    length = len(ids)
    mask = block_mask.build(order.from_blocks(blocks))
    strict, causal = context < ids[:, None], context <= ids[:, None]
    np.testing.assert_array_equal(block_mask.dense(mask.strict_len_BN, length + 1)[0], strict)
    np.testing.assert_array_equal(block_mask.dense(mask.causal_len_BN, length + 1)[0], causal)
    # Tokens strictly before the preceding block: what `shift` leaves out.
    before = context < ids[:, None] - 1
    np.testing.assert_array_equal(block_mask.dense(mask.previous_len_BN, length + 1)[0], before)
    # Stream X has the first N context tokens as rows and keys; stream G has the targets.
    x_relation = context[:length] <= context[:length, None]
    np.testing.assert_array_equal(block_mask.dense(mask.x_len_BN, length)[0], x_relation)
    np.testing.assert_array_equal(block_mask.dense(mask.g_len_BN, length)[0], ids <= ids[:, None])


def test_example_of_the_module():
    """N = 8 in two streams gives the lengths of the method's convention."""
    mask = block_mask.build(order.strided(2, 8, 2))
    for row in range(2):
        assert mask.strict_len_BN[row].tolist() == [1, 2, 3, 3, 5, 5, 7, 7]
        assert mask.causal_len_BN[row].tolist() == [2, 3, 5, 5, 7, 7, 9, 9]
        assert mask.x_len_BN[row].tolist() == [1, 2, 3, 5, 5, 7, 7, 8]
        assert mask.g_len_BN[row].tolist() == [1, 2, 4, 4, 6, 6, 8, 8]
        assert mask.previous_len_BN[row].tolist() == [0, 1, 2, 2, 3, 3, 5, 5]


def test_one_token_blocks_are_one_triangle():
    """With one-token blocks all three key lengths are those of the same lower triangle with its diagonal."""
    mask = block_mask.build(order.uniform(jax.random.key(0), 3, 6))
    triangle = np.tile(np.arange(1, 7), (3, 1))
    for lens in (mask.strict_len_BN, mask.x_len_BN, mask.g_len_BN):
        np.testing.assert_array_equal(lens, triangle)


def test_rows_differ_within_a_batch(toy):
    """Every row of a batch gets its own lengths, the same traced as alone."""
    rng = np.random.default_rng(0)
    orders = [order.from_blocks(toy.blocks(rng, 8)) for _ in range(4)]
    together = jax.jit(block_mask.build)(toy.stack(*orders))
    assert len({tuple(row) for row in np.asarray(together.strict_len_BN)}) > 1
    for row, alone in enumerate(orders):
        for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(block_mask.build(alone)), strict=True):
            assert found.dtype == jnp.int32
            np.testing.assert_array_equal(found[row], expected[0])


def test_rows_for_training_follow_the_convention():
    """X: the start token at position 0 and the first N - 1 tokens; G: the N targets; position j stands at j + 1."""
    drawn = order.from_blocks([[2], [0, 3], [1]])
    rows = rows_for_training(jnp.asarray([[10, 11, 12, 13]]), drawn, block_mask.build(drawn))
    assert rows.x_tokens_BX.tolist() == [[START, 12, 10, 13]]
    assert rows.x_positions_BX.tolist() == [[0, 3, 1, 4]]
    assert rows.g_positions_BG.tolist() == [[3, 1, 4, 2]]
    assert rows.x_len_BX.tolist() == [[1, 2, 4, 4]]
    assert rows.g_strict_len_BG.tolist() == [[1, 2, 2, 4]]
    assert rows.g_len_BG.tolist() == [[1, 3, 3, 4]]
    assert rows.g_previous_len_BG.tolist() == [[0, 1, 1, 2]]


def test_picture():
    """A line a target with its natural position, a column a context token, `#` where seen."""
    drawn = order.from_blocks([[1], [0, 2]])
    assert block_mask.picture(drawn, strict=True) == "   1 #...\n   0 ##..\n   2 ##.."
    assert block_mask.picture(drawn, strict=False) == "   1 ##..\n   0 ####\n   2 ####"
    both = order.left_to_right(2, 2)
    assert block_mask.picture(both, strict=True, row=1) == "   0 #..\n   1 ##."

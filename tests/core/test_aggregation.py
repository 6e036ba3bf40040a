"""Prefix aggregation against its sums written out, in one chunk and in several, and as a recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.core import aggregation, block_mask, order
from armd_jax.core.aggregation import sinusoidal
from armd_jax.core.rows import rows_for_training
from armd_jax.names import AggregatorKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 8


def _inputs(toy, config, seed: int = 0, one_token: bool = False):
    rng = np.random.default_rng(seed)
    cut = (lambda: [[int(p)] for p in rng.permutation(LENGTH)]) if one_token else (lambda: toy.blocks(rng, LENGTH))
    drawn = toy.stack(*(order.from_blocks(cut()) for _ in range(4)))
    rows = rows_for_training(jnp.zeros(drawn.shape, jnp.int32), drawn, block_mask.build(drawn))
    x_BXD = jnp.asarray(rng.standard_normal((*drawn.shape, config.width)), jnp.float32)
    return drawn, rows, x_BXD, {"params": toy.params(config, seed, noise=1.0).get("aggregator", {})}


def _expected(config, params, drawn, x) -> np.ndarray:
    """The first vectors of one row, target by target, written down once more from the definition."""
    ids, positions = np.asarray(drawn.block_BN), np.asarray(drawn.positions_BN) + 1
    context_ids, context_positions = np.append(0, ids)[:-1], np.append(0, positions)[:-1]
    out = []
    for block, position in zip(ids, positions, strict=True):
        earlier = np.flatnonzero(context_ids < block)
        if config.aggregator == "shift":
            out.append(x[context_ids == block - 1].mean(axis=0))
            continue
        code = lambda p: np.asarray(sinusoidal(jnp.asarray(p), config.positional_width), np.float64)  # noqa: E731
        match config.aggregator:
            case "positional":
                total = sum(code(position) @ code(context_positions[i]) * x[i] for i in earlier)
            case "mean":
                total = x[earlier].mean(axis=0)
            case _:
                raise AssertionError(f"no definition of {config.aggregator!r} to compare with")
        normed = total / np.sqrt((total**2).mean() + 1e-6) * np.asarray(params["norm"]["scale"])
        dense = params["position"]
        out.append(normed + code(position) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]))
    return np.stack(out)


@pytest.mark.slow
@pytest.mark.parametrize("one_token", [False, True])
@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
def test_first_vectors_are_the_sums_over_earlier_blocks(toy, aggregator, chunk, one_token):
    """Each target's vector is the aggregator's sum over earlier blocks, whatever the chunks."""
    config = toy.config(aggregator=aggregator, attention_chunk=chunk)
    drawn, rows, x_BXD, variables = _inputs(toy, config, one_token=one_token)
    found, state = aggregation.make(config).apply(variables, rows, x_BXD, None, False)
    assert state is None and found.dtype == x_BXD.dtype
    for row in range(4):
        one = jax.tree.map(lambda a, row=row: a[row], drawn)
        expected = _expected(config, variables["params"], one, np.asarray(x_BXD[row], np.float64))
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("one_token", [False, True])
@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
def test_no_bit_of_a_later_row_leaks(toy, aggregator, chunk, one_token):
    """Huge changes in later rows of X leave a target's vector bit-identical: no difference of inclusive sums."""
    config = toy.config(aggregator=aggregator, attention_chunk=chunk)
    _, rows, x_BXD, variables = _inputs(toy, config, seed=1, one_token=one_token)
    run = jax.jit(lambda x: aggregation.make(config).apply(variables, rows, x, None, False)[0])
    before = np.asarray(run(x_BXD))
    strict = np.asarray(rows.g_strict_len_BG)
    for first_changed in range(1, LENGTH):
        changed = jnp.where(jnp.arange(LENGTH)[:, None] >= first_changed, 1e4 * (x_BXD + 1), x_BXD)
        after = np.asarray(run(changed))
        same = np.all(before.view(np.uint32) == after.view(np.uint32), axis=-1)
        assert np.all(same[strict <= first_changed])
        if aggregator != "shift":
            assert not np.any(same[strict > first_changed])


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
def test_recurrence_equals_the_parallel_form(toy, aggregator):
    """Read the state for a new block, then add the whole block: the same vectors, padding rows adding nothing."""
    config = toy.config(aggregator=aggregator)
    drawn = order.from_blocks([[3], [0, 5], [1], [4, 2, 6], [7]])
    rows = rows_for_training(jnp.zeros((1, LENGTH), jnp.int32), drawn, block_mask.build(drawn))
    variables = {"params": toy.params(config).get("aggregator", {})}
    x_BXD = jnp.asarray(np.random.default_rng(0).standard_normal((1, LENGTH, config.width)), jnp.float32)
    parallel, _ = aggregation.make(config).apply(variables, rows, x_BXD, None, False)
    state = aggregation.make(config).empty_state(1)
    x_first, g_first = 0, 0
    for x_size, g_size in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1)):  # rows of the last block, and of the next
        x, g = slice(x_first, x_first + x_size), slice(g_first, g_first + g_size)
        padding = jnp.asarray([[7]])
        step = rows.replace(
            x_tokens_BX=jnp.zeros((1, x_size + 1), jnp.int32),
            x_positions_BX=jnp.concatenate([rows.x_positions_BX[:, x], padding], axis=1),
            x_valid_BX=jnp.arange(x_size + 1)[None] < x_size,
            g_positions_BG=rows.g_positions_BG[:, g],
            g_strict_len_BG=rows.g_strict_len_BG[:, g],
            g_previous_len_BG=rows.g_previous_len_BG[:, g],
            x_start=x_first,
        )
        with_padding = jnp.concatenate([x_BXD[:, x], jnp.full((1, 1, config.width), 1e3)], axis=1)
        found, state = aggregation.make(config).apply(variables, step, with_padding, state, True)
        np.testing.assert_allclose(found, parallel[:, g], rtol=1e-4, atol=1e-4)
        x_first, g_first = x.stop, g.stop


def test_sinusoidal_codes():
    """PE . PE = 1 at every position, PE(a) . PE(b) depends on a - b alone, and position 0 is not zero."""
    codes = np.asarray(sinusoidal(jnp.arange(20), 16), np.float64)
    products = codes @ codes.T
    np.testing.assert_allclose(np.diag(products), 1.0, atol=1e-5)
    for offset in (1, 5):
        np.testing.assert_allclose(np.diag(products, offset), products[0, offset], atol=1e-5)


@pytest.mark.slow
def test_low_precision_rows_are_summed_in_float32(toy):
    """bfloat16 rows are accumulated in float32: summing many equal rows loses nothing, which bfloat16 sums would."""
    config = toy.config(aggregator="mean", max_length=600, attention_chunk=1)
    drawn = order.left_to_right(1, 600)
    rows = rows_for_training(jnp.zeros((1, 600), jnp.int32), drawn, block_mask.build(drawn))
    x_BXD = jnp.broadcast_to(jnp.asarray([1.0, -1, 2, -2, 0.5, 3, -3, 1]), (1, 600, 8)).astype(jnp.bfloat16)
    params = {"norm": {"scale": jnp.ones(8)}, "position": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}
    found, _ = aggregation.make(config).apply({"params": params}, rows, x_BXD, None, False)
    np.testing.assert_array_equal(found[0, -1], found[0, 0])

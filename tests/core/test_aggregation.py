"""Prefix aggregation against its sums written out, in one chunk and in several, and as a recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.core import aggregation, block_mask, order
from armd_jax.core.aggregation import sinusoidal
from armd_jax.core.rows import UNSEEN, rows_for_training
from armd_jax.names import AggregatorKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 8
# The config fields that decide a first vector: every aggregator, and what one of them may have or lack.
AGGREGATORS = [{"aggregator": kind} for kind in typed.choices(AggregatorKind)]
AGGREGATORS += [{"aggregator": "neighbours", "neighbours": "both", "positional_gain": 0.0}]
EACH = pytest.mark.parametrize("fields", AGGREGATORS, ids=lambda fields: "-".join(map(str, fields.values())))


def _inputs(toy, config, seed: int = 0, one_token: bool = False):
    rng = np.random.default_rng(seed)
    cut = (lambda: [[int(p)] for p in rng.permutation(LENGTH)]) if one_token else (lambda: toy.blocks(rng, LENGTH))
    drawn = toy.stack(*(order.from_blocks(cut()) for _ in range(4)))
    # The token at natural position p is p, so that x_BXD has the vector of each.
    tokens_BN = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), drawn.shape)
    rows = rows_for_training(tokens_BN, drawn, block_mask.build(drawn))
    x_BXD = jnp.asarray(rng.standard_normal((*drawn.shape, config.width)), jnp.float32)
    return drawn, rows, x_BXD, {"params": toy.params(config, seed, noise=1.0).get("aggregator", {})}


def _near(config, rows, x_BXD):
    """The vectors of the neighbours that the aggregator wants, taken from the rows of X; a hidden one is infinite."""
    vectors = []
    for ids_BG in aggregation.make(config).wanted(rows):
        row_BG = jnp.argmax(rows.x_tokens_BX[:, None] == ids_BG[..., None], axis=-1)
        found_BGD = jnp.take_along_axis(x_BXD, row_BG[..., None], axis=1)
        vectors.append(jnp.where(ids_BG[..., None] == UNSEEN, jnp.inf, found_BGD))
    return tuple(vectors)


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
            case "positional" | "neighbours":
                total = sum(code(position) @ code(context_positions[i]) * x[i] for i in earlier)
            case "mean":
                total = x[earlier].mean(axis=0)
            case _:
                raise AssertionError(f"no definition of {config.aggregator!r} to compare with")
        parts = params.get("sum", params)
        vector = code(position) @ np.asarray(parts["position"]["kernel"]) + np.asarray(parts["position"]["bias"])
        if "norm" in parts:
            vector = vector + total / np.sqrt((total**2).mean() + 1e-6) * np.asarray(parts["norm"]["scale"])
        if config.aggregator == "neighbours":
            seen = {int(context_positions[i]): x[i] for i in earlier}
            for side, step in {"left": -1, "right": 1}.items():
                if side in params:
                    near = seen.get(position + step, np.asarray(params[f"unseen_{side}"]))
                    vector = vector + near @ np.asarray(params[side], np.float64)
        out.append(vector)
    return np.stack(out)


@pytest.mark.slow
@pytest.mark.parametrize("one_token", [False, True])
@pytest.mark.parametrize("chunk", [3, 8])
@EACH
def test_first_vectors_are_the_sums_over_earlier_blocks(toy, fields, chunk, one_token):
    """Each target's vector is the aggregator's sum over earlier blocks, whatever the chunks."""
    config = toy.config(**fields, max_length=LENGTH, attention_chunk=chunk)
    drawn, rows, x_BXD, variables = _inputs(toy, config, one_token=one_token)
    found = aggregation.make(config).apply(variables, rows, x_BXD, _near(config, rows, x_BXD), None, False)
    assert found.dtype == x_BXD.dtype
    for row in range(4):
        one = jax.tree.map(lambda a, row=row: a[row], drawn)
        expected = _expected(config, variables["params"], one, np.asarray(x_BXD[row], np.float64))
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("one_token", [False, True])
@pytest.mark.parametrize("chunk", [3, 8])
@EACH
def test_no_bit_of_a_later_row_leaks(toy, fields, chunk, one_token):
    """Huge changes in later rows of X leave a target's vector bit-identical: no difference of inclusive sums."""
    config = toy.config(**fields, max_length=LENGTH, attention_chunk=chunk)
    _, rows, x_BXD, variables = _inputs(toy, config, seed=1, one_token=one_token)
    run = jax.jit(lambda x: aggregation.make(config).apply(variables, rows, x, _near(config, rows, x), None, False))
    before = np.asarray(run(x_BXD))
    strict = np.asarray(rows.g_strict_len_BG)
    for first_changed in range(1, LENGTH):
        changed = jnp.where(jnp.arange(LENGTH)[:, None] >= first_changed, 1e4 * (x_BXD + 1), x_BXD)
        after = np.asarray(run(changed))
        same = np.all(before.view(np.uint32) == after.view(np.uint32), axis=-1)
        assert np.all(same[strict <= first_changed])
        if fields["aggregator"] == "neighbours" and "positional_gain" in fields:
            continue  # it sees two rows and not all earlier ones
        if fields["aggregator"] != "shift":
            assert not np.any(same[strict > first_changed])


@pytest.mark.slow
@EACH
def test_recurrence_equals_the_parallel_form(toy, fields):
    """Read the state for a new block, then add the whole block: the same vectors, padding rows adding nothing."""
    config = toy.config(**fields, max_length=LENGTH)
    drawn = order.from_blocks([[3], [0, 5], [1], [4, 2, 6], [7]])
    rows = rows_for_training(jnp.arange(LENGTH, dtype=jnp.int32)[None], drawn, block_mask.build(drawn))
    variables = {"params": toy.params(config).get("aggregator", {})}
    x_BXD = jnp.asarray(np.random.default_rng(0).standard_normal((1, LENGTH, config.width)), jnp.float32)
    near = _near(config, rows, x_BXD)
    aggregator = aggregation.make(config)
    parallel = aggregator.apply(variables, rows, x_BXD, near, None, False)
    state = aggregator.empty_state(1)
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
            g_left_BG=rows.g_left_BG[:, g],
            g_right_BG=rows.g_right_BG[:, g],
            x_start=x_first,
        )
        with_padding = jnp.concatenate([x_BXD[:, x], jnp.full((1, 1, config.width), 1e3)], axis=1)
        vectors = tuple(each[:, g] for each in near)
        found = aggregator.apply(variables, step, with_padding, vectors, state, True)
        state = aggregator.state_after(step, with_padding, state)
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
    found = aggregation.make(config).apply({"params": params}, rows, x_BXD, (), None, False)
    np.testing.assert_array_equal(found[0, -1], found[0, 0])

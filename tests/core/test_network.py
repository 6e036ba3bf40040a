"""The network's switches change how it is computed, never what; and dead work is not computed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.config import ModelConfig
from armd_jax.core import axes, block_mask, network, objective, order, parameters, sizes
from armd_jax.core import cache as caches
from armd_jax.core.context import Context
from armd_jax.core.kernels.embedding import look_up
from armd_jax.core.rows import rows_for_training
from armd_jax.names import AggregatorKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 6


def _five_layers(toy, **changes):
    return toy.config(**dict(vocab_size=7, max_length=LENGTH, num_layers=5, two_stream_layers=3) | changes)


@pytest.fixture(scope="module")
def loss_and_gradient(toy):
    """(config) -> loss and gradients, dropout 0.3, on one batch of mixed orders; the same for equal configs."""
    params = toy.params(_five_layers(toy), scale=1.0)
    drawn = toy.stack(order.strided(1, LENGTH, 2), order.uniform(jax.random.key(0), 2, LENGTH))
    tokens = jax.random.randint(jax.random.key(1), (3, LENGTH), 0, 7)

    @functools.cache
    def run(config):
        def loss(params):
            return objective.loss_sums(
                params, config, tokens, drawn, Context(dropout_key=jax.random.key(2))
            ).weighted_nll

        return jax.jit(jax.value_and_grad(loss))(params)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scan", "remat", "attention"),
    [
        ("off", "dots", "dense"),
        ("off", "full", "chunked"),
        ("on", "none", "dense"),
        ("on", "dots", "chunked"),
        ("on", "full", "dense"),
    ],
)
def test_scan_and_remat_change_nothing(toy, loss_and_gradient, scan, remat, attention):
    """Loop or scan, any remat, any attention: the same dropout draws, the same loss and gradients within rounding."""
    config = _five_layers(toy, dropout=0.3)
    value, gradient = loss_and_gradient(config)
    changed = dataclasses.replace(config, scan_layers=scan, remat=remat, attention=attention, attention_chunk=4)
    other_value, other_gradient = loss_and_gradient(changed)
    assert float(other_value) == pytest.approx(float(value), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient(toy, loss_and_gradient):
    """No parameter is dead: every real row and matrix of the tree has a gradient, layer by layer."""
    config = _five_layers(toy, dropout=0.3)
    _, gradient = loss_and_gradient(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters.unstack(gradient)):
        for part in np.moveaxis(leaf, 1, 0) if path[-1].key == "key_value" else [np.asarray(leaf)]:
            assert np.any(part != 0), jax.tree_util.keystr(path)
    assert np.all(np.any(np.asarray(gradient["embedding"][: config.vocab_size]) != 0, axis=1))


def test_gradients_of_a_frequent_token_add_up(toy):
    """In bfloat16 too: a sum in that dtype would stand still at 256 of these 5,000 equal gradients."""
    tokens_BN = jnp.zeros((1, 5_000), jnp.int32)
    in_bfloat16 = functools.partial(look_up, jnp.bfloat16, lambda table: table)
    gradient = jax.grad(lambda table_VD: in_bfloat16(table_VD, tokens_BN).astype(jnp.float32).sum())(jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, [[5_000, 5_000], [0, 0], [0, 0]])


@pytest.mark.slow
def test_parameters_do_not_depend_on_how_the_network_is_computed(toy):
    """Scan, remat, attention, chunks and dropout leave names, shapes and draws of the initial parameters alone."""
    config = _five_layers(toy)
    changed = dataclasses.replace(
        config, scan_layers="on", remat="full", attention="chunked", attention_chunk=2, loss_chunk=2, dropout=0.1
    )
    expected, found = jax.jit(lambda key: [parameters.init(key, c) for c in (config, changed)])(jax.random.key(0))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("num_layers", "two_stream_layers"), [(5, 3), (2, 0), (2, 2), (1, 1)])
def test_parameter_names_parameters(toy, num_layers, two_stream_layers):
    """The tree is the documented one, with or without layers of either kind."""
    config = toy.config(num_layers=num_layers, two_stream_layers=two_stream_layers, tie_embeddings=False)
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    names = {"embedding", "start", "aggregator", "final_norm", "head"}
    names |= {"two_stream"} if two_stream_layers > 1 else set()
    names |= {"last_two_stream"} if two_stream_layers else set()
    names |= {"causal"} if two_stream_layers < num_layers else set()
    assert set(params) == names
    assert params["embedding"].shape == (128, 8) and params["head"].shape == (8, 128)
    for name, count in (("two_stream", two_stream_layers - 1), ("causal", num_layers - two_stream_layers)):
        for leaf in jax.tree.leaves(params.get(name, {})):
            assert leaf.shape[0] == count


@pytest.mark.slow
def test_initial_values(toy):
    """Nothing but biases starts at zero, heads and residual projections included; each layer has its own draw."""
    config = _five_layers(toy, tie_embeddings=False)
    params = jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), config)
    per_layer = parameters.unstack(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(per_layer):
        assert path[-1].key == "bias" or np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)
    queries = [p["query"] for p in (*per_layer["two_stream"], per_layer["last_two_stream"], *per_layer["causal"])]
    assert len(queries) == 5 and len({np.asarray(query).tobytes() for query in queries}) == 5
    # An untrained model's loss is about log V a token: no scale is off.
    tokens = jax.random.randint(jax.random.key(1), (8, LENGTH), 0, 7)
    drawn = order.left_to_right(8, LENGTH)
    sums = jax.jit(lambda params: objective.loss_sums(params, config, tokens, drawn))(params)
    assert float(sums.nll / sums.tokens) == pytest.approx(np.log(7), abs=0.1)


def _ungrouped(params: parameters.Params, heads: int) -> parameters.Params:
    """The same parameters with a head of keys and values for every head of queries."""

    def repeated(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        axis = {"key_value": -2, "key_value_bias": -2}.get(path[-1].key)
        return leaf if axis is None else jnp.repeat(leaf, heads // leaf.shape[axis], axis=axis)

    return jax.tree_util.tree_map_with_path(repeated, params)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "attention"), [(1, "dense"), (2, "chunked")])
def test_grouped_queries_are_heads_that_share_keys(toy, kv_heads, attention):
    """Every token has the probability that a model gives it whose heads of keys are repeated."""
    config = toy.config(vocab_size=7, max_length=LENGTH, num_heads=4, num_kv_heads=kv_heads, qkv_bias=True)
    config = dataclasses.replace(config, attention=attention, attention_chunk=4)
    params = toy.params(config, scale=1.0)
    drawn, tokens = order.strided(2, LENGTH, 2), jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 7)

    def log_probs(params: parameters.Params, config: ModelConfig) -> jax.Array:
        return objective.task_log_probs(params, config, tokens, drawn)[0]

    run = jax.jit(log_probs, static_argnums=1)
    expected = run(_ungrouped(params, 4), dataclasses.replace(config, num_kv_heads=0))
    np.testing.assert_allclose(run(params, config), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_unstacked_parameters_give_the_same_network(toy):
    """A list of per-layer parameters is the same model as the stack, scanned or not."""
    config = _five_layers(toy)
    params = toy.params(config, scale=1.0)
    drawn = order.strided(2, LENGTH, 3)
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 7)
    rows = rows_for_training(tokens, drawn, block_mask.build(drawn))
    unstacked = parameters.unstack(params)
    assert len(unstacked["two_stream"]) == 2 and len(unstacked["causal"]) == 2
    scanned = dataclasses.replace(config, scan_layers="on")

    @jax.jit
    def run(params, unstacked):
        cases = ((params, scanned), (params, config), (unstacked, config))
        return [network.forward(tree, c, rows)[0] for tree, c in cases]

    expected, *others = run(params, unstacked)
    for found in others:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_key_place_and_shape():
    """Kept values are scaled by 1 / (1 - rate), the mean stays, draws differ by place, and no key is no dropout."""
    key, ones = jax.random.key(0), jnp.ones((200, 200))
    dropped = np.asarray(Context(dropout_key=key).dropout(0.25, ones, 0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)
    np.testing.assert_array_equal(dropped, Context(dropout_key=key).dropout(0.25, ones, 0))
    other = np.asarray(Context(dropout_key=key).dropout(0.25, ones, 1))
    assert np.mean((dropped == 0) & (other == 0)) == pytest.approx(0.25**2, abs=0.01)
    assert Context().dropout(0.25, ones, 0) is ones and Context(dropout_key=key).dropout(0.0, ones, 0) is ones


@pytest.mark.slow
def test_dropout_acts(toy, loss_and_gradient):
    """Dropout changes the loss where it is not zero."""
    config = _five_layers(toy)
    assert (
        abs(float(loss_and_gradient(config)[0] - loss_and_gradient(dataclasses.replace(config, dropout=0.3))[0])) > 1e-2
    )


@pytest.mark.slow
def test_every_layer_and_stream_draws_its_own_dropout(toy):
    """With attention silenced, what a layer adds is zero exactly where its MLP output was dropped."""
    config = _five_layers(toy, dropout=0.5)
    params = toy.params(config)
    for name in ("two_stream", "last_two_stream", "causal"):
        params[name] = params[name] | {"attention_out": jnp.zeros_like(params[name]["attention_out"])}
    drawn = order.left_to_right(1, LENGTH)
    rows = rows_for_training(jnp.zeros((1, LENGTH), jnp.int32), drawn, block_mask.build(drawn))

    @jax.jit
    def activations(params):
        seen = []

        def constrain(array, names):
            if names == axes.ROWS:
                seen.append(array)
            return array

        network.forward(params, config, rows, context=Context(constrain, dropout_key=jax.random.key(0)))
        return seen

    states = [np.asarray(state) for state in activations(params)]
    # X, the left neighbours, G, then every layer's rows: X over G, from the last two-stream one on G.
    _, _, g, both_1, both_2, *rest = states
    x_2, g_2 = np.split(both_2 - both_1, 2, axis=1)
    g_stream = [g, both_1[:, LENGTH:], both_2[:, LENGTH:], *rest]
    masks = [g == 0, x_2 == 0, *(new - old == 0 for old, new in zip(g_stream, g_stream[1:], strict=False))]
    np.testing.assert_array_equal(masks[3], g_2 == 0)
    assert len(masks) == 7 and len({mask.tobytes() for mask in masks}) == 7
    assert all(0.2 < mask.mean() < 0.8 for mask in masks)


# --- work -----------------------------------------------------------------------------------------------------------


def _work(toy, config) -> tuple[int, int]:
    """Multiply-adds of the forward: projections and MLPs, and attention (products with batch and head axes)."""
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    drawn = order.left_to_right(1, LENGTH)

    def run(params, tokens):
        rows = rows_for_training(tokens, drawn, block_mask.build(drawn))
        return network.forward(params, config, rows)[0]

    dense = attention = 0
    jaxpr = jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))
    for equation in toy.equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            work = int(np.prod(out)) * int(np.prod([lhs[axis] for axis in contracted]))
            if len(batch) == 2:
                attention += work
            elif not batch:
                dense += work
    return dense, attention


@pytest.mark.parametrize("num_layers", [1, 4])
def test_last_two_stream_layer_computes_no_dead_rows(toy, num_layers):
    """Work in units of a causal layer is exactly L + 5/6 (M - 1) for the matrices and L + M - 1 for attention."""
    for two_stream_layers in range(num_layers + 1):
        config = toy.config(
            num_layers=num_layers,
            two_stream_layers=two_stream_layers,
            mlp_width=0,  # 4 D
            aggregator="shift",  # has no matrix of its own
            attention="dense",
        )
        dense, attention = _work(toy, config)
        causal_layer = 12 * config.width**2 * LENGTH
        extra = max(two_stream_layers - 1, 0)
        assert dense == num_layers * causal_layer + extra * 5 * causal_layer // 6
        assert attention == (num_layers + extra) * 2 * config.width * LENGTH**2


def test_widths(toy):
    """The vocabulary is padded to a multiple of 128; the MLP is 4 D, or 8/3 D in multiples of 64 for swiglu."""
    assert [sizes.padded_vocab(toy.config(vocab_size=v)) for v in (1, 128, 129, 50_257)] == [128, 128, 256, 50_304]
    assert sizes.mlp_width(toy.config(mlp_width=0, width=768)) == 3072
    assert sizes.mlp_width(toy.config(mlp_width=0, width=768, mlp="swiglu")) == 2048
    assert sizes.mlp_width(toy.config(mlp_width=0, width=64, mlp="swiglu")) == 192
    assert sizes.mlp_width(toy.config(mlp_width=10, mlp="swiglu")) == 10


@pytest.mark.slow
def test_activation_dtype(toy):
    """bfloat16 activations, float32 logits and log-probabilities near those of float32."""
    config = _five_layers(toy)
    params = toy.params(config, scale=1.0, noise=0.0)
    drawn = order.strided(2, LENGTH, 2)
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 7)
    low = dataclasses.replace(config, dtype="bfloat16")
    rows = rows_for_training(tokens, drawn, block_mask.build(drawn))
    h_BND, _ = jax.eval_shape(lambda: network.forward(params, low, rows))
    logits = jax.eval_shape(lambda h: network.head_logits(params, low, h), h_BND)
    assert h_BND.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    run = jax.jit(lambda params: [objective.generation_log_probs(params, c, tokens, drawn)[0] for c in (config, low)])
    exact, rounded = run(params)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.2)


def test_constraints_are_given_for_every_activation(toy):
    """`constrain` sees embeddings, both streams after every layer and logits, with one axis name a dimension."""
    config = _five_layers(toy)
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    seen = []

    def constrain(array, names):
        assert array.ndim == len(names)
        seen.append((array.shape[1], names))
        return array

    def run(params, tokens):
        drawn = order.left_to_right(2, LENGTH)
        return objective.loss_sums(params, config, tokens, drawn, Context(constrain)).nll

    jax.eval_shape(run, params, jax.ShapeDtypeStruct((2, LENGTH), jnp.int32))
    assert seen.count((2 * LENGTH, axes.ROWS)) == 2  # X and G in the two full two-stream layers
    # The embeddings of X and of neighbours, G's first vectors, the last two-stream layer, and causal layers.
    assert seen.count((LENGTH, axes.ROWS)) == 2 + 1 + 1 + 2
    assert seen.count((LENGTH, axes.LOGITS)) == 1


# Fields of pretrained models that change what decoding keeps, and where its rows stand.
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qkv_bias": True, "prediction_position": "previous"}
CACHED = [{"aggregator": name} for name in typed.choices(AggregatorKind)]
CACHED += [GROUPED | {"qk_norm": True, "rope_scaling": "linear", "rope_factor": 2.0}]
CACHED += [GROUPED | {"learned_positions": 7, "attention_out_bias": True, "mlp_bias": True, "mlp": "swiglu"}]


@pytest.mark.slow
@pytest.mark.parametrize("changes", CACHED, ids=lambda changes: ", ".join(map(str, changes.values())))
def test_cached_calls_equal_the_parallel_forward(toy, changes):
    """Block by block through the cache (X rows of the last block, G rows of the next), padding rows included."""
    config = toy.config(vocab_size=7, num_layers=3, two_stream_layers=2, **changes)
    params = toy.params(config, scale=1.0)
    unstacked = parameters.unstack(params)
    blocks = [[3], [0, 5], [1], [4, 2]]
    drawn = order.from_blocks(blocks)
    tokens = jax.random.randint(jax.random.key(0), (1, 6), 0, 7)
    rows = rows_for_training(tokens, drawn, block_mask.build(drawn))
    parallel, _ = network.forward(params, config, rows)
    cache = caches.empty(config, jnp.float32, 1, 8)
    x_first, g_first, x_size = 0, 0, 1
    run = jax.jit(lambda rows, cache: network.forward(unstacked, config, rows, cache))

    def padded(field, first: int, size: int):
        return jnp.pad(field[:, first : first + size], ((0, 0), (0, 2 - size)), constant_values=1)

    for block in blocks:
        size = len(block)
        x_fields = ("x_tokens_BX", "x_positions_BX", "x_len_BX")
        g_fields = ("g_positions_BG", "g_strict_len_BG", "g_len_BG", "g_left_BG", "g_right_BG")
        step = rows.replace(
            **{name: padded(getattr(rows, name), x_first, x_size) for name in x_fields},
            **{name: padded(getattr(rows, name), g_first, size) for name in g_fields},
            g_previous_len_BG=jnp.pad(rows.g_previous_len_BG[:, g_first : g_first + size], ((0, 0), (0, 2 - size))),
            x_start=jnp.asarray(x_first),
            g_start=jnp.asarray(g_first),
            x_valid_BX=jnp.arange(2)[None] < x_size,
            g_valid_BG=jnp.arange(2)[None] < size,
        )
        found, cache = run(step, cache)
        np.testing.assert_allclose(found[:, :size], parallel[:, g_first : g_first + size], rtol=1e-4, atol=1e-4)
        x_first, x_size, g_first = x_first + x_size, size, g_first + size

"""Strict causality to the last bit, in every mode; what a block's conditionals may and may not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.core import aggregation, block_mask, network, objective, order
from armd_jax.core.rows import rows_for_training, single_row
from armd_jax.names import AggregatorKind, Remat

pytestmark = pytest.mark.slow

LENGTH, VOCAB = 8, 7
# Every pair of aggregator, remat, scan and attention appears; every aggregator meets all four of scan x attention.
MODES = [
    (aggregator, typed.choices(Remat)[(index + shift) % 3], scan, attention)
    for index, (scan, attention) in enumerate(itertools.product(("off", "on"), ("dense", "chunked")))
    for shift, aggregator in enumerate(typed.choices(AggregatorKind))
]


def _logits(params, config, tokens, drawn):
    rows = rows_for_training(tokens, drawn, block_mask.build(drawn))
    h_BND, _ = network.forward(params, config, rows)
    return network.head_logits(params, config, h_BND)[..., : config.vocab_size]


@pytest.fixture(scope="module")
def order_groups(toy):
    """Two batches of 8 orders: blocks of all kinds, and one-token blocks only (where `shift` takes another path)."""
    rng = np.random.default_rng(1)
    mixed = toy.stack(
        order.strided(1, LENGTH, 2),
        order.strided(1, LENGTH, 4),
        order.masked_diffusion(jax.random.key(0), 2, LENGTH, 4, "cosine"),
        order.from_blocks([list(range(LENGTH))]),
        *(order.from_blocks(toy.blocks(rng, LENGTH)) for _ in range(3)),
    )
    single = toy.stack(
        order.left_to_right(1, LENGTH),
        order.uniform(jax.random.key(1), 5, LENGTH),
        order.progressive(jax.random.key(2), 2, LENGTH, 4),
    )
    return mixed, single


def _assert_strictly_causal(run, drawn, seed: int) -> None:
    """For every row and block b: new tokens in b and all later blocks leave the logits of blocks <= b bit-identical."""
    rng = np.random.default_rng(seed)
    count = drawn.shape[0]
    repeated = jax.tree.map(lambda a: jnp.repeat(a, LENGTH, axis=0), drawn)
    block = np.asarray(repeated.block_BN)
    changed_from = np.tile(np.arange(1, LENGTH + 1), count)[:, None]  # block ids beyond the last change nothing
    tokens = np.repeat(rng.integers(0, VOCAB, (count, LENGTH)), LENGTH, axis=0)
    natural_block = np.asarray(objective.to_natural(repeated, repeated.block_BN))
    other = (tokens + rng.integers(1, VOCAB, tokens.shape)) % VOCAB
    before = np.asarray(run(jnp.asarray(tokens, jnp.int32), repeated))
    unaffected = block <= changed_from
    # All later tokens change, or those of block b alone: then nothing hides one leak behind another.
    for affected in (natural_block >= changed_from, natural_block == changed_from):
        after = np.asarray(run(jnp.asarray(np.where(affected, other, tokens), jnp.int32), repeated))
        same = np.all(before.view(np.uint32) == after.view(np.uint32), axis=-1)
        assert np.all(same[unaffected])
        visible = (block > changed_from) & np.any(affected, axis=1, keepdims=True)
        assert np.mean(~same[visible]) > 0.5  # and later blocks do see the change


@pytest.mark.parametrize(("aggregator", "remat", "scan", "attention"), MODES)
def test_later_tokens_change_no_bit(toy, order_groups, aggregator, remat, scan, attention):
    """Changing tokens of block b and later leaves all logits of blocks <= b bit-identical, in every mode, under jit."""
    config = toy.config(
        vocab_size=VOCAB,
        max_length=LENGTH,
        num_layers=4,
        two_stream_layers=3,
        aggregator=aggregator,
        remat=remat,
        scan_layers=scan,
        attention=attention,
        attention_chunk=3,
        tie_embeddings=False,
        neighbours={"off": "left", "on": "both"}[scan],
        positional_gain={"dense": 0.0, "chunked": 0.3}[attention],
        qk_norm=scan == "on",
    )
    params = toy.params(config, scale=1.0)
    run = jax.jit(lambda tokens, drawn: _logits(params, config, tokens, drawn))
    for seed, drawn in enumerate(order_groups):
        _assert_strictly_causal(run, drawn, seed)


@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
@pytest.mark.parametrize("two_stream_layers", [0, 1])
def test_later_tokens_change_no_bit_with_few_two_stream_layers(toy, order_groups, two_stream_layers, aggregator):
    """The same without the full two-stream layers: M = 0 and M = 1 under three causal layers."""
    config = toy.config(
        vocab_size=VOCAB, num_layers=3, two_stream_layers=two_stream_layers, aggregator=aggregator, attention_chunk=3
    )
    params = toy.params(config, scale=1.0)
    run = jax.jit(lambda tokens, drawn: _logits(params, config, tokens, drawn))
    for seed, drawn in enumerate(order_groups):
        _assert_strictly_causal(run, drawn, seed)


def test_gradient_of_earlier_logits_is_zero(toy):
    """No gradient flows from a later token's embedding into an earlier block's log-probability, also chunked."""
    config = toy.config(
        vocab_size=VOCAB,
        num_layers=3,
        two_stream_layers=2,
        attention="chunked",
        attention_chunk=3,
        tie_embeddings=False,
    )
    params = toy.params(config)
    drawn = order.from_blocks([[3, 1], [0], [5, 2, 4], [6]])
    tokens = jnp.arange(7, dtype=jnp.int32)[None]  # every token once, so that its embedding row is its own

    @jax.jit
    @jax.grad
    def gradient(embedding, weight):
        log_probs, _ = objective.generation_log_probs(params | {"embedding": embedding}, config, tokens, drawn)
        return jnp.sum(weight * log_probs)

    block = np.asarray(drawn.block_BN)[0]
    for b in range(1, 5):
        rows = np.asarray(gradient(params["embedding"], jnp.asarray(block <= b, jnp.float32)))
        for token in range(7):
            token_block = block[np.asarray(drawn.positions_BN)[0] == token][0]
            assert np.any(rows[token] != 0) == (token_block < b), (b, token)


@pytest.mark.parametrize("two_stream_layers", [0, 1, 3])
@pytest.mark.parametrize("aggregator", [kind for kind in typed.choices(AggregatorKind) if kind != "shift"])
def test_positions_of_a_first_block_differ(toy, aggregator, two_stream_layers):
    """With only the start token visible, two positions get different distributions, also before training."""
    config = toy.config(num_layers=3, two_stream_layers=two_stream_layers, aggregator=aggregator)
    params = toy.params(config, scale=1.0, noise=0.0)
    vector = jnp.zeros((1, 1, 8))
    initial = aggregation.make(config).init(jax.random.key(0), single_row(), vector, (vector,), None, False)["params"]
    drawn = order.from_blocks([[0, 1, 2, 3]])
    for aggregator_params, least in ((params["aggregator"], 1e-2), (initial, 1e-4)):
        params["aggregator"] = aggregator_params
        logits = np.asarray(_logits(params, config, jnp.zeros((1, 4), jnp.int32), drawn))[0]
        for a, b in itertools.combinations(range(4), 2):
            assert np.abs(logits[a] - logits[b]).max() > least


DEPTHS = [
    ("positional", 6, 3),
    ("mean", 6, 6),
    ("shift", 6, 3),
    ("positional", 4, 0),
    ("shift", 4, 4),
    ("mean", 3, 1),
    ("positional", 5, 5),
]


@pytest.mark.parametrize(("aggregator", "num_layers", "two_stream_layers"), DEPTHS)
def test_listing_order_inside_a_block_does_not_matter(toy, aggregator, num_layers, two_stream_layers):
    """Permuting the tokens inside blocks leaves every conditional unchanged within rounding, at any depth."""
    config = toy.config(
        vocab_size=VOCAB, num_layers=num_layers, two_stream_layers=two_stream_layers, aggregator=aggregator
    )
    params = toy.params(config, scale=1.5)
    rng = np.random.default_rng(num_layers)
    first, second = [], []
    for _ in range(6):
        blocks = toy.blocks(rng, LENGTH)
        first.append(order.from_blocks(blocks))
        second.append(order.from_blocks([[int(p) for p in rng.permutation(block)] for block in blocks]))
    tokens = jnp.asarray(rng.integers(0, VOCAB, (6, LENGTH)), jnp.int32)
    a, b = toy.stack(*first), toy.stack(*second)
    assert np.any(np.asarray(a.positions_BN) != np.asarray(b.positions_BN))
    run = jax.jit(lambda d: objective.to_natural(d, _logits(params, config, tokens, d)))
    found = [np.asarray(run(d)) for d in (a, b)]
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4, atol=2e-4)
    assert np.abs(found[0]).max() > 0.5

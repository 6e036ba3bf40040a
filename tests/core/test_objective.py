"""Losses: the same numbers in any chunks, never large logits, no mass on padding, sums of what is counted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import block_mask, network, objective, order, parameters, sizes
from armd_jax.core.rows import rows_for_training
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_equals_unchunked(toy, tied):
    """Chunks that divide the length or not give the values and every gradient of one piece."""
    config = toy.config(vocab_size=7, max_length=6, tie_embeddings=tied)
    head = "embedding" if tied else "head"
    params = {head: toy.params(config)[head]}
    rng = np.random.default_rng(0)
    h_BND = jnp.asarray(rng.standard_normal((3, 6, config.width)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 7, (3, 6)))
    pull = tuple(jnp.asarray(rng.standard_normal((3, 6)), jnp.float32) for _ in range(2))

    def run(chunk: int):
        changed = dataclasses.replace(config, loss_chunk=chunk)

        @jax.jit
        def values_and_gradients(params, h_BND):
            out, vjp = jax.vjp(lambda p, h: objective.token_log_probs(p, changed, h, targets), params, h_BND)
            return out, vjp(pull)

        return jax.tree.leaves(values_and_gradients(params, h_BND))

    whole = run(0)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in whole)
    for chunk in (1, 4, 6, 100):
        for expected, found in zip(whole, run(chunk), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def _logit_sizes(toy, config, batch: int, length: int) -> list[int]:
    """Sizes of all arrays with a vocabulary axis in loss and gradient, but for parameters of that shape."""
    vocab = sizes.padded_vocab(config)
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))

    def loss(params, tokens):
        return objective.loss_sums(params, config, tokens, order.left_to_right(batch, length)).weighted_nll

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    shapes = toy.shapes(jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens))
    matrices = {(vocab, config.width), (config.width, vocab)}
    return [int(np.prod(shape)) for shape in shapes - matrices if vocab in shape]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_large_vocabulary_exist_chunk_by_chunk(toy, tied):
    """Forward and backward hold logits of `loss_chunk` positions at most, and below 64 MiB by default."""
    config = toy.config(vocab_size=50_257, max_length=1024, num_layers=1, tie_embeddings=tied)
    vocab = sizes.padded_vocab(config)
    assert vocab == 50_304
    for chunk in (8, 100):
        assert max(_logit_sizes(toy, dataclasses.replace(config, loss_chunk=chunk), 4, 256)) == 4 * chunk * vocab
    assert 2**25 < 4 * max(_logit_sizes(toy, config, 4, 1024)) <= 2**26
    assert max(_logit_sizes(toy, config, 1024, 4)) == 1024 * vocab  # one position is the least there can be


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_inert(toy, tied):
    """Padding rows change no loss whatever they hold, and get gradients of exactly zero."""
    config = toy.config(vocab_size=5, num_layers=1, tie_embeddings=tied, loss_chunk=3)
    params = toy.params(config)
    tokens = jnp.asarray([[0, 4, 2, 1]])
    drawn = order.strided(1, 4, 2)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        sums = objective.loss_sums(params, config, tokens, drawn)
        return sums.weighted_nll + sums.z

    value, gradient = loss(params)
    other = dict(params)
    if tied:
        other["embedding"] = params["embedding"].at[5:].add(100.0)
        unused = gradient["embedding"][5:]
    else:
        other["head"] = params["head"].at[:, 5:].add(100.0)
        unused = gradient["head"][:, 5:]
    assert float(loss(other)[0]) == float(value)
    assert unused.size and np.all(np.asarray(unused) == 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_sums_against_the_definition(toy):
    """weighted_nll, nll, weight, tokens and z are the sums their names say, from log-probabilities and logits."""
    config = toy.config(vocab_size=5, num_layers=1)
    params = toy.params(config)
    tokens = jax.random.randint(jax.random.key(1), (3, 4), 0, 5)
    drawn = order.strided(3, 4, 2)
    weights = np.asarray([[1, 2, 0.5, 1], [1, 1, 0, 0], [0, 0.25, 1, 3]], np.float32)
    drawn = drawn.replace(weight_BN=jnp.asarray(weights))

    @jax.jit
    def both(params):
        pair = objective.generation_log_probs(params, config, tokens, drawn)
        return *pair, objective.loss_sums(params, config, tokens, drawn)

    log_probs, partitions, sums = both(params)
    counted = weights > 0
    assert float(sums.tokens) == counted.sum() and float(sums.weight) == weights.sum()
    np.testing.assert_allclose(sums.nll, -np.asarray(log_probs)[counted].sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.weighted_nll, -(weights * np.asarray(log_probs)).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.z, (np.asarray(partitions)[counted] ** 2).sum(), rtol=1e-6)


@pytest.mark.slow
def test_log_probs_are_the_softmax_of_the_logits(toy):
    """log p and log-partition, target by target, are those of `head_logits`."""
    config = toy.config(vocab_size=5, loss_chunk=3)
    params = toy.params(config)
    h_BND = jax.random.normal(jax.random.key(0), (2, 4, config.width))
    targets = jnp.asarray([[0, 1, 2, 4], [3, 3, 0, 1]])
    log_probs, partitions = objective.token_log_probs(params, config, h_BND, targets)
    logits = np.asarray(network.head_logits(params, config, h_BND), np.float64)[..., :5]
    expected = np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(partitions, expected, rtol=1e-5, atol=1e-5)
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs, chosen - expected, rtol=1e-5, atol=1e-5)
    assert log_probs.dtype == partitions.dtype == jnp.float32


@pytest.mark.slow
def test_weight_zero_leaves_a_position_out(toy):
    """Padding (moved last, weight 0) changes no sum and no gradient, whatever tokens stand there."""
    config = toy.config(vocab_size=5, num_layers=2, two_stream_layers=1, tie_embeddings=False)
    params = toy.params(config)
    valid = jnp.asarray([[True, False, True, True, False], [True] * 5])
    drawn = order.padding_last(order.uniform(jax.random.key(0), 2, 5), valid)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, tokens):
        sums = objective.loss_sums(params, config, tokens, drawn)
        return sums.weighted_nll + sums.nll + sums.z, sums

    tokens = jnp.asarray([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    other = jnp.where(valid, tokens, 3)
    (value, sums), gradient = loss(params, tokens)
    (other_value, _), other_gradient = loss(params, other)
    assert float(value) == float(other_value)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert float(sums.tokens) == float(sums.weight) == 8.0


def test_to_natural():
    """Values go back to the positions they were generated for, with trailing axes or without."""
    drawn = order.from_blocks([[2, 0], [3], [1]])
    assert objective.to_natural(drawn, jnp.asarray([[10, 20, 30, 40]])).tolist() == [[20, 40, 10, 30]]
    pairs = jnp.asarray([[[10, 1], [20, 2], [30, 3], [40, 4]]])
    assert objective.to_natural(drawn, pairs)[0].tolist() == [[20, 2], [40, 4], [10, 1], [30, 3]]
    many = order.uniform(jax.random.key(0), 5, 7)
    np.testing.assert_array_equal(objective.to_natural(many, many.positions_BN), np.tile(np.arange(7), (5, 1)))


def _plain_log_probs(params, config, tokens, drawn):
    """log p of every token, from a softmax of all logits at once; at natural positions."""
    rows = rows_for_training(tokens, drawn, block_mask.build(drawn))
    h_BND, _ = network.forward(params, config, rows)
    logits = network.head_logits(params, config, objective.to_natural(drawn, h_BND))
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 3])
def test_log_probs_per_token_and_their_gradients(toy, chunk):
    """Under the default and any other order they are those of a plain softmax, as is the gradient of a policy loss."""
    config = toy.config(vocab_size=7, max_length=8, loss_chunk=chunk)
    params, rng = toy.params(config), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 7, (2, 8)), jnp.int32)
    mask = jnp.asarray([[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1, 1, 1]], bool)
    pull = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    found = jax.jit(objective.per_token_logps, static_argnums=1)
    plain = jax.jit(_plain_log_probs, static_argnums=1)
    for given in (None, order.uniform(jax.random.key(1), 2, 8), order.strided(2, 8, 4)):
        drawn = order.left_to_right(2, 8) if given is None else given
        lm = LanguageModel(config, params)

        def loss(params, given=given):
            return jnp.sum(pull * jnp.exp(found(params, config, tokens, mask, given)))

        def plain_loss(params, drawn=drawn):
            return jnp.sum(jnp.where(mask, pull * jnp.exp(plain(params, config, tokens, drawn)), 0.0))

        values = found(params, config, tokens, mask, given)
        assert values.dtype == jnp.float32 and (values[~mask] == 0).all() and (values[mask] < 0).all()
        np.testing.assert_allclose(values[mask], lm.log_prob(tokens, drawn)[mask], rtol=2e-5, atol=2e-5)
        expected, gradients = jax.grad(plain_loss)(params), jax.grad(loss)(params)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(other, one, rtol=2e-4, atol=2e-5)
        assert any((np.abs(leaf) > 1e-3).any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_masked_tokens_have_no_gradient(toy):
    """A gradient depends on no log-probability that is masked: not on its weight, and not on padding to the right."""
    config = toy.config(vocab_size=7, max_length=8, loss_chunk=3)
    params = toy.params(config)
    mask = jnp.asarray([[0, 0, 1, 1, 1, 0, 0, 0]])

    @jax.jit
    def gradients(tokens, weight):
        return jax.grad(lambda p: jnp.sum(weight * objective.per_token_logps(p, config, tokens, mask)))(params)

    tokens = jnp.asarray([[3, 1, 4, 1, 5, 2, 6, 5]], jnp.int32)
    weight = jnp.ones((1, 8))
    first = jax.tree.leaves(gradients(tokens, weight))
    assert any((leaf != 0).any() for leaf in first)
    padded = tokens.at[:, 5:].set(0)
    for other in (gradients(tokens, jnp.where(mask, weight, 1e6)), gradients(padded, weight)):
        for one, two in zip(first, jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(one, two)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients(tokens, jnp.where(mask, 0.0, weight))))
    prompt = gradients(tokens.at[0, 0].set(6), weight)  # a prompt is masked, and seen
    assert any((one != two).any() for one, two in zip(first, jax.tree.leaves(prompt), strict=True))


def test_log_probs_per_token_hold_no_large_logits(toy):
    """Forward and backward, as the loss: logits of `loss_chunk` positions at most."""
    config = toy.config(vocab_size=50_257, max_length=256, num_layers=1, loss_chunk=8)
    vocab = sizes.padded_vocab(config)
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))

    def total(params, tokens, mask):
        return objective.per_token_logps(params, config, tokens, mask).sum()

    tokens, mask = (jax.ShapeDtypeStruct((4, 256), dtype) for dtype in (jnp.int32, jnp.bool_))
    shapes = toy.shapes(jax.make_jaxpr(jax.value_and_grad(total))(params, tokens, mask))
    found = [int(np.prod(shape)) for shape in shapes - {(vocab, config.width), (config.width, vocab)} if vocab in shape]
    assert max(found) == 4 * 8 * vocab


def test_log_probs_per_token_refuse_what_does_not_fit(toy):
    config = toy.config(max_length=4)
    tokens = jnp.zeros((2, 4), jnp.int32)
    for arguments, words in (
        ((config, tokens, tokens[:1]), r"mask \(1, 4\)"),
        ((config, tokens, tokens, order.left_to_right(2, 3)), r"order \(2, 3\)"),
        ((config, jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5))), "length 5 exceeds"),
        ((dataclasses.replace(config, kind="denoiser"), tokens, tokens), "denoiser"),
    ):
        with pytest.raises(UserError, match=words):
            objective.per_token_logps({}, *arguments)

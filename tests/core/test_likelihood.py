"""The model is a probability distribution for every order and partition; with one layer its ELBO is a diffusion's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.core import network, objective, order, sizes
from armd_jax.names import AggregatorKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARTS = [
    {"norm": "layernorm", "mlp": "gelu", "tie_embeddings": True},
    {"norm": "rmsnorm", "mlp": "swiglu", "tie_embeddings": False, "neighbours": "both", "qk_norm": True},
    {"norm": "layernorm", "mlp": "swiglu", "tie_embeddings": False, "positional_gain": 0.0, "logit_cap": 4.0},
    {"norm": "rmsnorm", "mlp": "gelu", "tie_embeddings": True, "embedding_scale": "one"},
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "-".join(str(v) for v in p.values()))
@pytest.mark.parametrize("two_stream_layers", range(4))
@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
def test_probabilities_of_all_sequences_sum_to_one(toy, aggregator, two_stream_layers, parts):
    """Summed over every sequence, p = 1 within 1e-5, for random permutations and random partitions into blocks."""
    config = toy.config(aggregator=aggregator, num_layers=3, two_stream_layers=two_stream_layers, **parts)
    params = toy.params(config, seed=two_stream_layers)
    sequences = toy.sequences(3, 4)
    rng = np.random.default_rng(
        [two_stream_layers, typed.choices(AggregatorKind).index(aggregator), PARTS.index(parts)]
    )
    partitions = [toy.blocks(rng, 4) for _ in range(3)]
    permutations = [[[int(p)] for p in rng.permutation(4)] for _ in range(3)]
    for group in (partitions, permutations):  # apart: with one-token blocks alone `shift` takes another path
        drawn = toy.stack(*(order.from_blocks(blocks, len(sequences)) for blocks in group))
        tokens = jnp.asarray(np.tile(sequences, (len(group), 1)))
        log_probs, _ = objective.generation_log_probs(params, config, tokens, drawn)
        probs = np.exp(np.asarray(log_probs, np.float64).sum(axis=1)).reshape(len(group), len(sequences))
        np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-5)
        assert probs.max() > 3 / len(sequences)  # far from uniform, where a leak could hide


def _alphas(num_steps: int, schedule: str) -> np.ndarray:
    t = np.arange(num_steps + 1) / num_steps
    if schedule == "geometric":  # noise from 0.001 to 20, each step the same factor; then stretched to 1 .. 0
        kept = np.exp(-np.geomspace(0.001, 20, num_steps + 1))
        return (kept - kept[-1]) / (kept[0] - kept[-1])
    return 1 - t if schedule == "linear" else np.where(t == 0, 1.0, 1 - np.cos(np.pi / 2 * (1 - t)))


def _diffusion_sums(toy, config, params, tokens: np.ndarray, alpha: np.ndarray) -> tuple[float, float]:
    """Per-timestep sums over all mask patterns: with the ELBO's 1/t-like weight, and with weight 1/T."""
    length, num_steps = len(tokens), len(alpha) - 1
    elbo = simple = 0.0
    for mask in itertools.product([False, True], repeat=length):
        masked = [j for j in range(length) if mask[j]]
        known = [j for j in range(length) if not mask[j]]
        if not masked:
            continue
        drawn = order.from_blocks([part for part in (known, masked) if part])
        log_probs, _ = objective.generation_log_probs(params, config, jnp.asarray(tokens)[None], drawn)
        nll = -float(np.asarray(log_probs, np.float64)[0, len(known) :].sum())
        for t in range(1, num_steps + 1):
            pattern = alpha[t] ** len(known) * (1 - alpha[t]) ** len(masked)
            elbo += pattern * (alpha[t - 1] - alpha[t]) / (1 - alpha[t]) * nll
            simple += pattern * nll / num_steps
    return elbo, simple


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("aggregator", ["positional", "mean"])
def test_mean_over_masking_times_is_the_diffusion_sum(toy, aggregator, schedule):
    """E over tau of the one-pass loss equals the sum over timesteps and mask patterns; `simple` weighs steps alike."""
    # One two-stream layer alone: conditionals depend on the set of earlier tokens, not on its partition into blocks.
    config = toy.config(aggregator=aggregator, num_layers=1, two_stream_layers=1)
    params = toy.params(config, seed=5)
    num_steps, length = 3, 4
    alpha = _alphas(num_steps, schedule)
    tokens = np.asarray([2, 0, 1, 1], np.int32)
    tau = np.asarray(list(itertools.product(range(1, num_steps + 1), repeat=length)), np.int32)
    probability = np.prod((alpha[:-1] - alpha[1:])[tau - 1], axis=1)
    assert probability.sum() == pytest.approx(1.0)
    expected = dict(zip(("elbo", "simple"), _diffusion_sums(toy, config, params, tokens, alpha), strict=True))
    for weight in ("elbo", "simple"):
        drawn = order.from_times(jnp.asarray(tau), num_steps, schedule, weight)
        batch = jnp.broadcast_to(jnp.asarray(tokens), tau.shape)
        log_probs, _ = objective.generation_log_probs(params, config, batch, drawn)
        losses = -(np.asarray(drawn.weight_BN, np.float64) * np.asarray(log_probs, np.float64)).sum(axis=1)
        assert float(probability @ losses) == pytest.approx(expected[weight], rel=2e-6), weight
    assert abs(expected["elbo"] - expected["simple"]) > 1e-2 * expected["elbo"] or schedule == "linear"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
def test_masking_times_are_drawn_with_their_probabilities(schedule):
    """P(tau = t) = alpha_{t-1} - alpha_t, independently at every position."""
    num_steps, batch, length = 4, 20_000, 3
    alpha = order.alphas(num_steps, schedule)
    assert alpha[0] == 1 and abs(alpha[-1]) < 1e-12 and np.all(np.diff(alpha) < 0)
    np.testing.assert_allclose(alpha, _alphas(num_steps, schedule), atol=1e-12)
    drawn = order.masked_diffusion(jax.random.key(3), batch, length, num_steps, schedule, weight="simple")
    # The weights of `simple` tell the times apart.
    gamma = (1 - alpha[1:]) / -np.diff(alpha) / num_steps
    weights = np.asarray(objective.to_natural(drawn, drawn.weight_BN))
    tau = 1 + np.abs(weights[..., None] - gamma).argmin(axis=-1)
    np.testing.assert_allclose(gamma[tau - 1], weights, rtol=1e-5)
    expected = -np.diff(alpha)
    one_hot = tau[..., None] == np.arange(1, num_steps + 1)
    sigma = np.sqrt(expected * (1 - expected) / batch)
    assert np.all(np.abs(one_hot.mean(axis=0) - expected) < 5 * sigma + 1e-9)
    joint = np.einsum("bs,bt->st", one_hot[:, 0].astype(float), one_hot[:, 1].astype(float)) / batch
    both = np.outer(expected, expected)
    assert np.all(np.abs(joint - both) < 5 * np.sqrt(both / batch) + 1e-9)
    # Masked last comes first, and tokens of one time are one block.
    generated = np.take_along_axis(tau, np.asarray(drawn.positions_BN), axis=1)
    assert np.all(np.diff(generated, axis=1) <= 0)
    np.testing.assert_array_equal(np.diff(generated, axis=1) < 0, np.diff(np.asarray(drawn.block_BN), axis=1) == 1)


def test_elbo_weights_are_one():
    """The 1/t of the ELBO is in the draw of the times: gamma is 1 and stays 1."""
    drawn = order.masked_diffusion(jax.random.key(0), 4, 6, 5, "cosine")
    assert np.all(np.asarray(drawn.weight_BN) == 1)


@pytest.mark.slow
def test_one_token_blocks_satisfy_the_chain_rule(toy):
    """With one-token blocks the log-probabilities are the conditionals of the joint they define."""
    config = toy.config(num_layers=3, two_stream_layers=2)
    params = toy.params(config, seed=2)
    sequences = toy.sequences(3, 4)
    drawn = order.from_blocks([[2], [0], [3], [1]], len(sequences))
    log_probs, _ = objective.generation_log_probs(params, config, jnp.asarray(sequences), drawn)
    conditional = np.exp(np.asarray(log_probs, np.float64))
    joint = conditional.prod(axis=1)
    for n, position in enumerate([2, 0, 3, 1]):
        earlier = [2, 0, 3, 1][:n]
        for row in range(0, len(sequences), 7):
            same = np.all(sequences[:, earlier] == sequences[row, earlier], axis=1)
            hit = same & (sequences[:, position] == sequences[row, position])
            assert joint[hit].sum() / joint[same].sum() == pytest.approx(conditional[row, n], abs=1e-5)


def test_probability_covers_real_tokens_only(toy):
    """The padded vocabulary gets exactly no mass: real tokens' probabilities alone sum to one."""
    config = toy.config(vocab_size=5)
    params = toy.params(config)
    h_BND = jax.random.normal(jax.random.key(0), (2, 3, config.width))
    logits = network.head_logits(params, config, h_BND)
    assert logits.shape == (2, 3, sizes.padded_vocab(config)) and logits.dtype == jnp.float32
    assert np.all(np.isneginf(np.asarray(logits)[..., 5:]))
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(logits))[..., :5].sum(axis=-1), 1.0, rtol=1e-6)

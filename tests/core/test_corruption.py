"""Masks of a denoiser: how they are drawn, that the loss's mean is the ELBO, and that no masked token is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import corruption, flops, network, objective, parameters

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def test_masks_by_time_are_independent_and_even():
    """Every token is masked with probability t and weighs 1 / t; the times of a batch cover (0, 1] evenly."""
    batch, length = 64, 400
    drawn = corruption.by_time(jax.random.key(0), jnp.ones((batch, length), bool))
    masked, weight = np.asarray(drawn.masked_BN), np.asarray(drawn.weight_BN, np.float64)
    times = 1 / weight.max(axis=1)
    assert np.all((weight > 0) == masked)
    assert all(len(set(row[row > 0])) == 1 for row in weight)
    assert sorted(np.floor(times * batch * 0.9999).astype(int).tolist()) == list(range(batch))
    assert np.all(np.abs(masked.mean(axis=1) - times) < 5 * np.sqrt(times * (1 - times) / length) + 1e-9)
    correlation = np.corrcoef((masked - times[:, None]).T)[np.triu_indices(length, 1)]
    assert abs(correlation.mean()) < 5 / batch**0.5 / length**0.5


def test_masks_by_count_are_uniform_subsets():
    """k is uniform in 1 .. n, every subset of k tokens is equally likely, and masked tokens weigh n / k."""
    batch, valid = 30_000, np.asarray([True, True, True, False])
    drawn = corruption.by_count(jax.random.key(1), jnp.asarray(np.tile(valid, (batch, 1))))
    masked, weight = np.asarray(drawn.masked_BN), np.asarray(drawn.weight_BN)
    assert not masked[:, 3].any()
    counts = masked.sum(axis=1)
    np.testing.assert_allclose(weight, np.where(masked, 3 / counts[:, None], 0), rtol=1e-6)
    names, numbers = np.unique(masked @ [1, 2, 4, 8], return_counts=True)
    assert names.tolist() == [1, 2, 3, 4, 5, 6, 7]
    expected = batch / 3 / np.asarray([3, 3, 3, 3, 3, 3, 1])
    assert np.all(np.abs(numbers - expected) < 5 * np.sqrt(expected))


def test_a_row_without_tokens_has_no_mask():
    """Rows that only fill up a batch of held-out text count nothing, and their numbers are finite."""
    valid = jnp.asarray([[False] * 4, [True, False, False, False]])
    for draw in (corruption.by_count, corruption.by_time):
        drawn = draw(jax.random.key(2), valid)
        assert not np.asarray(drawn.masked_BN)[~np.asarray(valid)].any()
        assert np.isfinite(np.asarray(drawn.weight_BN)).all()
    assert np.asarray(corruption.by_count(jax.random.key(2), valid).weight_BN).tolist() == [[0] * 4, [1, 0, 0, 0]]


@pytest.mark.parametrize("draw", [corruption.by_time, corruption.by_count])
def test_mean_of_the_loss_is_the_enumerated_elbo(toy, draw):
    """The mean over masks of the loss sums is the sum over all masks, within 4 standard errors and 1%."""
    config = toy.config(kind="denoiser")
    params = toy.params(config, seed=3)
    tokens = np.asarray([[2, 0, 1, 1]], np.int32)
    exact = float(toy.negative_elbo(params, config, tokens)[0])
    batch, repeats = 2048, 40

    @jax.jit
    def estimate(key: jax.Array) -> objective.LossSums:
        rows = jnp.broadcast_to(jnp.asarray(tokens), (batch, 4))
        return objective.loss_sums(params, config, rows, draw(key, jnp.ones(rows.shape, bool)))

    sums = [estimate(key) for key in jax.random.split(jax.random.key(4), repeats)]
    assert all(float(one.tokens) == float(one.weight) == 4 * batch for one in sums)
    assert all(float(one.nll) == float(one.weighted_nll) for one in sums)
    means = np.asarray([float(one.nll) / batch for one in sums])
    error = means.std(ddof=1) / repeats**0.5
    # by_time leaves out times before EARLIEST, which are a thousandth of the integral.
    left_out = corruption.EARLIEST * exact if draw is corruption.by_time else 0.0
    assert abs(means.mean() - exact) < 4 * error + left_out
    assert error < 0.01 * exact


@pytest.mark.parametrize("attention", ["dense", "chunked", "scan"])
def test_masked_tokens_are_not_seen(toy, attention):
    """Logits do not depend on the tokens under masks or in the padding, to the last bit, and do on all others."""
    kernel, scan = ("auto", "on") if attention == "scan" else (attention, "off")
    config = toy.config(
        kind="denoiser", vocab_size=5, max_length=6, attention=kernel, attention_chunk=4, scan_layers=scan
    )
    params = toy.params(config)
    run = jax.jit(lambda *a: network.head_logits(params, config, network.denoise(params, config, *a))[..., :5])
    tokens = np.asarray([[0, 1, 2, 3, 4, 0]], np.int32)
    masked = np.asarray([[False, True, False, True, False, False]])
    valid = np.asarray([[True, True, True, True, True, False]])
    before = np.asarray(run(tokens, masked, valid))[valid]
    for position in range(6):
        changed = tokens.copy()
        changed[0, position] = (changed[0, position] + 1) % 5
        after = np.asarray(run(changed, masked, valid))[valid]
        if masked[0, position] or not valid[0, position]:
            np.testing.assert_array_equal(after, before)
        else:
            assert np.all(np.abs(after - before).max(axis=-1) > 1e-4), position
    assert np.isneginf(network.head_logits(params, config, jnp.ones((1, 1, config.width)))[..., 5:]).all()


@pytest.mark.parametrize("parts", [{}, {"norm": "rmsnorm", "mlp": "swiglu", "tie_embeddings": False}])
def test_a_denoiser_has_the_parameters_of_an_armd(toy, parts):
    """Within 2% they are as many as an ARMD has beside its aggregator; the FLOPs are those of all its layers."""
    sizes = {}
    for kind in ("armd", "denoiser"):
        config = toy.config(kind=kind, num_layers=4, two_stream_layers=2, width=32, **parts)
        params = jax.eval_shape(lambda config=config: parameters.init(jax.random.key(0), config))
        params.pop("aggregator", None)
        sizes[kind] = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes["denoiser"] == pytest.approx(sizes["armd"], rel=0.02)
    one_stream = toy.config(num_layers=4, two_stream_layers=0, aggregator="shift", width=32, **parts)
    found, causal = flops.forward_flops_per_token(config), flops.forward_flops_per_token(one_stream)
    assert (found.projections, found.head, found.aggregator) == (causal.projections, causal.head, 0)
    assert found.attention == causal.attention * 2 * 4 / 5  # 4 keys in place of 5 / 2

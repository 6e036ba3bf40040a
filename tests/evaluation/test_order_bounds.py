"""Bounds from random orders, on a model whose likelihood over all orders can be enumerated."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import order, parameters
from armd_jax.evaluation import order_bounds
from armd_jax.inference import likelihood

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def enumerated() -> types.SimpleNamespace:
    """log p of all 81 sequences of 4 tokens of 3 under all 24 orders, and under their mixture."""
    config = ModelConfig(vocab_size=3, max_length=4, num_layers=2, two_stream_layers=1, width=8, num_heads=2)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.8 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    sequences = np.asarray(list(itertools.product(range(3), repeat=4)), np.int32)
    positions = np.asarray(list(itertools.permutations(range(4))), np.int32)
    drawn = order.one_token_blocks(jnp.asarray(np.tile(positions, (len(sequences), 1))))
    tokens = jnp.asarray(np.repeat(sequences, len(positions), axis=0))
    log_p = np.asarray(likelihood.log_prob(params, config, tokens, drawn), np.float64).sum(axis=1)
    log_p_RK = log_p.reshape(len(sequences), len(positions))
    return types.SimpleNamespace(by_order=log_p_RK, mixture=np.logaddexp.reduce(log_p_RK, axis=1) - np.log(24))


@pytest.mark.slow
def test_the_mixture_over_all_orders_is_a_distribution(enumerated):
    """Its probabilities sum to one, and its logarithm is what the bound from below is with every order once."""
    assert np.exp(enumerated.mixture).sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(order_bounds.lower(enumerated.by_order), enumerated.mixture, rtol=1e-12)
    assert 0.2 < order_bounds.spread(enumerated.by_order) < 2  # orders differ, or there would be nothing to bound


def _expectations(log_p_K: np.ndarray, number: int) -> tuple[float, float | None]:
    """The expected bounds from this many orders, each drawn from those given: over all tuples of them."""
    tuples = np.asarray(list(itertools.product(log_p_K, repeat=number)))
    above = np.mean([order_bounds.upper(row[None])[0] for row in tuples]) if number > 1 else None
    return float(order_bounds.lower(tuples).mean()), above


@pytest.mark.slow
def test_expected_bounds_bracket_the_exact_value_and_tighten(enumerated):
    """Over all draws, not by drawing: from below they rise with K and stay below, and from above they stay above."""
    differ = np.argsort(np.std(enumerated.by_order, axis=1))[[20, 60, 80]]
    for log_p_K, exact in zip(enumerated.by_order[differ], enumerated.mixture[differ], strict=True):
        found = [_expectations(log_p_K, number) for number in (1, 2)]
        lower = [below for below, _ in found]
        lower.append(np.mean(order_bounds.lower(np.asarray(list(itertools.product(log_p_K, repeat=3))))))
        assert lower[0] < lower[1] < lower[2] < exact, (lower, exact)
        assert exact < found[1][1]
        # With K = 64 the rest is small on both sides; 4,000 draws of 64 orders.
        many = np.random.default_rng(0).choice(log_p_K, (4000, 64))
        below, above = order_bounds.lower(many), np.asarray([order_bounds.upper(row[None])[0] for row in many[:1000]])
        noise = 4 * above.std() / len(above) ** 0.5
        assert lower[2] < below.mean() < exact < above.mean() + noise
        assert exact - below.mean() < 0.1 * (exact - lower[0])
        assert above.mean() - exact < 0.1 * (found[1][1] - exact) + noise


@pytest.mark.slow
def test_measured_bounds_bracket_the_exact_value(enumerated):
    """All 81 sequences with 64 drawn orders each: within 4 standard errors, and closer with every doubling of K."""
    rng, exact, tokens = np.random.default_rng(1), -enumerated.mixture.sum() / 324, 324
    drawn = np.stack([rng.choice(row, 64) for row in enumerated.by_order])
    found = order_bounds.measure(drawn, tokens)
    assert list(found) == ["1", "2", "4", "8", "16", "32", "64"]
    found = list(found.values())
    assert found[0].nll_at_least is None and found[0].nll_at_most == pytest.approx(-drawn.mean(axis=1).sum() / tokens)
    for few, more in itertools.pairwise(found):
        assert more.nll_at_most < few.nll_at_most
        assert more.nll_at_least - 4 * more.nll_at_least_error < exact < more.nll_at_most + 4 * more.nll_at_most_error
    assert found[-1].nll_at_most - found[-1].nll_at_least < 0.1 * (found[1].nll_at_most - found[1].nll_at_least)
    assert found[-1].nll_at_most - exact < 0.01 < found[0].nll_at_most - exact
    odd = order_bounds.measure(drawn[:, :6], tokens)
    assert list(odd) == ["1", "2", "4", "6"]


def test_bounds_are_computed_as_they_are_defined():
    """Against loops over rows and draws: s has no part in the order, or in the row, that it bounds."""
    log_p = np.random.default_rng(2).normal(-300, 2, (4, 5))  # no likelihood of this size would survive outside logs
    s = np.asarray([[np.mean(np.exp(np.delete(row, k) + 300)) for k in range(5)] for row in log_p])
    ratio = (np.exp(log_p + 300) / s).mean(axis=1)
    expected = []
    for row in range(4):
        factor = np.delete(ratio, row).mean()
        expected.append(np.log(s[row]).mean() - 300 + np.log(factor) + ratio[row] / factor - 1)
    np.testing.assert_allclose(order_bounds.upper(log_p), expected, rtol=1e-12)
    np.testing.assert_allclose(order_bounds.lower(log_p), np.log(np.exp(log_p + 300).mean(axis=1)) - 300, rtol=1e-12)


def test_standard_errors_are_those_over_draws():
    """Of figures drawn again and again, they are the standard deviation: from groups of draws and by the jackknife."""
    rng, found = np.random.default_rng(3), []
    for _ in range(300):
        found.append(order_bounds.measure(rng.normal(-50, 1, (40, 8)), 100).values())
    for number, bounds in enumerate(zip(*found, strict=True)):
        for value, error in (("nll_at_most", "nll_at_most_error"), ("nll_at_least", "nll_at_least_error")):
            if number or value == "nll_at_most":
                drawn = np.std([getattr(bound, value) for bound in bounds])
                said = np.mean([getattr(bound, error) for bound in bounds])
                assert 0.75 * drawn < said < 1.3 * drawn, (number, value, drawn, said)
    nats = rng.normal(50, 2, (1000, 4))
    assert order_bounds.error_of_mean(nats) == pytest.approx(2 * (1000 / 4) ** 0.5, rel=0.05)
    assert order_bounds.spread(nats) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("num_draws", [6, 7])
def test_the_errors_of_a_single_group_are_those_of_its_own_draws(num_draws):
    """Of 6 or 7 draws, K = 4 uses the first 4: what the others are changes neither its figures nor their errors."""
    log_p = np.random.default_rng(8).normal(-50, 1, (40, num_draws))
    found, alone = order_bounds.measure(log_p, 100)["4"], order_bounds.measure(log_p[:, :4], 100)["4"]
    assert found == alone and None not in (found.nll_at_least_error, found.nll_at_most_error)


@pytest.mark.parametrize(("spread", "bounded"), [(1.0, True), (5.0, False), (500.0, False)])
def test_orders_that_differ_too_much_are_not_bounded_from_above(spread, bounded):
    """If rare orders, which nobody drew, make up the likelihood, the estimate would be too low: there is none."""
    found = order_bounds.measure(np.random.default_rng(4).normal(-500, spread, (64, 8)), 100).values()
    assert [bound.nll_at_least is not None for bound in found] == [False, bounded, bounded, bounded]
    assert all(np.isfinite(bound.nll_at_most) for bound in found)
    one = order_bounds.measure(np.full((2, 1), -5.0), 10)
    assert [(bound.nll_at_most, bound.nll_at_most_error, bound.nll_at_least) for bound in one.values()] == [
        (1.0, None, None)
    ]


def test_few_rows_are_not_bounded_from_above():
    """They would pass the test of their spread just because rare orders were not drawn."""
    log_p = np.random.default_rng(5).normal(-500, 0.1, (order_bounds.MIN_ROWS, 8))
    assert order_bounds.measure(log_p, 100)["8"].nll_at_least is not None
    assert all(bound.nll_at_least is None for bound in order_bounds.measure(log_p[1:], 100).values())


def test_a_row_unlike_the_others_is_seen():
    """Its orders differ far more than those of the others: their mean variance would pass, and the bound be absurd."""
    rng = np.random.default_rng(6)
    log_p = rng.normal(-50, 1, (64, 8))
    log_p[0] = rng.normal(-500, 12, 8)
    assert order_bounds.spread(log_p) ** 2 < np.log(log_p.size)
    assert all(bound.nll_at_least is None for bound in order_bounds.measure(log_p, 100).values())


def test_no_negative_log_likelihood_is_said_to_be_at_least_below_zero():
    """That would be a probability above 1: nothing is said in its place."""
    found = order_bounds.measure(np.random.default_rng(7).normal(0, 0.5, (64, 8)), 100).values()
    assert all(bound.nll_at_least is None or bound.nll_at_least >= 0 for bound in found)
    assert order_bounds.measure(np.full((64, 8), 0.01), 100)["8"].nll_at_least is None

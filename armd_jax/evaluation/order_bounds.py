"""What K random orders say about the likelihood of a text under all orders: a bound from below, and one from above.

A model with orders is also a mixture over them: p(x) is the mean of p(x | order) over all orders, drawn uniformly. Its
logarithm is what is bounded here, row by row, from log p(x | order_k) of K orders that are drawn independently.

- From below, the logarithm of the mean of K likelihoods (as in importance-weighted autoencoders, Burda et al. 2016). By
  Jensen's inequality its expectation is at most log p(x), never falls as K grows, and tends to log p(x). With K = 1 it
  is the expectation of log p(x | order).
- From above, a tangent (TUBE, Ivanov et al. 2026, arXiv 2605.24292): log p <= log s + p / s - 1 for every s > 0, with
  equality at s = p. If s does not depend on an order, replacing p by the likelihood under that order changes nothing in
  expectation. Here s is, for each of the K orders, the mean likelihood under the K - 1 others, times a factor for all
  that these miss, which is fitted on the other rows. The choice of s is ours. The expectation is at least log p(x) for
  every K >= 2, and tends to it.

Both hold in expectation over the draws, not for each of them. If likelihoods under different orders differ by many
nats, rare orders dominate p(x). The bound from below is then loose, but remains one. The expectation of the bound from
above is then made of rare draws: before one is seen, its estimate is too low, and so is its standard error. The
variance of a likelihood in units of its squared mean is exp(v) - 1 if its logarithm is normal with variance v.
`measure` gives no bound from above of fewer than `MIN_ROWS` rows, nor if the mean of exp(v) over rows exceeds the
number of draws of all rows. A figure that is given is one that passed this test, and only without the test is its
expectation a bound: few rows would pass it just because their rare orders were not drawn. The test rests on logarithms
that are nearly normal. It is no protection against a rare order, far better than all others, that nobody drew.
"""

import numpy as np

from armd_jax.evaluation.results import OrderBound

MIN_ROWS = 32  # of fewer rows, no bound on log p from above is given


def lower(log_p_RK: np.ndarray) -> np.ndarray:
    """[R] float64: log of the mean of K likelihoods of each row."""
    return _log_mean(np.asarray(log_p_RK, np.float64))


def upper(log_p_RK: np.ndarray) -> np.ndarray:
    """[R] float64: the tangent bound of each row from K >= 2 orders.

    The factor that is fitted on the other rows suits a row best if orders differ as much in it as in those.

    It is infinite if it is beyond what a float holds.
    """
    log_p_RK = np.asarray(log_p_RK, np.float64)
    log_s_RK = _log_mean_of_others(log_p_RK)
    log_ratio_R = _log_mean(log_p_RK - log_s_RK)
    # The factor that makes the sum over rows lowest is the mean ratio. A row's own draws must not choose it: that would
    # be too low.
    log_factor_R = _log_mean_of_others(log_ratio_R[None])[0] if len(log_ratio_R) > 1 else np.zeros(1)
    with np.errstate(over="ignore"):
        return log_s_RK.mean(axis=1) + log_factor_R + np.exp(log_ratio_R - log_factor_R) - 1.0


def measure(log_p_RK: np.ndarray, tokens: int) -> dict[str, OrderBound]:
    """The bounds from 1, 2, 4 … and all K orders, in nats per token of all R rows together, by their number.

    Fewer than K orders are taken as often as the K draws allow, each draw once, and the results averaged. Standard
    errors are those over draws, for these rows: from the differences between these groups of draws in every row. If
    there is one group only, they are estimated by leaving out one of its draws after another (jackknife).
    There is no bound on log p from above if rows are few, or if orders differ too much for the number of draws (see
    above), and none that would be a negative log-likelihood below 0.
    """
    log_p_RK = np.asarray(log_p_RK, np.float64)
    num_draws = log_p_RK.shape[1]
    powers = [2**i for i in range(num_draws.bit_length()) if 2**i < num_draws]
    can_bound_above = _can_bound_above(log_p_RK)
    found = {}
    for number in [*powers, num_draws]:
        groups = [log_p_RK[:, first : first + number] for first in range(0, num_draws - number + 1, number)]
        below, below_error = _mean_and_error([lower(group) for group in groups])
        above = above_error = None
        if below_error is None and number > 1:
            below_error = _jackknife([lower(np.delete(groups[0], draw, axis=1)) for draw in range(number)])
        if can_bound_above and number > 1:
            above, above_error = _mean_and_error([upper(group) for group in groups])
            if above_error is None and number > 2:
                above_error = _jackknife([upper(np.delete(groups[0], draw, axis=1)) for draw in range(number)])
        if above is not None and above > 0:  # no probability of a text exceeds 1
            above = above_error = None
        found[str(number)] = OrderBound(
            nll_at_most=-below / tokens,
            nll_at_most_error=None if below_error is None else below_error / tokens,
            nll_at_least=None if above is None else -above / tokens,
            nll_at_least_error=None if above_error is None else above_error / tokens,
        )
    return found


def _can_bound_above(log_p_RK: np.ndarray) -> bool:
    num_rows, num_draws = log_p_RK.shape
    if num_draws < 2 or num_rows < MIN_ROWS:
        return False
    # Not the mean variance: a single row in which orders differ by far more than in the others dominates the bound.
    relative = _log_mean(np.var(log_p_RK, axis=1, ddof=1)[None])[0]
    return bool(relative <= np.log(log_p_RK.size))


def spread(nats_RK: np.ndarray) -> float:
    """The standard deviation of a row's nats over orders: the root of its variance averaged over rows."""
    return float(np.sqrt(np.var(nats_RK, axis=1, ddof=1).mean()))


def error_of_mean(nats_RK: np.ndarray) -> float:
    """The standard error, over orders, of the sum over rows of the mean nats over K >= 2 orders."""
    return float(np.sqrt((np.var(nats_RK, axis=1, ddof=1) / nats_RK.shape[1]).sum()))


def _mean_and_error(values: list[np.ndarray]) -> tuple[float, float | None]:
    """The sum over rows of the mean of independent estimates [R], and its standard error if there are several."""
    values_RG = np.stack(values, axis=1)
    return float(values_RG.mean(axis=1).sum()), error_of_mean(values_RG) if len(values) > 1 else None


def _jackknife(without_one: list[np.ndarray]) -> float:
    values_KR = np.stack(without_one)
    return float(np.sqrt((len(values_KR) - 1) * np.var(values_KR, axis=0).sum()))


def _log_mean(log_p_RK: np.ndarray) -> np.ndarray:
    sums_R: np.ndarray = np.logaddexp.reduce(log_p_RK, axis=1)
    return sums_R - np.log(log_p_RK.shape[1])


def _log_mean_of_others(log_p_RK: np.ndarray) -> np.ndarray:
    """[R, K]: log of the mean of the K - 1 other likelihoods, added up and never subtracted."""
    nothing_R1 = np.full((len(log_p_RK), 1), -np.inf)
    before_RK = np.hstack([nothing_R1, np.logaddexp.accumulate(log_p_RK, axis=1)[:, :-1]])
    behind_RK = np.hstack([np.logaddexp.accumulate(log_p_RK[:, ::-1], axis=1)[:, ::-1][:, 1:], nothing_R1])
    return np.logaddexp(before_RK, behind_RK) - np.log(log_p_RK.shape[1] - 1)

"""Which source each row comes from: the shares of every stretch, numbers without a gap, places known by themselves."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from armd_jax.data.interleaving import Interleaving

PLACES = 1500
WEIGHTS = st.lists(st.fractions(Fraction(1, 10**6), 10**6, max_denominator=10**9), min_size=1, max_size=12)


def _shares(weights):
    return [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]


def _counts(sources, number):
    """int[places, sources]: how many of the first places each source has."""
    return np.cumsum(sources[:, None] == np.arange(number), axis=0)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS)
@example(weights=[1] * 12)  # a tree whose levels divide evenly
@example(weights=[2**power for power in range(12)])  # a chain: the deepest tree
@example(weights=[Fraction(1, 10**6), 10**6])
def test_every_stretch_has_the_shares(weights):
    """Of the first n places each source has its share, less than two away; its own places are 0, 1, 2, … ."""
    shares = _shares(weights)
    sources, places = Interleaving(shares)(np.arange(PLACES))
    counts = _counts(sources, len(shares))
    exact = np.arange(1, PLACES + 1)[:, None] * np.array([float(share) for share in shares])
    assert np.abs(counts - exact).max() < 2
    for number in range(len(shares)):
        assert (places[sources == number] == np.arange(counts[-1, number])).all()


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 10**13), part=st.lists(st.integers(0, 63), unique=True))
def test_a_place_is_known_without_those_before_it(weights, first, part):
    """However far out it is, and whatever is asked for beside it."""
    interleave = Interleaving(_shares(weights))
    whole = interleave(first + np.arange(64))
    for found, expected in zip(interleave(first + np.sort(np.array(part, np.int64))), whole, strict=True):
        assert found.dtype == np.int64 and (found == expected[np.sort(np.array(part, np.int64))]).all()
    sources, places = whole
    for number in set(sources.tolist()):
        mine = places[sources == number]
        assert (mine == mine[0] + np.arange(len(mine))).all()
        assert abs(int(mine[0]) - first * _shares(weights)[number]) < 2


@given(numerators=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_shares_are_exact_after_a_whole_period(numerators):
    total = sum(numerators)
    sources, _ = Interleaving([Fraction(part, total) for part in numerators])(np.arange(3 * total))
    counts = _counts(sources, len(numerators))
    assert counts[total - 1 :: total].tolist() == [[n * part for part in numerators] for n in (1, 2, 3)]


def test_one_source_has_every_place():
    sources, places = Interleaving([Fraction(1)])(np.arange(7, 12))
    assert sources.tolist() == [0] * 5 and places.tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("shares", [[], [Fraction(1, 2)], [Fraction(0), Fraction(1)], [Fraction(-1), Fraction(2)]])
def test_what_are_no_shares(shares):
    with pytest.raises(ValueError, match="must be above 0 and add up to 1"):
        Interleaving(shares)

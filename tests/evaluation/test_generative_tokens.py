"""Entropy, distinct n-grams and repetition: hand-made texts whose figures are known."""

import math

import numpy as np
import pytest

from armd_jax.evaluation import generative_tokens
from armd_jax.evaluation.generative_tokens import Variety

CONSTANT, UNIFORM, LOOP = [5] * 12, list(range(12)), [7, 8] * 6


def test_a_text_of_different_tokens():
    """As varied as 12 tokens can be."""
    found = generative_tokens.variety([UNIFORM])
    assert found.entropy_nats == pytest.approx(math.log(12)) and found.entropy_bits == pytest.approx(math.log2(12))
    assert (found.distinct_1, found.distinct_2, found.distinct_3) == (1, 1, 1)
    assert (found.repetition, found.longest_repeat) == (0, 0)


def test_a_text_of_one_token():
    """No entropy; of 12, 11 and 10 n-grams one is different; 11 tokens come twice, one place apart."""
    found = generative_tokens.variety([CONSTANT])
    assert found.entropy_nats == found.corpus_entropy_nats == 0 and math.copysign(1, found.entropy_nats) == 1
    assert (found.distinct_1, found.distinct_2, found.distinct_3) == (1 / 12, 1 / 11, 1 / 10)
    assert found.repetition == pytest.approx(1 - 1 / 9) and found.longest_repeat == 11


def test_a_loop_of_two_tokens():
    """One bit; two n-grams of every length; the text repeats itself two places later."""
    found = generative_tokens.variety([LOOP])
    assert found.entropy_bits == pytest.approx(1) and found.entropy_nats == pytest.approx(math.log(2))
    assert (found.distinct_1, found.distinct_2, found.distinct_3) == (2 / 12, 2 / 11, 2 / 10)
    assert found.repetition == pytest.approx(1 - 2 / 9) and found.longest_repeat == 10


def test_entropy_within_texts_and_over_all():
    """Two texts of one token each have no entropy within, and one bit together; n-grams do not cross texts."""
    found = generative_tokens.variety([[1] * 8, [2] * 8])
    assert found.entropy_nats == 0 and found.corpus_entropy_bits == pytest.approx(1)
    assert found.corpus_entropy_nats == pytest.approx(math.log(2))
    assert found.distinct_1 == 2 / 16 and found.distinct_2 == 2 / 14
    assert generative_tokens.variety([UNIFORM, CONSTANT]).entropy_nats == pytest.approx(math.log(12) / 2)
    assert generative_tokens.variety([UNIFORM, CONSTANT]).repetition == pytest.approx((1 - 1 / 9) / 2)


def test_short_texts_have_fewer_figures():
    """What no text is long enough for is not known, and texts without tokens change nothing."""
    found = generative_tokens.variety([[3, 3], []])
    assert found.distinct_2 == 1 and found.distinct_3 is None and found.repetition is None
    assert found.longest_repeat == 1
    assert generative_tokens.variety([]) == generative_tokens.variety([[]]) == Variety()


def test_the_longest_repeat_is_that_of_a_search_for_every_stretch():
    """Against trying all pairs of places, on random texts of few tokens."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 17, 40):
        text = rng.integers(0, 3, size).tolist()
        pairs = [(i, j) for i in range(size) for j in range(i)]
        longest = max(
            (k for i, j in pairs for k in range(1, size - i + 1) if text[i : i + k] == text[j : j + k]), default=0
        )
        assert generative_tokens.longest_repeat(text) == longest

"""Which tokens can be drawn after truncation: exactly those that top-k and top-p promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.inference import draw as drawing
from armd_jax.inference.draw import Draw

VOCAB = 50_304


def _kept(monkeypatch, draw: Draw, logits: np.ndarray) -> np.ndarray:
    """bool [V]: the tokens that have mass when the token is drawn."""
    seen = []
    monkeypatch.setattr(
        drawing, "categorical", lambda noise, logits: (seen.append(logits), jnp.argmax(logits, -1).astype(jnp.int32))[1]
    )
    draw(jax.random.key(0), jnp.asarray(logits, jnp.float32)[None, None])
    return np.asarray(seen[0][0, 0] > -np.inf)


def test_a_nucleus_of_everything_truncates_nothing(monkeypatch):
    """top_p = 1 keeps every token of a large vocabulary, in draws whose probabilities range over many magnitudes."""
    for seed in range(8):
        logits = 4 * np.random.default_rng(seed).standard_normal(VOCAB)
        for top_p in (1.0, 1 - 1e-9):  # the latter is 1 in float32
            assert _kept(monkeypatch, Draw.make(top_p=top_p), logits).all()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99, 0.9999, 0.999999])
def test_a_nucleus_is_the_one_of_exact_arithmetic(monkeypatch, top_p):
    """The number of tokens that are kept is that of float64, to the last few tokens of the tail."""
    for seed in range(4):
        logits = (4 * np.random.default_rng(seed).standard_normal(VOCAB)).astype(np.float32)
        ordered = np.sort(logits.astype(np.float64))[::-1]
        p = np.exp(ordered - ordered[0])
        before = np.concatenate([[0], np.cumsum(p)[:-1]]) / p.sum()
        expected = int((before < float(np.float32(top_p))).sum())
        kept = _kept(monkeypatch, Draw.make(top_p=top_p), logits)
        assert abs(int(kept.sum()) - expected) <= 1 + expected // 1000
        assert logits[kept].min() > logits[~kept].max()


def test_a_tiny_nucleus_is_the_likeliest_token(monkeypatch):
    """However small top_p is, one token is left."""
    logits = np.random.default_rng(0).standard_normal(300)
    for top_p in (1e-3, 1e-30):
        assert np.flatnonzero(_kept(monkeypatch, Draw.make(top_p=top_p), logits)).tolist() == [int(logits.argmax())]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 299, 300, 301, 10**6])
def test_ties_keep_no_more_than_k(monkeypatch, k):
    """Of equally likely tokens the first are kept; of all tokens never more than k, and k if there are that many."""
    logits = np.random.default_rng(1).integers(0, 4, 300).astype(np.float32)  # many of each value
    kept = _kept(monkeypatch, Draw.make(top_k=k), logits)
    likeliest = np.argsort(-logits, kind="stable")[:k]
    assert np.array_equal(np.flatnonzero(kept), np.sort(likeliest))


def test_ties_keep_no_more_than_the_nucleus(monkeypatch):
    """Of 128 tokens of the same probability, half of the mass is 64 tokens, and a quarter of what top-k leaves is 8."""
    same = np.zeros(128)
    assert np.flatnonzero(_kept(monkeypatch, Draw.make(top_p=0.5), same)).tolist() == list(range(64))
    assert np.flatnonzero(_kept(monkeypatch, Draw.make(top_k=32, top_p=0.25), same)).tolist() == list(range(8))


def test_truncated_tokens_are_never_drawn():
    """2,000 real draws of a vocabulary with ties stay among the first k, and reach all of them."""
    logits = jnp.zeros((1, 2000, 256), jnp.float32)
    tokens = np.asarray(Draw.make(top_k=5)(jax.random.key(3), logits))
    assert set(tokens.ravel().tolist()) == set(range(5))
    rows = jnp.broadcast_to(jnp.arange(256, dtype=jnp.float32) // 64, (1, 2000, 256))  # the last 64 share most mass
    tokens = np.asarray(Draw.make(top_p=0.3)(jax.random.key(4), rows))
    assert tokens.min() == 192 and tokens.max() < 256 and len(set(tokens.ravel().tolist())) < 64

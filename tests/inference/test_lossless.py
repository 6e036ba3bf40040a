"""Lossless parallel decoding has the law of left-to-right decoding, and writes several tokens per call."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from armd_jax import order, typed
from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.errors import UserError
from armd_jax.inference import lossless
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import AggregatorKind

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

VOCAB, LENGTH, DRAWS, TOLERANCE = 3, 4, 6144, 1e-4


@functools.cache
def _model(aggregator: AggregatorKind = "neighbours", two_stream_layers: int = 2, **changes: int) -> LanguageModel:
    """A model whose weights are large and nowhere zero, so that every cached entry matters."""
    fields: dict[str, Any] = dict(vocab_size=VOCAB, max_length=LENGTH, num_layers=3, width=16, num_heads=2)
    fields |= dict(mlp_width=32, positional_width=8, dtype="float32", scan_layers="off") | changes
    config = ModelConfig(**fields, aggregator=aggregator, two_stream_layers=two_stream_layers)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    return LanguageModel(
        config, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    )


def _left_to_right(lm: LanguageModel, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The probability [V^N] of every sequence if tokens are drawn one by one; float64, from the parallel forward."""
    sequences = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    logits = np.asarray(lm.logits(sequences, order.left_to_right(len(sequences), LENGTH)), np.float64) / temperature
    if top_k is not None:
        logits = np.where(logits >= np.sort(logits, axis=-1)[..., -top_k, None], logits, -np.inf)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        descending = np.argsort(-p, axis=-1)
        mass = np.take_along_axis(p, descending, axis=-1)
        kept = np.empty(p.shape, bool)
        np.put_along_axis(kept, descending, np.cumsum(mass, axis=-1) - mass < top_p, axis=-1)
        p = np.where(kept, p, 0)
        p /= p.sum(axis=-1, keepdims=True)
    return np.prod(np.take_along_axis(p, sequences[..., None], axis=-1)[..., 0], axis=1)


@pytest.mark.parametrize(
    ("aggregator", "two_stream_layers", "streams", "temperature", "top_k", "top_p"),
    [
        ("neighbours", 2, 2, 1.0, None, None),
        ("neighbours", 3, 4, 1.3, 2, None),
        ("positional", 3, 3, 1.0, None, 0.8),
    ],
)
def test_all_sequences_have_their_left_to_right_probability(
    aggregator, two_stream_layers, streams, temperature, top_k, top_p
):
    """Chi-square over all 81 sequences of 4 tokens at a level of 0.1%; some drafts are refused."""
    lm = _model(aggregator, two_stream_layers)
    expected = DRAWS * _left_to_right(lm, temperature, top_k, top_p)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    out = lm.generate(DRAWS, mode="lossless", streams=streams, **how)
    found = np.bincount(out.tokens_BN @ VOCAB ** np.arange(LENGTH)[::-1], minlength=len(expected))
    assert found[expected == 0].sum() == 0
    often = expected >= 5
    pairs = [np.append(a[often], a[~often].sum()) for a in (found, expected)]
    statistic = np.sum((pairs[0] - pairs[1]) ** 2 / np.maximum(pairs[1], 1e-9))
    assert scipy.stats.chi2.sf(statistic, often.sum()) > 1e-3
    assert 0.1 * out.drafted < out.accepted < 0.995 * out.drafted


@pytest.mark.parametrize("streams", [2, 3, 8])
def test_greedy_is_greedy(streams):
    """50 prompts of different lengths: the tokens of one stream, with their log-probabilities, in fewer calls."""
    lm = _model(vocab_size=50, max_length=48, width=32)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 50, length).tolist() for length in rng.integers(0, 40, 50)]
    expected = lm.generate(prompt=prompts, temperature=0)
    out = lm.generate(prompt=prompts, temperature=0, mode="lossless", streams=streams)
    np.testing.assert_array_equal(out.tokens_BN, expected.tokens_BN)
    np.testing.assert_allclose(out.log_prob_BN, expected.log_prob_BN, atol=TOLERANCE)
    assert out.num_calls < expected.num_calls and 0 < out.accepted < out.drafted and out.streams == streams
    assert (np.diff(np.sort(out.call_BN, axis=1), axis=1) <= 1).all()  # every call of a row makes a token


@pytest.mark.parametrize(
    ("aggregator", "two_stream_layers"), [*((each, 2) for each in typed.choices(AggregatorKind)), ("neighbours", 0)]
)
def test_a_row_does_not_depend_on_the_others(aggregator, two_stream_layers):
    """Rows that keep different numbers of drafts, with gaps and prompts, are what they are alone, and are scored as by
    the parallel forward."""
    lm = _model(aggregator, two_stream_layers, max_length=24, vocab_size=20)
    rows = [[-1] * 24, [1, -1, -1, 2, -1, -1, -1, 0, -1], [2, 1, 0, 0, 1] + [-1] * 9, [1, 2, -1], [1, 2, 0]]
    out = lm.generate(evidence_BN=rows, seed=[5, 6, 7, 8, 9], mode="lossless", streams=3)
    parallel_BN = np.where(out.call_BN < 0, 0, np.asarray(lm.log_prob(out.tokens_BN, out.order)))
    np.testing.assert_allclose(out.log_prob_BN, parallel_BN, atol=TOLERANCE)
    assert out.accepted < out.drafted
    for row, known in enumerate(rows):
        alone = lm.generate(evidence_BN=known, seed=5 + row, mode="lossless", streams=3)
        np.testing.assert_array_equal(out.tokens_BN[row, : len(known)], alone.tokens_BN[0])
        np.testing.assert_array_equal(out.call_BN[row, : len(known)], alone.call_BN[0])


def test_one_stream_drafts_nothing():
    """It makes one token per call and needs no drafts."""
    out = _model().generate(2, mode="lossless", streams=1)
    assert out.call_BN.tolist() == [[1, 2, 3, 4]] * 2 and (out.drafted, out.accepted) == (0, 0)


def test_auto_takes_the_fastest(monkeypatch):
    """Every number of streams is tried once for the same kind of request, and the texts are those of the one chosen."""
    lm, tried = _model(max_length=24), []
    real = lossless.Lossless.__init__
    monkeypatch.setattr(lossless, "_STREAMS_TO_TRY", (1, 3))
    monkeypatch.setattr(
        lossless.Lossless,
        "__init__",
        lambda self, weights, config, request: (tried.append(request.streams), real(self, weights, config, request))[1],
    )
    out = lm.generate(2, mode="lossless", streams="auto", seed=3)
    assert tried[:4] == [1, 1, 3, 3] and tried[4:] == [out.streams]
    again = lm.generate(2, mode="lossless", streams="auto", seed=4)
    assert tried[5:] == [out.streams] == [again.streams]
    np.testing.assert_array_equal(out.tokens_BN, lm.generate(2, mode="lossless", streams=out.streams, seed=3).tokens_BN)
    with pytest.raises(UserError, match="streams='auto': belongs to mode='lossless'"):
        lm.generate(2, streams="auto")

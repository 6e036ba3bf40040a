"""Blocks that are chosen: by the model's confidence, or by where streams begin."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from armd_jax import order
from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import AggregatorKind

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

VOCAB, LENGTH, TOLERANCE = 5, 12, 1e-4
KNOWN = [[-1] * 12, [1, -1, -1, 2, -1, -1, -1, 3, -1], [2] * 5 + [-1] * 5, [1, 2, -1], [3, 4]]
SEEDS = [1, 2, 3, 4, 5]
WAYS: dict[str, dict[str, Any]] = {
    "confident": dict(mode="confident", streams=3, max_entropy=1.2),
    "one by one": dict(mode="confident", streams=1),
    "gaps": dict(starts="gaps"),
    "starts": dict(starts=[[0, 6], [4], [7, 9], [2], []]),
}


@functools.cache
def _model(aggregator: AggregatorKind = "neighbours", two_stream_layers: int = 2) -> LanguageModel:
    """A model whose weights are large and nowhere zero, so that every cached entry matters."""
    fields: dict[str, Any] = dict(vocab_size=VOCAB, max_length=LENGTH, num_layers=3, width=16, num_heads=2)
    fields |= dict(mlp_width=32, positional_width=8, dtype="float32", scan_layers="off", neighbours="both")
    config = ModelConfig(**fields, aggregator=aggregator, two_stream_layers=two_stream_layers)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    return LanguageModel(
        config, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    )


@pytest.mark.parametrize(
    ("aggregator", "two_stream_layers", "way"),
    [
        *(("neighbours", 2, way) for way in WAYS),
        ("neighbours", 0, "confident"),
        ("positional", 3, "confident"),
    ],
)
def test_the_likelihood_is_that_of_the_recorded_order(aggregator, two_stream_layers, way):
    """Rows are what they are alone, and are scored as by the parallel forward under the order that came about."""
    lm, how = _model(aggregator, two_stream_layers), WAYS[way]
    out = lm.generate(evidence_BN=KNOWN, seed=SEEDS, **how)
    expected_BN = np.where(out.call_BN < 0, 0, np.asarray(lm.log_prob(out.tokens_BN, out.order)))
    np.testing.assert_allclose(out.log_prob_BN, expected_BN, atol=TOLERANCE)
    for row, known in enumerate(KNOWN):
        alone = how | ({"starts": how["starts"][row]} if way == "starts" else {})
        one = lm.generate(evidence_BN=known, seed=SEEDS[row], **alone)
        np.testing.assert_array_equal(out.tokens_BN[row, : len(known)], one.tokens_BN[0])
        np.testing.assert_array_equal(out.call_BN[row, : len(known)], one.call_BN[0])
        np.testing.assert_array_equal(
            out.tokens_BN[row, : len(known)][np.array(known) >= 0], [t for t in known if t >= 0]
        )


def test_a_block_is_what_the_model_is_sure_of():
    """Its places are those of least entropy given all that was known: all up to the threshold, at most S, at least
    one."""
    lm, limit, most = _model(), 1.2, 3
    out = lm.generate(6, mode="confident", streams=most, max_entropy=limit, seed=3)
    sizes = set()
    for row in range(6):
        tokens, call = out.tokens_BN[row], out.call_BN[row]
        for number in range(2, call.max() + 1, 2):
            drawn, missing = np.flatnonzero((call > 0) & (call < number)), np.flatnonzero(call >= number)
            earlier = [np.flatnonzero(call == each).tolist() for each in range(2, number, 2)]
            entropy = {}
            for place in missing:  # alone in the next block, so that only what was known decides
                rest = [[int(each)] for each in missing if each != place]
                logits = lm.logits(tokens[None], order.from_blocks([*earlier, [int(place)], *rest]))[0, place]
                law = scipy.special.log_softmax(np.asarray(logits, np.float64))
                entropy[int(place)] = -(np.exp(law) * law).sum()
            ranked = sorted(entropy, key=lambda place: entropy[place])
            sure = [place for place in ranked if entropy[place] <= limit][:most] or ranked[:1]
            assert np.flatnonzero(call == number).tolist() == sorted(sure)
            assert len(drawn) + len(missing) == LENGTH
            sizes.add(len(sure))
    assert sizes == {1, 2, 3}


def test_streams_begin_where_they_are_told():
    """Heads come one by one, and then one token of every stream, as far as each goes."""
    lm = _model()
    assert lm.generate(1, starts=[0, 3, 10]).call_BN.tolist() == [[1, 4, 5, 2, 4, 5, 6, 7, 8, 9, 3, 4]]
    assert lm.generate(1, starts=[5]).call_BN.tolist() == [[1, 3, 4, 5, 6, 2, 3, 4, 5, 6, 7, 8]]
    gaps = lm.generate(evidence_BN=[-1, -1, 2, -1, -1, -1, 1, -1], starts="gaps")
    assert gaps.call_BN.tolist() == [[1, 4, 0, 2, 4, 5, 0, 3]]


def test_equal_distances_are_the_strided_order():
    """Streams that begin at equal distances have the probabilities of strided decoding."""
    lm = _model()
    out = lm.generate(3, starts=[0, 4, 8], seed=2)
    strided = lm.log_prob(out.tokens_BN, order.strided(3, LENGTH, 3))
    np.testing.assert_allclose(out.log_prob_BN, strided, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(starts=[3]), r"starts: position 3 is no free position"),
        (dict(starts="lines"), r"starts='lines': expected positions, or \"gaps\""),
        (dict(starts=[0], streams=2), "in place of a number of streams"),
        (dict(starts=[0], mode="lossless"), "belongs to mode='strided'"),
        (dict(starts=[[0], [1]]), "starts: 2 lists were given for 1 texts"),
        (dict(starts=[99]), "starts: position 99 is no free position"),
        (dict(starts=3), "starts=3: expected a list of positions"),
        (dict(mode="fast"), "mode='fast'"),
        (dict(mode="confident", streams=0), "streams=0: must be at least 1"),
    ],
)
def test_impossible_ways(how, message):
    """Each is one line that says what is wrong."""
    with pytest.raises(UserError, match=message):
        _model().generate(evidence_BN=[-1, -1, -1, 2, -1], **how)

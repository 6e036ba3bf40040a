"""Cached decoding is the parallel model: its probabilities, its number of network calls and its samples."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import order, typed
from armd_jax.config import ModelConfig
from armd_jax.core import network, parameters
from armd_jax.core.cache import Cache
from armd_jax.errors import UserError
from armd_jax.inference import sampler, schedule
from armd_jax.inference.draw import Draw
from armd_jax.inference.generation import Generation
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import AggregatorKind

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH, BATCH, VOCAB = 12, 4, 5
TOLERANCE = 1e-4
EVIDENCE = {"none": (), "prompt": (0, 1, 2), "infill": (0, 3, 4, 8, 11)}
CASES = [*itertools.product((1, 2, 4), EVIDENCE), (5, "none")]  # 12 tokens do not divide into 5 streams
VARIANTS = list(itertools.product(typed.choices(AggregatorKind), (0, 2, 3)))


def _config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = dict(vocab_size=VOCAB, max_length=LENGTH, num_layers=3, two_stream_layers=2, width=16)
    fields |= dict(num_heads=2, mlp_width=32, positional_width=8, dtype="float32", scan_layers="off")
    return ModelConfig(**(fields | changes))


@functools.cache
def _model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model whose weights are large and nowhere zero, so that every cached entry matters."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    return LanguageModel(
        config, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    )


def _evidence(kind: str, batch: int = BATCH) -> np.ndarray | None:
    """Known tokens at the places of `kind`, another row of them for every sequence."""
    if kind == "none":
        return None
    places = list(EVIDENCE[kind])
    known = np.full((batch, LENGTH), -1, np.int32)
    known[:, places] = np.random.default_rng(1).integers(0, VOCAB, (batch, len(places)))
    return known


def _discrepancy(lm: LanguageModel, out: Generation) -> float:
    return float(np.abs(out.log_prob_BN - np.asarray(lm.log_prob(out.tokens_BN, out.order))).max())


def _assert_decodes_exactly(lm: LanguageModel, streams: int, kind: str) -> None:
    known = _evidence(kind)
    out = lm.generate(BATCH, streams=streams, evidence_BN=known, seed=streams)
    assert _discrepancy(lm, out) < TOLERANCE
    assert out.tokens_BN.min() >= 0 and out.tokens_BN.max() < VOCAB
    if known is not None:
        np.testing.assert_array_equal(out.tokens_BN[known >= 0], known[known >= 0])
        assert (out.call_BN[known >= 0] == 0).all()
    free = LENGTH - len(EVIDENCE[kind])
    assert out.num_calls == streams + -(-free // streams) - 1 == out.call_BN.max()


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "kind"), CASES)
def test_cached_log_probs_equal_the_parallel_forward(streams, kind):
    """For every S with no evidence, a prompt, or a gap to fill, decoding reports the parallel log-probabilities."""
    _assert_decodes_exactly(_model(_config()), streams, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregator", "two_stream_layers", "streams", "kind"),
    [(a, m, *CASES[number % len(CASES)]) for number, (a, m) in enumerate(VARIANTS, start=1)],
)
def test_cached_log_probs_for_every_aggregator_and_depth(aggregator, two_stream_layers, streams, kind):
    """The same with each aggregator and with no, some, or only two-stream layers."""
    _assert_decodes_exactly(_model(_config(aggregator=aggregator, two_stream_layers=two_stream_layers)), streams, kind)


def test_prompt_is_evidence_at_the_start():
    """A prompt gives the same tokens and log-probabilities as the same ids written into the evidence."""
    lm, known = _model(_config()), _evidence("prompt")
    by_prompt = lm.generate(BATCH, streams=2, prompt=known[:, :3], seed=5)
    by_evidence = lm.generate(BATCH, streams=2, evidence_BN=known, seed=5)
    np.testing.assert_array_equal(by_prompt.tokens_BN, by_evidence.tokens_BN)
    np.testing.assert_array_equal(by_prompt.log_prob_BN, by_evidence.log_prob_BN)


# Which number of the incoming cache is set to 0: (kind, layer). Each needs a trace of its own.
SPOILED = ["nothing", "x key", "x value", "last x key", "last x value", "g key", "g value", "A", "mean A"]


def _spoil(cache: Cache, kind: str) -> Cache:
    def zeroed(pairs, layer, part):
        pairs = [list(pair) for pair in pairs]
        place = (slice(None), 1, 0) if part else (slice(None), 0, 1)  # values are [B H, N, K], keys [B H, K, N]
        pairs[layer][part] = pairs[layer][part].at[place].set(0.0)
        return tuple(map(tuple, pairs))

    layer, part = (-1 if kind.startswith("last") else 0), int(kind.endswith("value"))
    match kind.split()[-2:]:
        case ["x", _]:
            return cache.replace(x_kv=zeroed(cache.x_kv, layer, part))
        case ["g", _]:
            return cache.replace(g_kv=zeroed(cache.g_kv, layer, part))
        case [*_, "A"]:
            first = (slice(None),) + (0,) * (cache.aggregate.ndim - 1)
            return cache.replace(aggregate=cache.aggregate.at[first].set(0.0))
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPOILED)
def test_every_kind_of_cache_entry_matters(monkeypatch, kind):
    """One number of any cache set to 0 makes decoding differ from the parallel forward; an untouched cache does not."""
    forward = network.forward

    def spoiling(params, config, rows, cache=None, **rest):
        return forward(params, config, rows, None if cache is None else _spoil(cache, kind), **rest)

    monkeypatch.setattr(network, "forward", lambda *args, **rest: spoiling(*args, **rest))
    # A rope_base of its own: nothing that another test compiled is used, nor this by another.
    config = _config(rope_base=5000.0 + SPOILED.index(kind), aggregator="mean" if kind == "mean A" else "positional")
    lm = _model(config)
    out = lm.generate(BATCH, streams=2, seed=3)
    assert (_discrepancy(lm, out) < TOLERANCE) == (kind == "nothing")


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "kind"), [(1, "none"), (4, "none"), (2, "infill"), (4, "prompt")])
def test_number_of_network_calls(monkeypatch, streams, kind):
    """The network itself counts S + N/S - 1 calls, S + ceil(R/S) - 1 with evidence, and `num_calls` says the same.

    Evidence that fits into one chunk is read by one more call.
    """
    forward, count = network.forward, []

    def counted(*args, **rest):
        jax.debug.callback(lambda: count.append(1))
        return forward(*args, **rest)

    # A rope_base of its own: nothing that another test compiled is used.
    places = len(EVIDENCE[kind])
    lm = _model(_config(rope_base=6000.0 + 10 * places + streams, num_layers=2, two_stream_layers=1))
    with monkeypatch.context() as patch:
        patch.setattr(network, "forward", counted)
        out = lm.generate(BATCH, streams=streams, evidence_BN=_evidence(kind))
        jax.effects_barrier()
    assert out.num_calls == streams + -(-(LENGTH - places) // streams) - 1
    assert len(count) == out.num_calls + (places > 0)


@pytest.mark.slow
def test_long_evidence_takes_no_square_of_scores():
    """It is read in chunks: what the program needs beside its result is far below N x N numbers per head."""
    config = _config(max_length=2048)
    plan = schedule.strided(np.full((1, 2048), 1) - 2 * (np.arange(2048) > 2000), 1, 2048)
    params = jax.eval_shape(lambda: parameters.unstack(parameters.init(jax.random.key(0), config)))
    seeds = np.zeros(1, np.int32)
    memory = sampler.begin.lower(params, config, plan, seeds, seeds, size=32).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2048**2 / 2


def test_nothing_to_generate_makes_no_call():
    """With every position known no call is made, the tokens stay, and their log-probabilities are reported."""
    lm = _model(_config())
    known = np.random.default_rng(2).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    out = lm.generate(BATCH, streams=2, evidence_BN=known)
    assert out.num_calls == 0 and (out.call_BN == 0).all()
    np.testing.assert_array_equal(out.tokens_BN, known)
    np.testing.assert_allclose(out.log_prob_BN, lm.log_prob(known, order.left_to_right(BATCH, LENGTH)), atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 3])
def test_frequencies_match_the_probabilities(streams):
    """Counts of 20,000 samples of a model with 27 sequences fit its exact probabilities (chi-square, 26 degrees)."""
    lm = _model(_config(vocab_size=3, max_length=3, num_layers=2, two_stream_layers=1), seed=5)
    sequences = np.array(list(itertools.product(range(3), repeat=3)), np.int32)
    log_prob_BN = np.asarray(lm.log_prob(sequences, order.strided(27, 3, streams)), np.float64)
    expected = 20_000 * np.exp(log_prob_BN.sum(axis=1))
    out = lm.generate(20_000, streams=streams, seed=11)
    observed = np.bincount(out.tokens_BN @ [9, 3, 1], minlength=27)
    assert expected.sum() == pytest.approx(20_000, rel=1e-5)
    assert expected.max() > 3 * 20_000 / 27  # far from uniform
    likely = expected > 5  # the chi-square approximation needs some counts: rare sequences are taken together
    observed, expected = (np.append(a[likely], a[~likely].sum()) for a in (observed, expected))
    assert ((observed - expected) ** 2 / np.maximum(expected, 1)).sum() < 54.1  # 0.1% of the chi-square distribution


def _likelier(lm: LanguageModel, out: Generation) -> np.ndarray:
    """Probability mass of all tokens likelier than the one drawn, at every position [B, N]."""
    p_BNV = np.asarray(jax.nn.softmax(lm.logits(out.tokens_BN, out.order)), np.float64)
    drawn_BN1 = np.take_along_axis(p_BNV, out.tokens_BN[..., None], axis=-1)
    return np.where(p_BNV > drawn_BN1 + 1e-6, p_BNV, 0).sum(axis=-1)


@pytest.mark.slow
def test_greedy_and_truncated_sampling():
    """Temperature 0 and top_k = 1 take the likeliest token, top_p = 0.6 stays in the nucleus and is not greedy."""
    lm = _model(_config())
    greedy = lm.generate(BATCH, streams=2, temperature=0)
    assert _likelier(lm, greedy).max() == 0
    np.testing.assert_array_equal(greedy.tokens_BN, lm.generate(BATCH, streams=2, top_k=1, seed=9).tokens_BN)
    for cold in (1e-20, 1e-40, 1e-300):  # the last two are less than float32 can divide by
        np.testing.assert_array_equal(greedy.tokens_BN, lm.generate(BATCH, streams=2, temperature=cold).tokens_BN)
    nucleus = _likelier(lm, lm.generate(BATCH, streams=2, top_p=0.6, seed=9))
    assert 0 < nucleus.max() < 0.6
    assert _likelier(lm, lm.generate(BATCH, streams=2, seed=9)).max() >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [0.5, 0.25, 0, 0]),
        ({"top_p": 0.7}, [0.5, 0.25, 0, 0]),
        ({"top_p": 0.4}, [0.5, 0, 0, 0]),
        ({"top_p": 0.8, "top_k": 3}, [0.5, 0.25, 0, 0]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
    ],
)
def test_draws_follow_the_truncated_distribution(options, allowed):
    """Frequencies of `Draw` are the probabilities after temperature, top-k and top-p, renormalised; nothing else."""
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1])) + 3.0, (20_000, 1, 4))
    tokens = Draw.make(**options)(jax.random.key(0), logits)
    frequency = np.bincount(np.asarray(tokens)[:, 0], minlength=4) / 20_000
    np.testing.assert_allclose(frequency, np.array(allowed) / sum(allowed), atol=0.015)
    assert (frequency[np.array(allowed) == 0] == 0).all()


def test_seeds_make_samples():
    """The same seed gives the same samples, another seed others, and rows of one batch differ."""
    lm = _model(_config())
    first, again, other = (lm.generate(BATCH, streams=2, seed=seed).tokens_BN for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first[0] != first[1]).any()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"streams": 0}, "streams=0"),
        ({"length": 13}, "max_length"),
        ({"prompt": [0] * 13}, "longer"),
        ({"prompt": [VOCAB]}, f"id {VOCAB}"),
        ({"prompt": [-1]}, "id -1"),
        ({"evidence_BN": np.full((BATCH, LENGTH), -2)}, "id -2"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"batch": 0}, "batch"),
        ({"prompt": "abc"}, "prompt: expected token ids"),
        ({"prompt": [1.5, 2.0]}, "prompt: expected token ids"),
        ({"prompt": [[1, 2], [3]]}, "2 and 4 texts were asked for"),
        ({"prompt": [[1, 2], [[3]]], "batch": 2}, "prompt: expected ids .* got a row of shape"),
        ({"prompt": [1], "max_new_tokens": 12}, "row 0: a prompt of 1 tokens and max_new_tokens=12 are longer than 12"),
        ({"prompt": [1], "max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"prompt": [1], "max_new_tokens": 2, "length": 3}, "max_new_tokens and length: give one of the two"),
        ({"evidence_BN": [-1, 2], "length": 3}, "row 0 has 2 places, but length=3"),
        ({"length": [3, 4]}, "2 and 4 texts were asked for"),
        ({"seed": [[1, 2], [3, 4]]}, "seed=.*: expected a whole number, or one for each text"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True: expected a whole number"),
        ({"seed": 10**30}, "seed=10+: must be in"),
        ({"length": []}, r"length=\[\]: expected a whole number, or one for each text"),
        ({"length": 3.0}, "length=3.0: expected a whole number"),
        ({"max_new_tokens": [[1], [2, 3]]}, "max_new_tokens=.*: expected a whole number"),
        ({"prompt": 5}, "prompt: expected token ids"),
        ({"seed": [0, 0, 0, 2**31]}, "seed=2147483648"),
        ({"evidence_BN": np.zeros((BATCH, LENGTH))}, "evidence_BN: expected token ids"),
    ],
)
def test_impossible_requests_are_user_errors(options, names):
    """Arguments that do not fit one another or the model are refused with the offending value named."""
    lm = _model(_config())
    with pytest.raises(UserError, match=names):
        lm.generate(**({"batch": BATCH} | options))


def test_token_ids_out_of_range_are_user_errors():
    """Scoring refuses ids outside the vocabulary and shapes that the order was not made for."""
    lm, natural = _model(_config()), order.left_to_right(1, LENGTH)
    for wrong in (VOCAB, -1):
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, 3] = wrong
        for score in (lm.log_prob, lm.logits):
            with pytest.raises(UserError, match=f"id {wrong}"):
                score(tokens, natural)
    with pytest.raises(UserError, match="shape"):
        lm.log_prob(np.zeros((1, LENGTH - 1), np.int32), natural)
    with pytest.raises(UserError, match="vocab_size"):
        LanguageModel.create(dataclasses.replace(_config(), vocab_size=0))

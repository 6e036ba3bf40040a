"""Samplers of a denoiser: their distributions, their network calls, and what was given."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import order, typed
from armd_jax.config import ModelConfig
from armd_jax.core import network, parameters
from armd_jax.errors import UserError
from armd_jax.inference import denoise
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import DenoisingSampler

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

VOCAB, FREE = 3, 3
KNOWN = 2  # the token that is given in the middle of a text: without one, all masked positions look alike
TEXTS = [(a, KNOWN, b, c) for a, b, c in itertools.product(range(VOCAB), repeat=FREE)]
PLACES = (0, 2, 3)


def _model(**changes) -> LanguageModel:
    """A denoiser with large random weights, whose predictions depend on their context and are not extreme."""
    fields = {"vocab_size": VOCAB, "max_length": 4, "num_layers": 2, "width": 8, "num_heads": 2, "dtype": "float32"}
    config = ModelConfig(kind="denoiser", tie_embeddings=False, **(fields | changes))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)
    return LanguageModel(config, params | {"head": 0.25 * params["head"]})


def _conditionals(lm: LanguageModel) -> dict:
    """p [N, V] given the known tokens, for every text with None at masked positions."""
    states = [(a, KNOWN, b, c) for a, b, c in itertools.product([None, *range(VOCAB)], repeat=FREE)]
    tokens = jnp.asarray([[token or 0 for token in one] for one in states])
    masked = jnp.asarray([[token is None for token in one] for one in states])
    h = network.denoise(lm.params, lm.config, tokens, masked, jnp.ones_like(masked))
    logits = np.asarray(network.head_logits(lm.params, lm.config, h), np.float64)[..., :VOCAB]
    return dict(zip(states, np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True), strict=True))


def _probability(table: dict, text: tuple[int, ...], plan: list[tuple[int, ...]]) -> float:
    """Of a text, if each element of the plan fills in the positions that it holds."""
    now, found = [None, KNOWN, None, None], 1.0
    for positions in plan:
        p = table[tuple(now)]
        found *= np.prod([p[position, text[position]] for position in positions])
        for position in positions:
            now[position] = text[position]
    return found


def _most_confident_first(table: dict, text: tuple[int, ...]) -> float:
    """Of a text, if the position whose likeliest token is most probable is filled in at every call."""
    now, found = [None, KNOWN, None, None], 1.0
    while None in now:
        p = table[tuple(now)]
        position = max((n for n in PLACES if now[n] is None), key=lambda n: p[n].max())
        found *= p[position, text[position]]
        now[position] = text[position]
    return found


def _exact(lm: LanguageModel, sampler: str) -> np.ndarray:
    """The probability of every text; `ancestral` in two steps."""
    table = _conditionals(lm)
    match sampler:
        case "first_hitting":
            plans = [[(n,) for n in permutation] for permutation in itertools.permutations(PLACES)]
        case "ancestral":
            at = [dict(zip(PLACES, steps, strict=True)) for steps in itertools.product(range(2), repeat=FREE)]
            plans = [[tuple(n for n in PLACES if one[n] == step) for step in range(2)] for one in at]
        case _:
            return np.asarray([_most_confident_first(table, text) for text in TEXTS])
    return np.asarray([np.mean([_probability(table, text, plan) for plan in plans]) for text in TEXTS])


def _draw(lm: LanguageModel, sampler: str, steps: int | None) -> np.ndarray:
    """How often each of the texts was drawn."""
    evidence = np.asarray([-1, KNOWN, -1, -1])
    out = lm.generate(20_000, sampler=sampler, steps=steps, evidence_BN=evidence, seed=1).tokens_BN
    assert np.all(out[:, 1] == KNOWN)
    return np.bincount(out[:, PLACES] @ [9, 3, 1], minlength=len(TEXTS))


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Per degree of freedom, of which there are 26: 2.4 has a probability of 1e-4."""
    wanted = counts.sum() * expected
    assert wanted.min() > 5 and expected.sum() == pytest.approx(1, abs=1e-5)
    return float(((counts - wanted) ** 2 / wanted).sum() / (len(expected) - 1))


@pytest.mark.parametrize("sampler", typed.choices(DenoisingSampler))
def test_samples_follow_the_exact_distribution(sampler):
    """Chi-square against enumeration over all texts and all ways of filling them in, and against the wrong ones."""
    lm = _model()
    expected = {name: _exact(lm, name) for name in typed.choices(DenoisingSampler)}
    counts = _draw(lm, sampler, {"first_hitting": None, "ancestral": 2, "confidence": FREE}[sampler])
    fits = {name: _chi_square(counts, one) for name, one in expected.items()}
    assert fits.pop(sampler) < 2.4
    assert min(fits.values()) > 4  # the distributions differ, so that the test has power


@pytest.mark.parametrize(("sampler", "steps"), [("first_hitting", None), ("ancestral", 2), ("confidence", 2)])
def test_independent_tokens_are_drawn_the_same_by_all(sampler, steps):
    """If residual branches are 0, tokens do not depend on one another, and every sampler draws their product."""
    lm = _model()
    zero = {name: jnp.zeros_like(lm.params["bidirectional"][name]) for name in ("attention_out", "mlp_out")}
    changes = {"bidirectional": lm.params["bidirectional"] | zero, "head": 0.5 * lm.params["head"]}
    lm = lm.replace(params=lm.params | changes)
    p = _conditionals(lm)[(None, KNOWN, None, None)][0]
    counts = _draw(lm, sampler, steps)
    assert _chi_square(counts, np.asarray([p[a] * p[b] * p[c] for a, _, b, c in TEXTS])) < 2.4


def test_network_calls_are_counted_as_they_are_made():
    """First-hitting makes one call per token; ancestral leaves out steps that fill in nothing; confidence spreads."""
    lm, batch, length = _model(max_length=12), 3, 12
    evidence = np.full(length, -1)
    evidence[[0, 1, 7]] = [2, 1, 0]
    cases = [("first_hitting", None), ("ancestral", 4), ("ancestral", 1000), ("ancestral", 1), ("confidence", 4)]
    for sampler, steps in cases:
        out = lm.generate(batch, length, evidence_BN=evidence, sampler=sampler, steps=steps, seed=3)
        assert out.log_prob_BN is None and out.order is None
        assert np.all(out.tokens_BN[:, [0, 1, 7]] == [2, 1, 0]) and np.all(out.tokens_BN < VOCAB)
        assert np.all((out.call_BN == 0) == (evidence >= 0))
        calls = out.call_BN[:, evidence < 0]
        assert set(calls.ravel().tolist()) == set(range(1, out.num_calls + 1)), (sampler, steps)
        match sampler:
            case "first_hitting":
                assert out.num_calls == 9 and all(sorted(row.tolist()) == list(range(1, 10)) for row in calls)
            case "ancestral":
                assert out.num_calls <= min(steps, 27)
                if steps == 1000:
                    assert out.num_calls > 20  # all 27 are seldom at different steps, and many never
                if steps == 1:
                    assert out.num_calls == 1
            case _:
                assert out.num_calls == 3 and [np.bincount(row).tolist() for row in calls] == [[0, 3, 3, 3]] * batch


def test_expected_calls_of_the_ancestral_sampler():
    """T (1 - (1 - 1/T)^R) calls for R tokens in T steps, in the mean."""
    rows = [denoise._by_steps(jax.random.key(seed), 1, 16, 8).max() for seed in range(400)]
    expected = 8 * (1 - (1 - 1 / 8) ** 16)
    assert np.mean(rows) == pytest.approx(expected, abs=5 * np.std(rows) / 20)


def test_tokens_agree_with_the_calls_that_made_them():
    """Greedily, replaying the calls one by one with the network gives the same tokens."""
    lm = _model(max_length=8, vocab_size=3)
    for sampler, steps in (("first_hitting", None), ("ancestral", 3), ("confidence", 3)):
        out = lm.generate(2, 8, temperature=0, prompt=[1, 2], sampler=sampler, steps=steps, seed=4)
        for call in range(1, out.num_calls + 1):
            masked = out.call_BN >= call
            h = network.denoise(lm.params, lm.config, out.tokens_BN, jnp.asarray(masked), jnp.ones((2, 8), bool))
            likeliest = np.asarray(network.head_logits(lm.params, lm.config, h)).argmax(axis=-1)
            assert np.all((likeliest == out.tokens_BN)[out.call_BN == call]), (sampler, call)


def test_logits_in_chunks_change_no_confidence():
    """Greedy samples are the same if logits exist for two positions at a time."""
    lm = _model(max_length=8)
    chunked = dataclasses.replace(lm, config=dataclasses.replace(lm.config, loss_chunk=3))
    for sampler in ("ancestral", "confidence"):
        one, other = (m.generate(2, 8, temperature=0, sampler=sampler, steps=3, seed=5) for m in (lm, chunked))
        np.testing.assert_array_equal(one.tokens_BN, other.tokens_BN)
        np.testing.assert_array_equal(one.call_BN, other.call_BN)


def test_nothing_to_generate_needs_no_call():
    """If all tokens are given they come back, and no call was made."""
    out = _model().generate(evidence_BN=np.asarray([0, 2, 1, 1]), sampler="ancestral", steps=5)
    assert out.tokens_BN.tolist() == [[0, 2, 1, 1]] and out.num_calls == 0 and not out.call_BN.any()


def test_what_a_denoiser_cannot_do_is_one_line():
    """Orders and streams, and samplers that an ARMD does not have, are errors that say what to do instead."""
    lm = _model()
    armd = LanguageModel.create(dataclasses.replace(lm.config, kind="armd", two_stream_layers=1))
    cases = [
        (lambda: lm.generate(mode="lossless"), "mode='lossless': a denoiser has no modes"),
        (lambda: lm.generate(starts=[0]), "starts=.* belongs to an ARMD"),
        (lambda: lm.generate(end_bias=1.0), "end_bias=1.0: belongs to an ARMD"),
        (lambda: lm.generate(streams=2), "streams=2: a denoiser has no streams; choose sampler and steps"),
        (lambda: lm.generate(sampler="ancestrall"), "sampler='ancestrall' is not known; did you mean 'ancestral'"),
        (lambda: lm.generate(steps=2), "sampler='first_hitting' takes one step per token; leave steps out"),
        (lambda: lm.generate(sampler="ancestral", steps=0), "steps=0: must be at least 1"),
        (lambda: lm.log_prob(np.zeros((1, 3), int), order.left_to_right(1, 3)), "log_prob: a denoiser .* armd eval"),
        (lambda: lm.logits(np.zeros((1, 3), int), order.left_to_right(1, 3)), "logits: a denoiser .* armd eval"),
        (lambda: armd.generate(sampler="ancestral"), "belong to a denoiser .* choose streams"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)

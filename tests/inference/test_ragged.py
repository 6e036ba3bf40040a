"""Texts that differ in what they know and in length: each is what it would be alone, and few programs are compiled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armd_jax import order, typed
from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.inference import schedule
from armd_jax.inference.generation import Generation
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import AggregatorKind

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

LENGTH, VOCAB, TOLERANCE = 12, 5, 1e-4


@functools.cache
def _model(aggregator: AggregatorKind = "neighbours", length: int = LENGTH, vocab_size: int = VOCAB) -> LanguageModel:
    """A model whose weights are large and nowhere zero, so that every cached entry matters."""
    fields: dict[str, Any] = dict(vocab_size=vocab_size, max_length=length, num_layers=3, two_stream_layers=2, width=16)
    fields |= dict(num_heads=2, mlp_width=32, positional_width=8, dtype="float32", scan_layers="off")
    config = ModelConfig(**fields, aggregator=aggregator, neighbours="both")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    return LanguageModel(
        config, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    )


def _assert_rows_are_as_alone(lm: LanguageModel, rows: list[list[int]], seeds: list[int], streams: int) -> None:
    """Tokens, calls and ends are equal; log-probabilities are those of the row alone and of the parallel forward."""
    out = lm.generate(evidence_BN=rows, seed=seeds, streams=streams)
    parallel_BN = np.asarray(lm.log_prob(out.tokens_BN, out.order))
    for row, (known, seed) in enumerate(zip(rows, seeds, strict=True)):
        here = slice(0, len(known))
        alone = lm.generate(evidence_BN=known, seed=seed, streams=streams)
        np.testing.assert_array_equal(out.tokens_BN[row, here], alone.tokens_BN[0])
        np.testing.assert_array_equal(out.call_BN[row, here], alone.call_BN[0])
        np.testing.assert_allclose(out.log_prob_BN[row, here], alone.log_prob_BN[0], atol=TOLERANCE)
        np.testing.assert_allclose(out.log_prob_BN[row, here], parallel_BN[row, here], atol=TOLERANCE)
        given = np.asarray(known) >= 0
        np.testing.assert_array_equal(out.tokens_BN[row, here][given], np.asarray(known)[given])
        assert (out.call_BN[row, here] == 0).tolist() == given.tolist()
        assert (out.call_BN[row, len(known) :] == -1).all() and (out.log_prob_BN[row, len(known) :] == 0).all()
        assert out.end_B[row] == len(known) and alone.num_calls <= out.num_calls


@st.composite
def _requests(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    """Three texts with random places known, and at least as many free ones as streams in each."""
    streams = draw(st.sampled_from((1, 2, 4)))
    rows = []
    for _ in range(3):
        length = draw(st.integers(9, LENGTH))
        row = draw(st.lists(st.integers(-1, VOCAB - 1), min_size=length, max_size=length))
        for place in draw(st.permutations(range(length)))[:streams]:
            row[place] = -1
        rows.append(row)
    return rows, draw(st.lists(st.integers(0, 1000), min_size=3, max_size=3)), streams


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_requests())
def test_a_row_does_not_depend_on_the_others(request_):
    """Random places known, in texts of different lengths, in one, two and four streams."""
    _assert_rows_are_as_alone(_model(), *request_)


@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
def test_a_row_does_not_depend_on_the_others_with_any_aggregator(aggregator):
    """Padding enters no sum and no mean; the longest row has the least to generate, and one row is complete."""
    rows = [[-1] * 6, [1, -1, 2, -1, -1, 3, 0, 4, 2, -1, -1, 1], [2, 3, 1, -1, -1, -1, -1, -1], [1, 2, 3]]
    _assert_rows_are_as_alone(_model(aggregator), rows, [3, 1, 4, 1], 2)


def test_evidence_of_many_chunks():
    """Evidence that several calls read, the last of them in part, is scored as by the parallel forward."""
    lm = _model(length=100)
    rng = np.random.default_rng(3)
    rows = [
        rng.integers(0, VOCAB, count).tolist() + [-1] * more for count, more in ((96, 4), (33, 20), (64, 5), (1, 9))
    ]
    _assert_rows_are_as_alone(lm, rows, [5, 6, 7, 8], 1)


@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
@pytest.mark.parametrize(("length", "evidence"), [(100, 98), (40, 35)])
def test_a_last_chunk_that_does_not_fit(aggregator, length, evidence):
    """It begins earlier, and what it then reads for a second time counts once."""
    lm = _model(aggregator, length)
    row = np.random.default_rng(3).integers(0, VOCAB, evidence).tolist() + [-1] * (length - evidence)
    _assert_rows_are_as_alone(lm, [row], [5], 1)


def test_nothing_to_generate_in_texts_of_different_lengths():
    """No call is made, every known token has its log-probability, and there is nothing behind a shorter text."""
    lm = _model()
    rows = [[1, 2, 3], [2, 1]]
    out = lm.generate(evidence_BN=rows)
    assert out.num_calls == 0 and out.call_BN.tolist() == [[0, 0, 0], [0, 0, -1]] and out.end_B.tolist() == [3, 2]
    for row, known in enumerate(rows):
        expected = lm.log_prob([known], order.left_to_right(1, len(known)))[0]
        np.testing.assert_allclose(out.log_prob_BN[row, : len(known)], expected, atol=TOLERANCE)
    assert out.log_prob_BN[1, 2] == 0


def test_gradients_pass_through_the_score():
    """At every size, those that are rounded up too."""
    lm = _model()
    tokens = np.ones((3, 7), np.int32)
    score = lambda params: lm.replace(params=params).log_prob(tokens, order.left_to_right(3, 7)).sum()  # noqa: E731
    found = jax.grad(score)(lm.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found)) > 0


def test_fewer_places_than_streams():
    """Such a text has as many streams as places, so that each place is a head; another in the batch has all streams."""
    rows = [[1, 2, -1, 3, -1], [0, -1, -1, -1, -1, -1, -1]]
    lm = _model()
    out = lm.generate(evidence_BN=rows, streams=3, seed=2)
    assert out.call_BN[0].tolist() == [0, 0, 1, 0, 2, -1, -1] and out.num_calls == 3 + 2 - 1
    _assert_rows_are_as_alone(lm, rows, [2, 3], 3)  # alone, there are more streams than places as well
    np.testing.assert_allclose(
        out.log_prob_BN, np.where(out.call_BN < 0, 0, lm.log_prob(out.tokens_BN, out.order)), atol=TOLERANCE
    )


def test_prompts_of_different_lengths():
    """As ids; up to one length for all, up to one for each, or with so many new tokens each."""
    lm = _model()
    prompts = [[1], [2, 3, 4, 0], []]
    for lengths, asked in (
        ([LENGTH] * 3, {}),
        ([8, 8, 8], {"length": 8}),
        ([3, 9, 4], {"length": [3, 9, 4]}),
        ([6, 9, 5], {"max_new_tokens": 5}),
        ([2, 4, 3], {"max_new_tokens": [1, 0, 3]}),
    ):
        out = lm.generate(prompt=prompts, seed=[7, 8, 9], **asked)
        assert out.end_B.tolist() == lengths and out.tokens_BN.shape == (3, max(lengths))
        rows = [prompt + [-1] * (length - len(prompt)) for prompt, length in zip(prompts, lengths, strict=True)]
        expected = lm.generate(evidence_BN=rows, seed=[7, 8, 9])
        for name in ("tokens_BN", "log_prob_BN", "call_BN"):
            np.testing.assert_array_equal(getattr(out, name), getattr(expected, name))


def test_rows_of_one_seed_differ():
    """Text b of a batch with one seed has the b-th random numbers, whatever the batch; a seed of its own makes it the
    first text of that seed."""
    lm = _model()
    three, five = (lm.generate(batch, seed=4).tokens_BN for batch in (3, 5))
    np.testing.assert_array_equal(three, five[:3])
    assert len({tuple(row) for row in five.tolist()}) == 5
    of_their_own = lm.generate(seed=[4, 9, 4]).tokens_BN
    np.testing.assert_array_equal(of_their_own, np.stack([five[0], lm.generate(1, seed=9).tokens_BN[0], five[0]]))


def _with_bytes() -> LanguageModel:
    """A model of bytes that ends a text about once in 20 tokens."""
    tokenizer = BytesTokenizer()
    lm = _model(length=64, vocab_size=tokenizer.vocab_size)
    table = np.array(lm.params["embedding"])
    table[tokenizer.end_of_text] *= 2.5
    return dataclasses.replace(lm, params=lm.params | {"embedding": jnp.asarray(table)}, tokenizer=tokenizer)


def _same_until_the_end(out: Generation, whole: Generation, end: int) -> None:
    for row, (tokens, at) in enumerate(zip(whole.tokens_BN.tolist(), out.end_B, strict=True)):
        assert at == (tokens.index(end) if end in tokens else len(tokens))
        np.testing.assert_array_equal(out.tokens_BN[row, : at + 1], whole.tokens_BN[row, : at + 1])


@pytest.mark.parametrize("streams", [1, 4])
def test_a_text_ends_at_its_first_end_of_text(streams):
    """The tokens up to there are those of a text that goes on; in one stream, nothing is drawn behind it."""
    lm = _with_bytes()
    end = lm.tokenizer.end_of_text
    whole = lm.generate(24, streams=streams, seed=1, stop_at_end=False)
    out = lm.generate(24, streams=streams, seed=1)
    assert (whole.end_B == 64).all() and (whole.call_BN > 0).all()
    _same_until_the_end(out, whole, end)
    ended = out.end_B < 64
    assert 5 < ended.sum() < 24  # some texts end, and some do not
    behind = np.arange(64) > out.end_B[:, None]
    if streams == 1:
        assert (out.call_BN[behind] == -1).all() and (out.log_prob_BN[behind] == 0).all()
        assert (out.tokens_BN[behind] == end).all() and (out.call_BN[~behind] > 0).all()
    else:
        np.testing.assert_array_equal(out.tokens_BN, whole.tokens_BN)
        np.testing.assert_array_equal(out.call_BN, whole.call_BN)


def test_calls_stop_when_every_text_has_ended():
    """In one stream; a row of the batch that is longer than its text costs nothing."""
    lm = _with_bytes()
    seeds = list(range(24))
    ends = lm.generate(seed=seeds).end_B
    early = [seed for seed, at in zip(seeds, ends, strict=True) if at < 40]
    out = lm.generate(seed=early)
    assert len(early) > 1 and out.num_calls == max(ends[early]) + 1 < 41
    late = next(seed for seed, at in zip(seeds, ends, strict=True) if at == 64)
    assert lm.generate(seed=[early[0], late]).num_calls == 64


def test_an_end_in_the_prompt_ends_nothing():
    """Only one that the model wrote does."""
    lm = _with_bytes()
    end = lm.tokenizer.end_of_text
    out = lm.generate(8, prompt=[end, 65, end], seed=2)
    assert (out.end_B > 2).all() and (out.tokens_BN[:, 2] == end).all()


@pytest.fixture
def compiled():
    """Names of the programs that XLA compiled, as JAX's own events tell."""
    found: list[str] = []

    def listen(event: str, duration: float, **facts: Any) -> None:
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_hundred_lengths_are_few_programs(compiled):
    """100 prompts of 100 lengths, up to one length or with so many new tokens: at most 6 programs each."""
    lm = _model(length=128)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, count).tolist() for count in range(1, 101)]
    for asked in ({"length": 128}, {"max_new_tokens": 20}, {"length": 120, "streams": 4}):
        compiled.clear()
        for number, prompt in enumerate(prompts):
            out = lm.generate(prompt=prompt, seed=number, **asked)
            assert out.tokens_BN[0, : len(prompt)].tolist() == prompt
        assert 1 <= len(compiled) <= 6, compiled
    compiled.clear()
    for length in range(60, 129, 3):
        lm.log_prob(np.zeros((3, length), np.int32), order.strided(3, length, 3))
    scored = [name for name in compiled if "log_prob" in name]
    assert 1 <= len(scored) <= 3, compiled


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_the_traced_schedule_of_prompts_is_the_usual_one(streams):
    """`after_prompts` lays out what `strided` does, as far as anything looks: up to the last token of each row."""
    prompts, new = [[3, 4, 2], [], [1], [2, 2, 0]], 6
    known_BN = np.full((4, 9), schedule.ABSENT)
    prompt_BP = np.full((4, 5), 4, np.int32)  # wider than any prompt
    for row, ids in enumerate(prompts):
        known_BN[row, : len(ids)] = prompt_BP[row, : len(ids)] = ids
        known_BN[row, len(ids) : len(ids) + new] = schedule.FREE
    lengths = jnp.array([len(ids) for ids in prompts], jnp.int32)
    plan = jax.jit(schedule.after_prompts, static_argnums=(2, 3))(prompt_BP, lengths, new, streams)
    usual = schedule.strided(known_BN, streams, LENGTH)
    assert plan.streams == usual.streams and plan.context_BT.shape == plan.positions_BT.shape == (4, 5 + new + streams)
    for name in ("first_B", "free_B", "num_evidence", "num_calls"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(usual, name), err_msg=name)
    for row, ids in enumerate(prompts):
        total, first, behind = len(ids) + new, 3 - len(ids), 3 + 1
        np.testing.assert_array_equal(plan.index_BW[row, :total], usual.index_BW[row, :total])
        assert (plan.index_BW[row, total:] == plan.context_BT.shape[1]).all()
        np.testing.assert_array_equal(plan.context_BT[row, first:behind], usual.context_BT[row, first:behind])
        here = slice(first, behind + new)
        np.testing.assert_array_equal(plan.positions_BT[row, here], usual.positions_BT[row, here])


def test_sizes_are_rounded_to_few():
    """Upwards, by at most a half (small ones by at most one), to a power of two, 3/4 of one, or the largest size."""
    rounded = [schedule.round_up(size, 100) for size in range(1, 101)]
    assert sorted(set(rounded)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert all(size <= found < max(1.5 * size, size + 1.5) for size, found in enumerate(rounded, start=1))
    assert schedule.round_up(101, 100) == 128 and schedule.round_up(100) == 128

"""Generation metrics: perplexity under a judge is that of a brute-force computation, and settings are drawn once."""

import concurrent.futures
import dataclasses
import json
import math
import sys

import jax
import numpy as np
import pytest

from armd_jax import order, typed
from armd_jax.config import ModelConfig
from armd_jax.data.sentencepiece_training import train_model
from armd_jax.data.tokenizers import BytesTokenizer, SentencePieceTokenizer
from armd_jax.errors import UserError
from armd_jax.evaluation import generative, generative_judge, generative_results
from armd_jax.evaluation.generative import Way
from armd_jax.evaluation.generative_judge import OwnJudge, Scores
from armd_jax.evaluation.generative_reference import Real
from armd_jax.evaluation.generative_results import Entry
from armd_jax.inference import likelihood
from armd_jax.inference.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("quick_compilation")

END = BytesTokenizer.end_of_text
SIZES = {"samples": 4, "length": 12, "batch": 2, "seed": 7}
STRIDED = (Way(mode="strided", streams=1),)


def _judge(lm: LanguageModel, batch_size: int = 4) -> OwnJudge:
    return OwnJudge.of(lm, "judge", "armd", batch_size)


def _nats(lm: LanguageModel, text: list[int]) -> float:
    """-log p of a text: one row of exactly its tokens, no batch, no padding."""
    tokens_BN = np.asarray([text], np.int32)
    found = likelihood.log_prob(lm.params, lm.config, tokens_BN, order.left_to_right(1, len(text)))
    return -float(np.asarray(found, np.float64).sum())


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Seven texts of three lengths, some of which contain an end-of-text."""
    rng = np.random.default_rng(1)
    found = [rng.integers(97, 123, length).tolist() for length in (5, 1, 12, 5, 5, 12, 1)]
    found[2][6] = found[5][11] = END
    return found


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_are_those_of_each_text_alone(lm, texts):
    """Whatever the batch: nats, tokens, and the mean of the hidden states, against rows without any padding."""
    expected = [_nats(lm, text) for text in texts]
    for batch_size in (1, 4, 16):
        scores = _judge(lm, batch_size).score(texts, features=batch_size == 4)
        np.testing.assert_allclose(scores.nats_T, expected, rtol=2e-6)
        assert scores.tokens_T.tolist() == [len(text) for text in texts] and (scores.windows_T == 1).all()
        assert (scores.features_TD is None) == (batch_size != 4)
        if scores.features_TD is not None:
            for text, features_D in zip(texts, scores.features_TD, strict=True):
                given = lm.params, lm.config, np.asarray([text], np.int32), order.left_to_right(1, len(text))
                hidden = likelihood.log_prob_and_hidden(*given)[1]
                np.testing.assert_allclose(features_D, np.asarray(hidden)[0].mean(axis=0), atol=1e-5)


@pytest.mark.slow
def test_what_lies_behind_the_context_is_scored_in_windows(lm, texts):
    """Every token once: the first five, then up to three more at a time, behind at least two that are only read."""
    judge = _judge(lm)
    judge = dataclasses.replace(judge, facts=dataclasses.replace(judge.facts, context=5))
    text = texts[2]
    spans = [(0, 0, 5), (3, 5, 8), (6, 8, 11), (7, 11, 12)]  # begins, is scored from, ends
    expected = sum(_nats(lm, text[a:c]) - (_nats(lm, text[a:b]) if b > a else 0) for a, b, c in spans)
    scores = judge.score(texts, features=True)
    assert scores.tokens_T.tolist() == [len(text) for text in texts]
    assert scores.windows_T.tolist() == [4 if len(text) == 12 else 1 for text in texts]
    assert scores.nats_T[2] == pytest.approx(expected, rel=2e-6)
    assert scores.nats_T[0] == pytest.approx(_nats(lm, texts[0]), rel=2e-6)
    hidden = []
    for a, b, c in spans:
        given = lm.params, lm.config, np.asarray([text[a:c]], np.int32), order.left_to_right(1, c - a)
        hidden.append(np.asarray(likelihood.log_prob_and_hidden(*given)[1])[0, b - a :])
    assert scores.features_TD is not None
    np.testing.assert_allclose(scores.features_TD[2], np.concatenate(hidden).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("context", [1, 2, 5, 12, 40])
def test_windows_score_every_token_once(context):
    """None is longer than the context, and what is only read is half of it or more."""
    texts = [list(range(length)) for length in (1, 5, 12, 13, 40)]
    found: list[list[int]] = [[] for _ in texts]
    for window in generative_judge.windows(texts, context):
        assert len(window.tokens) <= context and (window.seen >= context // 2 or window.tokens[0] == window.seen == 0)
        found[window.text] += window.tokens[window.seen :]
    assert [sorted(tokens) for tokens in found] == texts


def test_perplexity_is_that_of_the_corpus():
    """Not the mean of the texts' own, which differs if their lengths or likelihoods do."""
    nats, tokens = [1.0, 20.0], [10, 5]
    perplexity, _ = generative_results.perplexity_of_corpus(nats, tokens)
    assert perplexity == pytest.approx(math.exp(21 / 15)) and perplexity != pytest.approx(
        (math.exp(1 / 10) + math.exp(20 / 5)) / 2, rel=0.5
    )
    assert math.isnan(generative_results.perplexity_of_corpus([1.0], [2])[1])


def test_the_standard_error_is_that_of_other_ways():
    """Of texts of one length: perplexity times the error of the mean. Of others: that of the jackknife."""
    rng = np.random.default_rng(0)
    nats = rng.gamma(20, 1, 50)
    perplexity, error = generative_results.perplexity_of_corpus(nats, [10] * 50)
    assert error == pytest.approx(perplexity * np.std(nats / 10, ddof=1) / 50**0.5)
    tokens = rng.integers(5, 50, 400)
    nats = tokens * rng.normal(3, 0.5, 400)
    perplexity, error = generative_results.perplexity_of_corpus(nats, tokens)
    without = np.exp((nats.sum() - nats) / (tokens.sum() - tokens))
    jackknife = math.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.02)


# --- tokens of the judge ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(lm) -> OwnJudge:
    """A judge with a sentencepiece vocabulary."""
    tokenizer = SentencePieceTokenizer(train_model(["the river moves slowly under the old stone bridge"] * 4, 290))
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=16, num_layers=1, two_stream_layers=1)
    config = dataclasses.replace(config, width=16, num_heads=2)
    made = LanguageModel.create(config, 3)
    params = jax.tree.map(lambda leaf: 3 * leaf, made.params)
    return _judge(dataclasses.replace(made, params=params, tokenizer=tokenizer))


def test_texts_are_encoded_again_for_another_tokenizer(lm, other):
    """Document by document, with the judge's own end-of-text between; a shared tokenizer keeps the very tokens."""
    row = [*b"the river", END, *b"old stone", END]
    ids, facts = generative_judge.ids_for(other, lm.tokenizer, [row])
    encode, end = other.lm.tokenizer.encode, other.lm.tokenizer.end_of_text
    assert facts.retokenised and ids == [[*encode("the river"), end, *encode("old stone"), end]]
    assert 3 < len(ids[0]) < len(row)
    same, facts = generative_judge.ids_for(_judge(lm), lm.tokenizer, [row])
    assert same == [row] and not facts.retokenised
    with pytest.raises(UserError, match="text 0 is empty"):
        generative_judge.ids_for(other, lm.tokenizer, [[0x110]])


@pytest.mark.slow
def test_perplexity_under_another_tokenizer(lm, other):
    """Total nats of the judge's tokens over their number, against texts that are encoded and scored one by one."""
    real = _real(lm)
    (entry,) = generative.evaluate(lm, other, [], [], real=real, progress=False, **SIZES)
    ids = [other.lm.tokenizer.encode(lm.tokenizer.decode(row)) for row in real.rows]
    assert {len(text) for text in ids} != {12}
    nats, tokens = sum(_nats(other.lm, text) for text in ids), sum(map(len, ids))
    assert entry.judge.retokenised and entry.judge_tokens == tokens
    assert entry.generative_perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def _real(lm: LanguageModel) -> Real:
    return Real(
        "some", [lm.tokenizer.encode(text)[:12] for text in ("the river moves", "under the old", "the river is")]
    )


# --- settings ---------------------------------------------------------------------------------------------------------


def _evaluate(lm, ways=STRIDED, temperatures=(1.0,), **changes) -> list[Entry]:
    return generative.evaluate(lm, _judge(lm), ways, temperatures, **(SIZES | {"progress": False} | changes))


@pytest.mark.slow
def test_a_judge_agrees_with_what_a_model_says_of_its_own_texts(lm):
    """Left to right at temperature 1 to 1e-5 nats per token; under another order its own probability is another."""
    one, two = _evaluate(lm, [*STRIDED, Way(mode="strided", streams=2)])
    assert not one.judge.retokenised and one.judge_tokens == 4 * 12
    assert math.log(one.generative_perplexity) == pytest.approx(one.own_nats_per_token, abs=1e-5)
    assert abs(math.log(two.generative_perplexity) - two.own_nats_per_token) > 1e-3
    assert (one.num_calls, one.calls_per_token) == (12, 1)
    assert two.num_calls == 7 and two.calls_per_token == pytest.approx(7 / 12)
    assert one.texts == two.texts == 4
    assert all(entry.tokens_per_second > 0 and entry.example and entry.hardware for entry in (one, two))


@pytest.mark.slow
def test_figures_are_those_of_the_texts_with_these_seeds(lm):
    """Text i has the seed `seed` + i, whatever the batch, and end-of-text ends nothing."""
    lm = lm.replace(lm.params | {"embedding": lm.params["embedding"].at[END].multiply(20)})  # which now is likely
    (entry,) = _evaluate(lm, temperatures=[0.8])
    rows = lm.generate(4, 12, temperature=0.8, seed=range(7, 11), stop_at_end=False).tokens_BN.tolist()
    assert any(END in row[:-1] and set(row[row.index(END) :]) != {END} for row in rows)
    nats = [_nats(lm, row) for row in rows]
    perplexity, error = generative_results.perplexity_of_corpus(nats, [12] * 4)
    assert entry.generative_perplexity == pytest.approx(perplexity, rel=1e-5)
    assert entry.standard_error == pytest.approx(error, rel=1e-4)
    shares = [np.unique(row, return_counts=True)[1] / 12 for row in rows]
    assert entry.entropy_nats == pytest.approx(np.mean([-(share * np.log(share)).sum() for share in shares]))
    assert entry.entropy_bits == pytest.approx(entry.entropy_nats / math.log(2))


@pytest.mark.slow
def test_what_is_known_is_not_drawn_again(lm):
    """Entries of the same settings come back as they are, and only what is new is kept; other settings are new."""
    kept: list[Entry] = []
    real = _real(lm)
    first = _evaluate(lm, temperatures=(0.5, 1.0), real=real, keep=kept.append)
    assert kept == first and [(entry.text, entry.texts) for entry in first] == [("some", 3), ("", 4), ("", 4)]
    assert generative_results.cells(first[0])[0] == "real text (some), 3 texts"
    more: list[Entry] = []
    again = _evaluate(lm, temperatures=(0.5, 0.7, 1.0), real=real, known=first, keep=more.append)
    assert [entry.temperature for entry in more] == [0.7] and [again[i] for i in (0, 1, 3)] == first
    more.clear()
    _evaluate(lm, temperatures=(0.5,), known=first, keep=more.append, seed=8)
    assert len(more) == 1
    elsewhere = OwnJudge.of(lm, "./judge", "armd", 4)  # the same judge by another path
    how = SIZES | {"known": first, "keep": more.append, "progress": False}
    more.clear()
    generative.evaluate(lm, elsewhere, STRIDED, (0.5,), **how)
    assert not more
    other = lm.replace(jax.tree.map(lambda leaf: leaf * 1.5, lm.params))
    more.clear()
    generative.evaluate(other, _judge(lm), STRIDED, (0.5,), **how)
    assert len(more) == 1


def test_the_record_is_read_as_it_was_written(tmp_path, lm):
    """Whole after every entry; one of the same settings takes the place of the old one; damage is one line."""
    (entry,) = _evaluate(lm)
    record = generative_results.Record.open(tmp_path / "new", promised=True)
    for one in (entry, dataclasses.replace(entry, temperature=0.5), dataclasses.replace(entry, mauve=0.25)):
        record.add(one)
    found = generative_results.read(tmp_path / "new")
    assert [(one.temperature, one.mauve) for one in found.entries] == [(0.5, None), (1.0, 0.25)]
    assert found.entries[0] == dataclasses.replace(entry, temperature=0.5)
    assert generative_results.read(tmp_path) is None
    (tmp_path / "new" / generative_results.GENERATION_FILE).write_text('{"entries": [{"samples": "many"}]}')
    with pytest.raises(UserError, match="not what armd eval --judge writes"):
        generative_results.Record.open(tmp_path / "new", promised=True)
    (tmp_path / "file").touch()
    record = generative_results.Record.open(tmp_path / "file" / "folder", promised=False)
    record.add(entry)
    assert record.unwritten and record.content.entries == (entry,)
    record.promised = True
    with pytest.raises(OSError):
        record.add(entry)


def test_two_processes_lose_nothing(tmp_path, lm):
    """Each writes what the other has added since it began; an entry of its own takes the place of the other's."""
    (entry,) = _evaluate(lm)
    one, two = (generative_results.Record.open(tmp_path, promised=True) for _ in range(2))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for record, temperatures in ((one, range(1, 9)), (two, range(9, 17))):
            pool.submit(
                lambda r, ts: [r.add(dataclasses.replace(entry, temperature=t)) for t in ts], record, temperatures
            )
    found = generative_results.read(tmp_path)
    assert sorted(one.temperature for one in found.entries) == list(range(1, 17))
    two.add(dataclasses.replace(entry, temperature=3.0, mauve=0.5))
    assert [e.mauve for e in generative_results.read(tmp_path).entries if e.temperature == 3] == [0.5]
    assert [path.name for path in tmp_path.iterdir()] == [generative_results.GENERATION_FILE]


def test_a_judge_is_its_weights_its_config_and_its_tokenizer(lm, other):
    """Not the path that it was given by."""
    facts = _judge(lm).facts
    assert OwnJudge.of(lm, "./judge", "armd", 4).facts == facts
    for model in (
        lm.replace(jax.tree.map(lambda leaf: leaf * 1.5, lm.params)),
        dataclasses.replace(lm, config=dataclasses.replace(lm.config, norm_epsilon=0.5)),
        dataclasses.replace(lm, tokenizer=other.lm.tokenizer),
    ):
        assert _judge(model).facts != facts


def test_entries_of_an_earlier_version_are_read(tmp_path, lm):
    """Which cut texts at the judge's context; the table says so of them, and of windows otherwise."""
    (entry,) = _evaluate(lm)
    old = typed.as_plain(dataclasses.replace(entry, truncated=2, cut_tokens=30))
    del old["windowed"]
    (tmp_path / generative_results.GENERATION_FILE).write_text(json.dumps({"entries": [old]}))
    found = generative_results.read(tmp_path).entries
    assert "lost up to 30 tokens" in generative_results.heading(found)
    told = generative_results.heading([dataclasses.replace(entry, windowed=3)])
    assert "Up to 3 texts" in told and "at least 8 tokens" in told and "lost" not in told


def test_figures_of_real_text_are_those_of_its_rows(lm, monkeypatch):
    """Not of its name: neither its own figures nor a MAUVE that compares with it are kept for other rows."""
    monkeypatch.setattr(generative, "_mauve_is_installed", lambda: True)
    monkeypatch.setattr(generative, "mauve_score", lambda scores, real: 0.5)
    real = _real(lm)
    first = _evaluate(lm, real=real)
    assert first[1].mauve_digest == first[0].text_digest == real.digest != ""
    kept: list[Entry] = []
    assert _evaluate(lm, real=real, known=first, keep=kept.append) == first and not kept
    other = dataclasses.replace(real, rows=real.rows[:2])
    again = _evaluate(lm, real=other, known=first, keep=kept.append)
    assert kept == again and [one.mauve_digest for one in again] == ["", other.digest]


def test_a_judge_of_single_documents_scores_each_by_itself(lm, texts):
    """If it was trained with data.reset=document: what stands behind an end-of-text is the start of a text."""
    judge = OwnJudge.of(lm, "judge", "armd", 4, "document")
    assert judge.facts != _judge(lm).facts and "every end-of-text" in judge.facts.first_token
    (apart,), (joined,) = (each.score([texts[2]], False).nats_T for each in (judge, _judge(lm)))
    cut = texts[2].index(END) + 1
    assert 1 < cut < 12
    assert apart == pytest.approx(_nats(lm, texts[2][:cut]) + _nats(lm, texts[2][cut:]), rel=2e-6)
    assert abs(apart - joined) > 1e-3


def test_what_cannot_be_drawn_is_refused(lm):
    """Before anything is drawn."""
    with pytest.raises(UserError, match="--streams=13: exceeds the 12 tokens"):
        generative.ways_of_armd(["strided"], [1, 13], 12)
    with pytest.raises(UserError, match="--steps=4,8: --samplers=first_hitting takes one step per token"):
        generative.ways_of_denoiser(["first_hitting"], [4, 8], 12)
    assert len(generative.ways_of_denoiser(["first_hitting", "ancestral"], [4, 8], 12)) == 3
    for changes, words in (({"length": 17}, "--length=17: must be in 1 .. 16"), ({"seed": 2**31 - 3}, "--seed=")):
        with pytest.raises(UserError, match=words):
            _evaluate(lm, **changes)
    with pytest.raises(UserError, match="no tokenizer"):
        generative.evaluate(dataclasses.replace(lm, tokenizer=None), _judge(lm), STRIDED, (1.0,), **SIZES)


# --- real text --------------------------------------------------------------------------------------------------------


def test_mauve_tells_texts_apart(capfd):
    """Of the same features nearly 1, of features that lie far apart nearly 0; None without real text. It is quiet."""
    pytest.importorskip("mauve", reason="mauve-text is not installed (the extra `mauve`)")
    rng = np.random.default_rng(0)
    near, far = (Scores(*[np.zeros(60)] * 3, rng.normal(shift, 1, (60, 8))) for shift in (0, 9))
    again = Scores(*[np.zeros(60)] * 3, rng.normal(0, 1, (60, 8)))
    assert generative.mauve_score(near, again) > 0.8 and generative.mauve_score(near, far) < 0.1
    assert generative.mauve_score(near, None) is None
    print("still heard", file=sys.stderr)
    assert capfd.readouterr().err == "still heard\n"

"""Zero-shot suites: chunks as the protocols cut them, figures by hand, and what the command does with missing sets."""

import json
import math
import os
import pathlib

import jax
import numpy as np
import pytest

from armd_jax import order
from armd_jax.cli import main as cli
from armd_jax.core import corruption, objective, parameters
from armd_jax.data import tokenizers
from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.errors import UserError
from armd_jax.evaluation import suites, suites_results, suites_text
from armd_jax.evaluation.suites import Scorer, Tally
from armd_jax.evaluation.suites_text import Text
from armd_jax.inference.language_model import LanguageModel

LENGTH = 16  # of the model of the fixture `lm`
LINES = ["", " the old river , moves \n", " a <unk> bird \n"] * 4
# The text of these figures is not part of this repository.
DATA = pathlib.Path(os.environ.get("ARMD_TEST_DATA", pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _text(lines=LINES):
    return Text("lines", lambda: iter(lines))


def _stream():
    detokenize = suites_text.CORPORA["wikitext2"].detokenize
    return [id for line in LINES for id in [*detokenize(line).encode(), BytesTokenizer().end_of_text]]


@pytest.mark.parametrize("protocol", ["sedd", "mdlm"])
@pytest.mark.parametrize("at_once", [1, 5, 256])
def test_chunks_are_cut_from_one_stream(monkeypatch, protocol, at_once):
    """Whatever batches records are tokenized in, nothing is lost between them, and one last chunk may be shorter."""
    monkeypatch.setattr(suites, "_AT_ONCE", at_once)
    tally, tokenizer, expected = Tally(), BytesTokenizer(), _stream()
    detokenize = suites_text.CORPORA["wikitext2"].detokenize
    found = list(suites.chunks(LINES, detokenize, tokenizer, LENGTH, protocol, tally))
    if protocol == "mdlm":
        assert all(chunk[0] == chunk[-1] == tokenizer.end_of_text for chunk in found)
        found = [chunk[1:-1] for chunk in found]
    room = LENGTH - suites.added(protocol)
    assert [len(chunk) for chunk in found[:-1]] == [room] * (len(expected) // room)
    assert np.concatenate(found).tolist() == expected
    assert (tally.records, tally.text_tokens, tally.unknown) == (12, len(expected), 4)
    assert tally.words == sum(len(line.split()) + 1 for line in LINES)


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "split"), [("sedd", "test"), ("mdlm", "valid")])
def test_figures_are_those_of_the_model_chunk_by_chunk(lm, protocol, split):
    """The protocol's figure counts whole chunks, the one beside it every token of the text once."""
    found = Scorer(lm, lm.tokenizer, batch_size=3, progress=False).figure(protocol, "wikitext2", split, _text())
    stream, around, end = _stream(), suites.added(protocol), lm.tokenizer.end_of_text
    room = LENGTH - around
    nats = []
    for start in range(0, len(stream), room):
        chunk = [end] * (around // 2) + stream[start : start + room] + [end] * (around // 2)
        log_prob = lm.log_prob(np.array([chunk]), order.left_to_right(1, len(chunk)))
        nats.append(-np.asarray(log_prob, np.float64)[0])
    assert len(nats[-1]) < LENGTH  # or nothing would be dropped
    whole = np.concatenate(nats[:-1])
    assert found.score.tokens == len(whole) and found.chunks == len(nats) - 1 and not found.bound
    np.testing.assert_allclose(found.score.nats, whole.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.score.perplexity, math.exp(whole.mean()), rtol=1e-5)
    assert found.dropped == len(nats[-1]) - around
    own = np.concatenate([row[1:-1] if around else row for row in nats])
    assert found.every_token.tokens == len(stream) == found.text_tokens
    np.testing.assert_allclose(found.every_token.nats, own.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.perplexity_per_word, math.exp(own.sum() / found.words), rtol=1e-4)
    if around:
        given = np.concatenate([row[1:] for row in nats[:-1]])
        assert found.given_first.tokens == len(given)
        np.testing.assert_allclose(found.given_first.nats, given.sum(), rtol=1e-5)
    else:
        assert found.given_first is None


def test_a_set_below_one_chunk_has_no_figure_of_the_protocol(lm):
    """But one that counts every token."""
    found = Scorer(lm, lm.tokenizer, progress=False).figure("sedd", "lambada", "test", _text(["the dog"]))
    assert found.score is None and found.chunks == 0 and found.dropped == 9 == found.every_token.tokens


@pytest.mark.parametrize(("end", "tokenized"), [(" , it flew", True), (", it flew", False)])
def test_the_form_of_lambada_is_told(lm, end, tokenized):
    """By most of its passages; other sets have no such forms."""
    text = _text(["the bird" + end, "the old dog" + end, "the river"])
    scorer = Scorer(lm, lm.tokenizer, batch_size=3, progress=False)
    assert scorer.figure("sedd", "lambada", "test", text).tokenized is tokenized
    assert scorer.figure("sedd", "ptb", "test", text).tokenized is None


def test_a_limit_is_said(lm):
    """So many chunks are read, and nothing that would need the rest is claimed."""
    found = Scorer(lm, lm.tokenizer, limit=2, batch_size=3, progress=False).figure("sedd", "ptb", "test", _text())
    assert found.limited and found.chunks == 2 and found.score.tokens == 32 and found.perplexity_per_word is None


def test_a_limit_that_is_the_size_of_the_set_limits_nothing(lm):
    """Then every size is that of the whole set, and said so."""
    chunks = len(_stream()) // LENGTH + 1
    made = Scorer(lm, lm.tokenizer, limit=chunks, batch_size=3, progress=False)
    found = made.figure("sedd", "wikitext2", "test", _text())
    assert not found.limited and found.text_tokens == len(_stream()) and found.perplexity_per_word is not None


def test_figures_are_kept_before_a_text_turns_out_bad(lm):
    """What was measured until then is handed over, figure by figure."""

    def broken():
        yield "the old river"
        raise UserError("line 2: not valid JSON")

    texts = [suites.Found("sedd", "ptb", "test", _text()), suites.Found("sedd", "lm1b", "test", Text("bad", broken))]
    kept = []
    with pytest.raises(UserError, match="line 2"):
        suites.evaluate(Scorer(lm, lm.tokenizer, progress=False), texts, keep=kept.append)
    assert [[figure.set for figure in one.figures] for one in kept] == [["ptb"]]


@pytest.mark.slow
def test_documents_are_kept_apart_if_they_were_in_training(lm):
    """The figure then is that of every document of a chunk by itself."""
    lines = ["the old", "rivers", "a"]  # 7 + 1, 6 + 1 and the end: one chunk of 16 with what follows
    text = [*lines[:2], "", "bird"]
    found = Scorer(lm, lm.tokenizer, reset="document", progress=False).figure("sedd", "ptb", "test", _text(text))
    expected = 0.0
    for line in text[:3]:
        ids = [*line.encode(), lm.tokenizer.end_of_text]
        row = np.pad(ids, (0, LENGTH - len(ids)))[None]  # what is behind them is not seen by them
        log_prob = lm.log_prob(row, order.left_to_right(1, LENGTH))
        expected -= float(np.asarray(log_prob, np.float64)[0, : len(ids)].sum())
    assert found.chunks == 1
    np.testing.assert_allclose(found.score.nats, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_denoiser_has_a_bound_with_its_error(lm):
    """The mean over draws of masks, drawn with other seeds, and figures of parts of a chunk for nobody."""
    config = lm.config.__class__(
        kind="denoiser", vocab_size=257, max_length=LENGTH, num_layers=1, two_stream_layers=0, width=8, num_heads=1
    )
    params = jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), config)
    model = LanguageModel(config, params, BytesTokenizer())
    scorer = Scorer(model, model.tokenizer, draws=3, batch_size=4, seed=5, progress=False)
    found = scorer.figure("mdlm", "wikitext2", "valid", _text(LINES[:2]))
    end = model.tokenizer.end_of_text
    stream = np.array(_stream()[:14])
    tokens = np.full((4, LENGTH), end)
    tokens[0, 1:-1] = stream
    valid = np.arange(4)[:, None] < np.ones((1, LENGTH))
    drawn, loss = [], jax.jit(objective.loss_sums, static_argnums=1)
    for draw in range(3):
        key = jax.random.fold_in(jax.random.key(5 + draw), 0)
        drawn.append(float(loss(params, config, tokens, corruption.by_count(key, valid)).nll))
    assert found.chunks == 1 and found.bound and found.draws == 3
    np.testing.assert_allclose(found.score.nats, np.mean(drawn), rtol=1e-5)
    np.testing.assert_allclose(found.score.standard_error, np.std(drawn, ddof=1) / 3**0.5 / 16, rtol=1e-4)
    assert found.given_first is None and found.every_token is None and found.perplexity_per_word is None


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "wikitext-2").is_dir(), reason=f"no {DATA / 'wikitext-2'}")
def test_wikitext2_has_the_published_counts():
    """2,088,628, 217,646 and 245,569 words with line ends, and GPT-2's tokens of it in both protocols."""
    words = {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    vocabulary = DATA / "tokenizers" / "gpt2"
    tokenizer = tokenizers.load(vocabulary) if vocabulary.is_dir() else BytesTokenizer()
    for split in ("valid", "test"):
        text = suites_text.find("wikitext2", split, DATA, None)
        tally, detokenize = Tally(), suites_text.CORPORA["wikitext2"].detokenize
        found = list(suites.chunks(text.records(), detokenize, tokenizer, 1024, "sedd", tally))
        assert tally.words == words[split]
        assert sum(map(len, found)) == tally.text_tokens
        if vocabulary.is_dir():  # of the word-level files, with <unk>
            assert tally.text_tokens == {"valid": 246_008, "test": 281_171}[split]
        stream = np.concatenate(found)
        tally = Tally()
        around = list(suites.chunks(text.records(), detokenize, tokenizer, 1024, "mdlm", tally))
        assert len(around) == -(-len(stream) // 1022) and {len(chunk) for chunk in around[:-1]} == {1024}
        assert np.array_equal(np.concatenate([chunk[1:-1] for chunk in around]), stream)
    text = suites_text.find("wikitext2", "train", DATA, None)
    assert sum(len(record.split()) + 1 for record in text.records()) == words["train"]


@pytest.mark.slow
def test_the_command_measures_what_is_there(smoke_run, tmp_path, capsys):
    """Sets that are missing are listed, those that are named must be there, and the file can be read again."""
    data = tmp_path / "data"
    (data / "wikitext-2").mkdir(parents=True)
    for split in ("train", "test", "valid"):
        (data / "wikitext-2" / f"{split}.txt").write_text("".join(LINES) * 9)
    (data / "lambada_test.jsonl").write_text('{"text": "the old river saw the bird"}\n' * 3)
    out = tmp_path / "out"
    words = ["eval", f"--run={smoke_run}", f"--suite-data={data}"]
    assert cli.main([*words, "--suite=all", f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "not there for sedd: wikitext103 test, ptb test" in text and "LAMBADA, last word: accuracy" in text
    found = suites_results.read(out)
    assert [(one.protocol, one.set, one.split) for one in found.figures] == [
        ("sedd", "lambada", "test"),
        ("sedd", "wikitext2", "train"),
        ("sedd", "wikitext2", "test"),
        ("mdlm", "lambada", "test"),
        ("mdlm", "wikitext2", "valid"),
    ]
    assert found.last_word.passages == 3 and len(found.missing) == 12
    assert not (smoke_run / "suites.json").exists()
    assert json.loads((out / "suites.json").read_text())["figures"][1]["score"]["tokens"] > 0
    assert cli.main([*words, "--suite=sedd", "--suite-sets=wikitext2,ptb"]) == 2
    assert "--suite-sets=ptb: nothing there for sedd: put test.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suite=all", "--suite needs its texts"),
        ("--suite=all --suite-data={here} --streams=2", "--streams does not go together with --suite"),
        ("--suite=all --suite-data={here} --suite-sets=wikitext", "there is no set 'wikitext'; did you mean"),
        ("--suite=all --suite-data={here} --suite-sets=,", "name at least one"),
        ("--suite=all --suite-data={here} --limit-rows=0", "--limit-rows=0: must be at least 1"),
        ("--suite=all --suite-data={here} --draws=2", "the likelihood is exact"),
        ("--suite=all --suite-data={here}/nowhere", "is not a folder"),
        ("--suite=all --suite-data={here}", "no text of any set there"),
        ("--suite-data={here}", "--suite-data belongs to --suite"),
    ],
)
def test_mistakes_are_one_line(smoke_run, tmp_path, capsys, words, message):
    """Before a model is loaded."""
    assert cli.main(["eval", f"--run={smoke_run}", *words.format(here=tmp_path).split()]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1

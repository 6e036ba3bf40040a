"""The results of suites: what is written is read again, and the tables say what a reader has to know."""

import dataclasses
import json
import math

import pytest

from armd_jax import typed
from armd_jax.errors import UserError
from armd_jax.evaluation import suites_results
from armd_jax.evaluation.suites_results import Figure, LastWord, Missing, Suites, counted

FIGURE = Figure(
    protocol="mdlm",
    set="wikitext2",
    split="valid",
    published=True,
    source="wikitext2/valid.txt",
    records=10,
    words=40,
    bytes=200,
    unknown=3,
    text_tokens=50,
    chunk=16,
    added=2,
    chunks=3,
    dropped=8,
    limited=False,
    bound=False,
    draws=1,
    score=counted(96.0, 48),
    given_first=counted(90.0, 45),
    every_token=counted(120.0, 50),
    perplexity_per_word=math.exp(3),
)
BOUND = dataclasses.replace(
    FIGURE,
    protocol="sedd",
    split="test",
    published=False,
    added=0,
    limited=True,
    bound=True,
    draws=4,
    score=counted(96.0, 48, 0.0125),
    given_first=None,
    every_token=None,
    perplexity_per_word=None,
    unknown=0,
)
WORD = LastWord(
    source="lambada_test.jsonl",
    tokenized=True,
    passages=8,
    cut=2,
    correct=2,
    accuracy=0.25,
    standard_error=0.15,
    tokens=12,
    perplexity_per_word=30.5,
    perplexity_per_token=4.25,
)
FOUND = Suites(
    length=16,
    documents_apart=True,
    seed=7,
    limit_rows=3,
    figures=(BOUND, FIGURE),
    last_word=WORD,
    missing=(Missing(protocol="sedd", set="ptb", split="test"),),
    ema=True,
)


def test_what_is_written_is_read_again(tmp_path):
    """To the last digit; figures that are not finite are none, because JSON has no infinity."""
    assert suites_results.read(tmp_path) is None
    (tmp_path / "suites.json").write_text(typed.to_json(FOUND))
    assert suites_results.read(tmp_path) == FOUND
    huge = dataclasses.replace(FIGURE, score=counted(1e6, 1))
    assert huge.score.perplexity == math.inf
    (tmp_path / "suites.json").write_text(typed.to_json(dataclasses.replace(FOUND, figures=(huge,))))
    assert suites_results.read(tmp_path).figures[0].score.perplexity is None
    (tmp_path / "suites.json").write_text(json.dumps({"length": "x"}))
    with pytest.raises(UserError, match=r"suites\.json: not what armd eval --suite=all writes"):
        suites_results.read(tmp_path)


def test_tables_say_what_was_counted():
    """Bounds, splits that the published code does not measure, limits, unknown words, and what is missing."""
    lines = suites_results.as_text(FOUND).splitlines()
    assert lines[0] == "sedd: end-of-text behind every record, chunks of 16"
    assert lines[2].split() == ["wikitext2", "test*", "≤", "7.39", "0.0125", "48", "?", "–", "–", "?", "–"]
    assert lines[4] == "mdlm: end-of-text behind every record, chunks of 14 between two end-of-texts"
    assert lines[6].split() == ["wikitext2", "valid", "7.39", "–", "48", "8", "7.39", "11.02", "40", "20.09"]
    text = "\n".join(lines[8:])
    for said in (
        "accuracy 25.00% ± 15.00% (2 of 8 passages), perplexity per word 30.50, per token 4.25; original (tokenised)",
        "2 passages lost their beginning",
        "* by the protocol's rules",
        "with <unk> in the text, unlike the raw form that was published: wikitext2 valid",
        "at most 3 chunks or passages",
        "documents are kept apart",
        "not there for sedd: ptb test",
    ):
        assert said in text
    plain = dataclasses.replace(FOUND, documents_apart=False, limit_rows=None, figures=(), last_word=None, missing=())
    assert suites_results.notes(plain) == []


def test_notes_on_the_form_of_a_text_are_of_sets_that_were_published_in_another():
    """PTB was published with `<unk>`; of LAMBADA, the original form is told; and a bound says nothing of other sets."""
    ptb = dataclasses.replace(FIGURE, set="ptb", split="test")
    openai, original = (dataclasses.replace(ptb, set="lambada", unknown=0, tokenized=form) for form in (False, True))
    plain = dataclasses.replace(FOUND, documents_apart=False, limit_rows=None, last_word=None, missing=())

    def notes(*figures: Figure) -> list[str]:
        return suites_results.notes(dataclasses.replace(plain, figures=figures))

    assert notes(ptb, openai, dataclasses.replace(ptb, bound=True)) == []
    told = "in the original, tokenised form, unlike OpenAI's form that was published: lambada test"
    assert notes(ptb, original) == [told]
    assert ["denoiser" in line for line in notes(dataclasses.replace(original, bound=True))] == [False, True]
    assert notes(FIGURE, ptb) == ["with <unk> in the text, unlike the raw form that was published: wikitext2 valid"]


def test_raw_weights_are_told():
    """In every heading; a file of an earlier version does not say which weights were taken."""
    for ema in (True, None, False):
        lines = suites_results.as_text(dataclasses.replace(FOUND, ema=ema)).splitlines()
        assert [line.endswith("; raw weights (--no-ema)") for line in (lines[0], lines[4])] == [ema is False] * 2
    old = {name: value for name, value in typed.as_plain(FOUND).items() if name != "ema"}
    assert typed.build(Suites, old, "suites").ema is None


def test_published_figures_have_a_column_for_every_set():
    """In the order of the paper's tables."""
    assert all(len(row) == len(suites_results.PUBLISHED_SETS) for row in suites_results.PUBLISHED.values())
    assert suites_results.PUBLISHED["ARMD 400K, small"][2] == 123.43

"""Tables of generation metrics: what stands in one table, what takes the place of what, and what notes say."""

import json

import pytest

from armd_jax import typed
from armd_jax.cli import eval_generation
from armd_jax.evaluation import generative_results
from armd_jax.evaluation.generative_results import Entry


def _entry(**changes) -> Entry:
    """An entry of made-up figures."""
    facts = generative_results.JudgedBy(
        name="judge", kind="armd", digest="0", context=16, retokenised=False, first_token="its start token"
    )
    how = dict(samples=4, length=8, batch=2, seed=0, weights="0", judge=facts, temperature=1.0, mode="strided")
    return Entry(**(how | dict(streams=1, hardware="1 x cpu", tokens_per_second=9.0, num_calls=8) | changes))


def _real_entry(**changes) -> Entry:
    how = dict(text="test split", mode=None, streams=None, temperature=None, hardware="", num_calls=0)
    return _entry(**(how | changes))


def test_speeds_of_other_batches_or_hardware_stand_in_tables_of_their_own():
    """Each says how its texts were drawn, and has the row of real text, which has no speed."""
    entries = [_entry(), _entry(batch=4), _entry(hardware="1 x gpu"), _entry(streams=2), _real_entry()]
    groups = generative_results.groups([*entries, _real_entry(batch=4), _real_entry(seed=1)])
    told = [(one.streams, one.batch, one.hardware) for group in groups for one in group if not one.text]
    assert told == [(1, 2, "1 x cpu"), (2, 2, "1 x cpu"), (1, 4, "1 x cpu"), (1, 2, "1 x gpu")]
    assert [[one.text for one in group].count("test split") for group in groups] == [1, 1, 1, 1]
    headings = [generative_results.heading(group) for group in groups]
    assert "drawn in batches of 2 on 1 x cpu." in headings[0] and "drawn in batches of 4 on 1 x cpu." in headings[1]
    assert "on 1 x gpu." in headings[2] and "seed 1." in headings[3] and "batches" not in headings[3]


def test_real_text_of_the_same_name_and_other_rows_is_other_text(tmp_path):
    """It takes the place of the old one in the file; an old entry says nothing of its rows and can be read."""
    record = generative_results.Record.open(tmp_path, promised=True)
    for entry in (_real_entry(), _entry(), _real_entry(text_digest="ab"), _real_entry(text="valid split")):
        record.add(entry)
    found = generative_results.read(tmp_path).entries
    assert [(one.text, one.text_digest) for one in found] == [("", ""), ("test split", "ab"), ("valid split", "")]
    old = [{k: v for k, v in typed.as_plain(one).items() if "digest" not in k} for one in found]
    (tmp_path / generative_results.GENERATION_FILE).write_text(json.dumps({"entries": old}))
    assert [one.text_digest for one in generative_results.read(tmp_path).entries] == ["", "", ""]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("none", None, False), ["No real text"]),
        (("none", 64, False), ["MAUVE is not installed"]),
        (("none", 120, True), ["from 120 it says little"]),
        (("none", 1000, True), []),
        (("document", 1000, True), ["data.reset=document"]),
    ],
)
def test_notes_say_what_a_reader_has_to_know(given, words):
    """Whether texts suffice for MAUVE, and that a model may write what it never saw."""
    notes = eval_generation._notes(*given)
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))

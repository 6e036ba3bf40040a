"""Many prompts: every line of a file gets its text, whatever the batches, and an interrupted command continues."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from armd_jax.cli import main as cli
from armd_jax.errors import UserError
from armd_jax.evaluation import completions
from armd_jax.evaluation.completions import Settings, with_gaps
from armd_jax.inference.language_model import LanguageModel
from armd_jax.inference.schedule import FREE
from armd_jax.interop.load import load

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = Settings(max_new_tokens=12)
LINES: list[dict[str, Any]] = [
    {"prompt": "the river "},
    {"id": "gap", "text": "the [[5]] moves [[1 token]]slowly", "note": ["passed on"]},
    {"id": 7, "prompt": "old stone", "suffix": " end.", "max_new_tokens": 3},
    {"id": "again", "prompt": "Ünïcödé ☃ ", "seed": 5},
    {"prompt": "", "max_new_tokens": 20},
    {"id": "ü", "prompt": "Ünïcödé ☃ ", "seed": 5},
]


@pytest.fixture(scope="module")
def lm(smoke_run: pathlib.Path) -> LanguageModel:
    return load(smoke_run)


def _prompts(folder: pathlib.Path, lines: list[Any]) -> pathlib.Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def _rows(file: pathlib.Path) -> dict[Any, dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({json.dumps(row["id"]) for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.mark.slow
def test_every_line_gets_its_text(tmp_path, lm):
    """Its own fields stay, what was written stands in its gaps, and its log-probability is the model's own."""
    out = tmp_path / "out.jsonl"
    summary = completions.complete(lm, _prompts(tmp_path, LINES), out, SETTINGS, 4, progress=False)
    rows = _rows(out)
    assert list(rows) and set(rows) == {1, "gap", 7, "again", 5, "ü"} and (summary.texts, summary.skipped) == (6, 0)
    gap = rows["gap"]
    first, second = gap["filled"]
    assert gap["text"] == f"the {first} moves {second}slowly" and gap["note"] == ["passed on"]
    assert rows[7]["text"] == f"old stone{rows[7]['filled'][0]} end."
    assert rows[1]["text"] == "the river " + rows[1]["filled"][0]
    assert rows["again"]["filled"] == rows["ü"]["filled"]
    assert rows["ü"]["text"].startswith("Ünïcödé ☃ ")
    assert sum(row["num_tokens"] + row["num_cut"] for row in rows.values()) == summary.tokens
    assert all(row["ended"] == (row["num_cut"] > 0) for row in rows.values())
    (request,) = [
        one for one in completions.read(tmp_path / "prompts.jsonl", lm.tokenizer, SETTINGS, 64) if one.gaps[1:]
    ]
    alone = lm.generate(evidence_BN=request.known, seed=[request.seed])
    free = np.asarray(request.known) == FREE
    nats = np.asarray(lm.log_prob(alone.tokens_BN, alone.order))[0][free & (np.arange(len(free)) < alone.end_B[0])]
    assert gap["log_prob"] == pytest.approx(float(nats.sum()), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 4])
def test_batches_change_no_text(tmp_path, lm, streams):
    """One by one or all together; also a text that has fewer places to fill than there are streams."""
    settings = dataclasses.replace(SETTINGS, streams=streams, temperature=0.7, top_k=20, stop_at_end=False)
    found = []
    for batch in (1, 6):
        out = tmp_path / f"{batch}.jsonl"
        completions.complete(lm, _prompts(tmp_path, LINES), out, settings, batch, progress=False)
        found.append({name: row["text"] for name, row in _rows(out).items()})
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 30])
def test_an_interrupted_command_continues(tmp_path, monkeypatch, capsys, smoke_run, cut):
    """What is there is kept, a line that was cut short is written again, if only its end is missing too.

    Other settings are refused, and so is a file of prompts in which a line has changed.
    """
    whole, out = tmp_path / "whole.jsonl", tmp_path / "new" / "out.jsonl"
    command = ["sample", f"--run={smoke_run}", f"--prompts={_prompts(tmp_path, LINES)}", "--max-new-tokens=12"]
    command += ["--batch=2", "--json"]
    assert cli.main([*command, f"--out={whole}"]) == 0
    capsys.readouterr()
    generate, calls = LanguageModel.generate, []

    def dying(self, *args, **rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "generate", dying)
        assert cli.main([*command, f"--out={out}"]) == 130
    assert len(_rows(out)) == 4
    out.write_text(out.read_text()[:-cut])
    capsys.readouterr()
    assert cli.main([*command, f"--out={out}"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["texts"], summary["skipped"]) == (3, 3)
    for name, row in _rows(whole).items():
        again = _rows(out)[name]
        # The batch was another one, which changes how numbers are rounded.
        assert again.pop("log_prob") == pytest.approx(row.pop("log_prob"), abs=1e-4) and again == row
    before = out.read_bytes()
    assert cli.main([*command, f"--out={out}", "--temperature=0.5"]) == 2
    said = "is no text of these prompts that this model drew with these settings; name another file"
    assert f"line 1 {said}" in capsys.readouterr().err
    _prompts(tmp_path, [{"prompt": "the rivers "}, *LINES[1:]])
    assert cli.main([*command, f"--out={out}"]) == 2
    assert said in capsys.readouterr().err
    assert out.read_bytes() == before


MISTAKES = [
    ([{"prompt": 3}], r"prompts.jsonl:1: prompt=3: expected a text"),
    ([{"prompt": "a"}, "{"], r"prompts.jsonl:2: is not a JSON object"),
    ([[1]], r"prompts.jsonl:1: expected an object such as .* got list"),
    ([{"promt": "a"}], r"prompts.jsonl:1: needs either prompt, a text to continue, or text"),
    ([{"prompt": "a", "text": "b [[1]]"}], r"prompts.jsonl:1: needs either prompt"),
    ([{"text": "a [[1]]", "suffix": "b"}], r"prompts.jsonl:1: suffix and max_new_tokens belong to prompt"),
    ([{"text": "no gap"}], r"prompts.jsonl:1: leaves nothing to generate"),
    ([{"text": "a [[999999]]"}], r"prompts.jsonl:1: its 10\d+ tokens are more than 64"),
    ([{"prompt": "a" * 70}], r"prompts.jsonl:1: its 82 tokens are more than 64"),
    ([{"prompt": "a", "max_new_tokens": 0}], r"prompts.jsonl:1: leaves nothing to generate"),
    ([{"prompt": "a", "max_new_tokens": -1}], r"prompts.jsonl:1: max_new_tokens=-1: must be in"),
    ([{"prompt": "a", "max_new_tokens": 2_000_000_000}], r"prompts.jsonl:1: its 2000000001 tokens are more than 64"),
    (['{"prompt": "a", "seed": ' + "1" * 5000 + "}"], r"prompts.jsonl:1: is not a JSON object"),
    ([{"prompt": "a", "seed": "9" * 100_000}], r"prompts.jsonl:1: seed='9+\.\.\.9+': expected a whole number$"),
    ([{"prompt": "a", "seed": True}], r"prompts.jsonl:1: seed=True: expected a whole number"),
    ([{"prompt": "a", "seed": 2**31}], r"prompts.jsonl:1: seed=2147483648: must be in"),
    ([{"id": 2, "prompt": "a"}, {"prompt": "b"}], r"prompts.jsonl:2: has the id 2 of line 1; ids have to differ"),
    ([{"id": [], "prompt": "a"}], r"prompts.jsonl:1: id=\[\]: expected a text or a whole number"),
    ([{"prompt": "\ud800"}], r"prompts.jsonl:1: prompt='\\ud800': is not UTF-8 text"),
    (["[" * 100_000], r"prompts.jsonl:1: is not a JSON object"),
    ([{"prompt": "a", "seed": 10**30}], r"prompts.jsonl:1: seed=1000000000000000000000000000000: must be in"),
    ([" "], r"has no prompts"),
]


@pytest.mark.parametrize(("lines", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_line_that_cannot_be_used_is_named(tmp_path, lm, lines, said):
    """Before anything is drawn: the file, the line, and what is wrong with it."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=said):
        completions.complete(lm, _prompts(tmp_path, lines), out, SETTINGS, 4, progress=False)
    assert not out.exists()


@pytest.mark.parametrize(
    "content", ['{"prompt": "mine"}', '{"prompt": "mine"}\n', "notes", "notes\nmore", '{"id": 1, "settings": {}}\n{"i']
)
def test_a_file_of_something_else_is_left_alone(tmp_path, lm, content):
    """Even if it ends like a line that was cut short, and even if it is the file of prompts itself."""
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(UserError, match="line 1 is no text of these prompts .*; name another file"):
        completions.complete(lm, _prompts(tmp_path, LINES), out, SETTINGS, 4, progress=False)
    assert out.read_text() == content


@pytest.mark.parametrize("line", [LINES[0], {"prompt": "a\u2028b\u0085c\x1cd", "max_new_tokens": 2}])
def test_files_of_other_systems(tmp_path, lm, line):
    """A byte order mark, other line ends, no line end at the end, and separators of lines inside a text."""
    file = tmp_path / "prompts.jsonl"
    text = json.dumps(line, ensure_ascii=False)
    file.write_bytes(f"\ufeff{text}\r\n\r\n{text}".encode())
    found = completions.read(file, lm.tokenizer, SETTINGS, 64)
    assert [request.row for request in found] == [{"id": 1} | line, {"id": 3} | line]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out=OUT", "--prompt=a"], "--prompt does not go together with --prompts"),
        (["--out=OUT", "--length=9"], "--length does not go together with --prompts"),
        (["--out=OUT", "--streams=1,2"], "--streams=1,2: with --prompts, give one number of streams"),
        (["--out=OUT", "--batch=0"], "--batch=0: must be at least 1"),
        (["--out=OUT", "--seed=-1"], "--seed=-1: must be in"),
        (["--out=OUT", "--max-new-tokens=-1"], "--max-new-tokens=-1: must be at least 0"),
        ([], "--prompts needs --out=FILE.jsonl"),
        (["--out=."], "--out=.: is a folder"),
        (["--out=OUT", "--prompts=missing.jsonl"], "--prompts=missing.jsonl: cannot be read: No such file"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(tmp_path, capsys, smoke_run, flags, said):
    """One line each, and no file."""
    prompts = _prompts(tmp_path, LINES)
    flags = [flag.replace("OUT", str(tmp_path / "out.jsonl")) for flag in flags]
    assert cli.main(["sample", f"--run={smoke_run}", f"--prompts={prompts}", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"error: {said}" in err.splitlines()[-1]
    assert not (tmp_path / "out.jsonl").exists()


def test_a_text_with_gaps(lm):
    """Gaps are as many tokens as they say; what is no gap is text."""
    encode = lm.tokenizer.encode
    assert with_gaps("a[[2]]b[[1 token]][[3 tokens]][[0]]", lm.tokenizer) == [
        *(encode("a"), 2, encode("b"), 1, [], 3, [], 0, []),
    ]
    for text in ("[[ 2 ]]", "[[x]]", "[2]", "[[2 words]]", "[[-1]]", "[[٣]]"):
        assert with_gaps(text, lm.tokenizer) == [encode(text)]


@pytest.mark.slow
def test_every_gap_has_its_filling(tmp_path, lm):
    """Side by side, without a place, or behind the end of the text, whose filling is nothing."""
    lines = [{"id": number, "text": "a[[2]][[3]]b[[0]]c[[20]]d[[4]]", "seed": number} for number in range(12)]
    out = tmp_path / "out.jsonl"
    completions.complete(lm, _prompts(tmp_path, lines), out, Settings(temperature=3.0), 12, progress=False)
    rows = _rows(out)
    assert any(row["ended"] for row in rows.values()) and not all(row["ended"] for row in rows.values())
    for row in rows.values():
        one, two, none, three, four = row["filled"]
        assert none == "" and f"a{one}{two}bc{three}d{four}".startswith(row["text"])
        assert row["ended"] or row["text"] == f"a{one}{two}bc{three}d{four}"

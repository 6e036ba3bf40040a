"""The results in eval.json and samples.json: whole, readable again, and shown without gaps."""

import dataclasses
import itertools
import json
import math
import typing

import pytest

from armd_jax import typed
from armd_jax.errors import UserError
from armd_jax.evaluation import results, tables
from armd_jax.evaluation.results import Evaluation, Sample, Samples, Score

# The keys of files that were written before, which must stay.
SCORE_KEYS = ["nats_per_token", "perplexity_per_token", "perplexity_per_word", "bits_per_byte"]
EVALUATION_KEYS = ["split", "lossless", "documents", "bytes", "words", "tokens", "rows", "left_to_right"]
EVALUATION_KEYS += ["random_orders", "strided", "elbo", "unigram", "xz_bits_per_byte", "seed"]
SAMPLES_KEYS = ["length", "batch", "temperature", "top_k", "top_p", "seed", "hardware", "samples"]
SAMPLE_KEYS = ["streams", "num_calls", "tokens_per_second", "text", "tokens", "pieces", "calls", "cut"]

SAMPLES = Samples(
    length=4,
    batch=1,
    temperature=0.5,
    top_k=3,
    seed=7,
    hardware="1 x cpu",
    samples=(
        Sample(
            streams=2,
            num_calls=3,
            tokens_per_second=12.5,
            text="a\0\x1b\n\u2028é",
            tokens=(97, 0, 27, 10),
            pieces=("a", "\0", "\x1b", "\n"),
            calls=(1, 2, 3, 3),
        ),
    ),
)


def _evaluation() -> Evaluation:
    """An evaluation with a value in every field, all numbers different."""
    numbers = itertools.count(1)

    def filled(hint: object) -> object:
        groups = [one for one in (hint, *typing.get_args(hint)) if typing.get_origin(one) in (dict, tuple)]
        (hint,) = groups or [hint]
        if typing.get_origin(hint) is dict:
            return {"2": filled(typing.get_args(hint)[1]), "4": filled(typing.get_args(hint)[1])}
        if typing.get_origin(hint) is tuple:
            return (filled(typing.get_args(hint)[0]), filled(typing.get_args(hint)[0]))
        for plain, value in ((str, "test"), (bool, True), (int, next(numbers)), (float, next(numbers) + 0.25)):
            if plain in (hint, *typing.get_args(hint)):
                return value
        (cls,) = (one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one))
        return cls(**{name: filled(field) for name, field in typing.get_type_hints(cls).items()})

    return filled(Evaluation)


def test_every_score_has_its_row():
    """Whatever scores `Evaluation` has fields for, the rows have all of them once, and the table shows every row."""
    evaluation = _evaluation()
    values = [getattr(evaluation, field.name) for field in dataclasses.fields(Evaluation)]
    scores = [value for value in values if isinstance(value, Score)]
    in_groups = [score for value in values if isinstance(value, dict) for score in value.values()]
    scores += [score for score in in_groups if isinstance(score, Score)]
    scores += [Score(bits_per_byte=value) for value in values if isinstance(value, float)]
    rows = results.rows(evaluation)
    assert len(scores) == len(rows) == len({row.name for row in rows})
    for score in scores:
        assert [row.score for row in rows].count(score) == 1, score
    lines = tables.as_text(evaluation).splitlines()
    for row in rows:
        assert [
            line for line in lines if line.startswith(f"{row.name} ") and f" {row.score.bits_per_byte:.4f} " in line
        ]


def test_a_bound_that_is_missing_has_every_reason_that_it_may_have():
    """Orders that hardly differ are no reason: then the figure would have been below 0."""
    found = results.OrderBounds(rows=64, spread=0.01, bounds={"2": results.OrderBound(nll_at_most=0.001)})
    note = tables.bounds_note(found)
    assert "orders differ too much" in note and "or the figure would be below 0" in note
    bounded = dataclasses.replace(found, bounds={"2": results.OrderBound(nll_at_most=0.2, nll_at_least=0.1)})
    assert "below 0" not in tables.bounds_note(bounded)


def test_headings_and_baselines_say_what_was_measured():
    """Raw weights are told, and whose training split baselines are of; old files say neither."""
    own = dataclasses.replace(_evaluation(), ema=True, other_text=False)
    assert "--no-ema" not in tables.as_text(own)
    assert tables.as_text(dataclasses.replace(own, ema=False)).splitlines()[0].endswith("; raw weights (--no-ema)")
    names = [[row.name for row in results.rows(dataclasses.replace(own, other_text=other))] for other in (False, True)]
    assert names[0][-2:] == ["unigram of the training split", "xz -9e after the training text"]
    training = "the other text's training split"
    assert names[1][-2:] == [f"unigram of {training}", f"xz -9e after {training}"] and names[0][:-2] == names[1][:-2]
    old = {name: value for name, value in own.as_dict().items() if name not in ("ema", "other_text")}
    assert typed.build(Evaluation, old) == dataclasses.replace(own, ema=None)


def test_an_evaluation_reads_back_as_it_was(tmp_path):
    """The file has the keys that it always had, in their order, and gives the same evaluation again."""
    evaluation = _evaluation()
    (tmp_path / results.EVALUATION_FILE).write_text(typed.to_json(evaluation.as_dict()))
    assert results.read_evaluation(tmp_path) == evaluation
    stored = json.loads((tmp_path / "eval.json").read_text())
    assert [key for key in stored if key in EVALUATION_KEYS] == EVALUATION_KEYS
    assert list(stored["strided"]) == ["2", "4"]
    assert list(stored["left_to_right"]) == list(stored["unigram"]) == SCORE_KEYS
    assert list(stored["random_orders"]) == [*SCORE_KEYS, "draws", "standard_error", "spread"]
    assert list(stored["elbo"]) == [*SCORE_KEYS, "diffusion_steps", "draws", "standard_error"]


def test_what_was_not_measured_has_no_key(tmp_path):
    """Without random orders, ELBO, bounds and price the file has none of these keys, and reads back as it was."""
    optional = ("random_orders", "elbo", "order_bounds", "price")
    evaluation = dataclasses.replace(_evaluation(), xz_bits_per_byte=None, **dict.fromkeys(optional))
    assert set(_evaluation().as_dict()) - set(evaluation.as_dict()) == set(optional)
    (tmp_path / results.EVALUATION_FILE).write_text(typed.to_json(evaluation.as_dict()))
    assert results.read_evaluation(tmp_path) == evaluation


def test_numbers_without_json_are_unknown_in_the_file(tmp_path):
    """An infinite perplexity and a NaN are null in the file and unknown when they are read; tables show a dash."""
    score = Score(math.nan, math.inf, math.inf, 1.5)
    evaluation = Evaluation(split="test", lossless=True, left_to_right=score)
    (tmp_path / results.EVALUATION_FILE).write_text(typed.to_json(evaluation.as_dict()))
    read = results.read_evaluation(tmp_path)
    assert read.left_to_right == Score(bits_per_byte=1.5)
    assert "inf" in tables.as_text(evaluation) and "1.5000" in tables.as_text(read)
    assert "–" in tables.as_text(read) and "n/a" not in tables.as_text(read)


def test_samples_read_back_as_they_were(tmp_path):
    """Whatever a model writes, control characters and NUL too, is in the file as it was."""
    (tmp_path / results.SAMPLES_FILE).write_text(typed.to_json(SAMPLES))
    assert results.read_samples(tmp_path) == SAMPLES
    stored = json.loads((tmp_path / "samples.json").read_text())
    assert list(stored) == SAMPLES_KEYS and list(stored["samples"][0]) == SAMPLE_KEYS


def test_parts_that_old_files_lack_have_defaults(tmp_path):
    """A file with the least that makes sense can be read."""
    (tmp_path / "eval.json").write_text('{"split": "test", "lossless": true, "left_to_right": {"bits_per_byte": 1}}')
    (tmp_path / "samples.json").write_text('{"samples": [{"streams": 1}]}')
    assert results.read_evaluation(tmp_path).left_to_right == Score(bits_per_byte=1.0)
    assert results.read_samples(tmp_path).samples == (Sample(streams=1),)


def test_no_file_is_no_result(tmp_path):
    assert results.read_evaluation(tmp_path) is None and results.read_samples(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "cannot be read as JSON"),
        ([], "expected a section"),
        ({"left_to_right": 3}, "eval.left_to_right=3: expected a section"),
        ({"left_to_right": {"bits_per_byte": "low"}}, "eval.left_to_right.bits_per_byte='low': expected float"),
        ({"left_to_rihgt": {}}, "unknown field 'eval.left_to_rihgt'; did you mean 'eval.left_to_right'"),
        ({"strided": {"two": {}}}, r"strided=\['two'\]: expected numbers of streams"),
        ({"price": {"two": {}}}, r"price=\['two'\]: expected numbers of streams"),
        ({"strided": {"\ud800": {}}}, "expected numbers of streams"),
        ({"bytes": 10**400}, "eval.bytes: a number of"),
        ({"bytes": True}, "eval.bytes=True: expected int"),
        ({"split": "\ud800"}, "half a surrogate pair"),
        ({"xz_bits_per_byte": math.inf}, "must be a finite number"),
    ],
)
def test_a_damaged_evaluation_is_one_clear_line(tmp_path, change, reason):
    """The message names the file, says what is wrong with it, and says to write it again."""
    content = json.dumps({**_evaluation().as_dict(), **change}) if isinstance(change, dict) else change
    content = json.dumps(content) if isinstance(content, list) else content
    (tmp_path / "eval.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=reason) as raised:
        results.read_evaluation(tmp_path)
    message = str(raised.value)
    assert str(tmp_path / "eval.json") in message and message.endswith("write it again with armd eval")
    assert "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("change", [{"samples": [3]}, {"samples": [{"streams": "1"}]}, {"samples": 3}, {"seed": "x"}])
def test_damaged_samples_are_one_clear_line(tmp_path, change):
    (tmp_path / "samples.json").write_text(json.dumps({**dataclasses.asdict(SAMPLES), **change}))
    with pytest.raises(UserError, match=r"samples\.json: not what armd sample writes: .*; write it again") as raised:
        results.read_samples(tmp_path)
    assert "\n" not in str(raised.value)

"""Whatever is typed or stored: a valid config, or one `error: …` line and exit code 2, soon."""

import contextlib
import dataclasses
import datetime
import io
import os
import pathlib
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.experiment_file import apply_overrides

SOON = datetime.timedelta(seconds=5)
bounded = settings(
    max_examples=200, deadline=SOON, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

FIELDS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config(), section.name))
]
HOSTILE = ["", " ", "-", "--", "None", "nan", "inf", "-inf", "1e999", "-0.0", "0x" + "f" * 99, "9" * 5000, "(" * 300]
HOSTILE += [
    "[" * 300,
    "-" * 900 + "1",
    "{[]: 1}",
    "{**1}",
    "1if 1else 2",
    "b'x'",
    "f'{x}'",
    "'\\ud800'",
    "\ud800",
    "\0",
]
HOSTILE += ["1,2,", "1,,2", "()", "[[1]]", "1_000", "10**9", "1j", "...", "\u2028", "\x1b[31m", "%s%n", "${HOME}", "~"]
HOSTILE += ["2147483647", "2147483648", "-2147483649", "__import__('os')", "../../etc/passwd", "/dev/null", "a" * 3000]

texts = st.text(st.characters(), max_size=30) | st.sampled_from(HOSTILE)
numbers = st.integers() | st.floats() | st.integers(-3, 300)
names = st.sampled_from(FIELDS) | st.sampled_from(["model", "", ".", "model.", ".width", "model..width"]) | texts
overrides = st.lists(st.tuples(names, texts | numbers.map(str)), max_size=5)
stored = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda node: st.lists(node, max_size=3) | st.dictionaries(texts, node, max_size=3),
)
sections = st.dictionaries(
    st.sampled_from([section.name for section in dataclasses.fields(Config)]) | texts,
    st.dictionaries(st.sampled_from([name.split(".")[1] for name in FIELDS]) | texts, stored, max_size=4) | stored,
    max_size=4,
)


def _one_line(error: UserError) -> None:
    """The message is short enough to read, and one line once the command line has printed it."""
    assert str(error).strip() and len(str(error)) < 20_000


@bounded
@given(overrides)
def test_overrides_build_a_config_or_are_an_error(words):
    """Any text for any field: what builds is valid and comes back from its JSON; all else is a UserError."""
    values = configs.default_config_dict()
    try:
        apply_overrides(values, [f"--config.{name}={value}" for name, value in words])
        built = configs.from_config_dict(values)
    except UserError as error:
        _one_line(error)
        return
    assert configs.from_config_dict(dataclasses.asdict(built)) == built
    assert configs.to_json(built)


@bounded
@given(sections | stored)
def test_stored_values_build_a_config_or_are_an_error(values):
    """Any JSON in place of a config.json, also with NaN, huge numbers, nesting and names of no field."""
    try:
        built = configs.from_config_dict(values)
    except UserError as error:
        _one_line(error)
        return
    assert isinstance(built, Config) and configs.from_config_dict(dataclasses.asdict(built)) == built


def _run(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as stop:  # --help, and only that
            code = stop.code
            assert code == 0 and "usage:" in out.getvalue()
    return code, out.getvalue(), err.getvalue()


def _assert_one_error(argv: list[str]) -> None:
    code, out, err = _run(argv)
    if code == 0:
        assert "usage:" in out
        return
    lines = [line for line in re.split("[\r\n]", err) if line]
    assert code == 2 and out == ""
    assert [number for number, line in enumerate(lines) if line.startswith("error:")] == [len(lines) - 1], err
    assert "Traceback" not in err
    lines[-1].encode()  # can be printed everywhere


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("empty")


@pytest.mark.slow
@bounded
@given(overrides)
def test_train_with_any_overrides(monkeypatch, empty, smoke_config, words):
    """`armd train` on a corpus that is not there: whatever else is set, it ends with one error and leaves nothing."""
    monkeypatch.chdir(empty)
    argv = [
        "train",
        f"--config={smoke_config}",
        "--workdir=new",
        *(f"--config.{name}={value}" for name, value in words),
    ]
    _assert_one_error([*argv, "--config.data.path=missing.txt"])
    assert os.listdir(empty) == []


VERBS = ["prepare", "train", "sweep", "eval", "sample", "export", "import", "report", "profile"]
FLAGS = ["--source", "--out", "--tokenizer", "--vocab-size", "--length", "--text-field", "--skip-damaged", "--config"]
FLAGS += ["--workdir", "--run", "--no-ema", "--split", "--data", "--streams", "--draws", "--batch", "--seed", "--json"]
FLAGS += ["--temperature", "--top-k", "--top-p", "--prompt", "--suffix", "--help", "-h", "--config.model.width"]
FLAGS += ["--from", "--two-stream", "--max-length", "--aggregator", "--list", "--jobs", "--launcher", "--only"]
words = st.sampled_from(FLAGS) | texts
flags = st.tuples(st.sampled_from(FLAGS) | texts, texts | numbers.map(str)).map("=".join)


@bounded
@given(st.sampled_from(VERBS) | texts, st.lists(flags | words, max_size=5))
def test_any_command_line(monkeypatch, empty, verb, arguments):
    """Any words after any verb, none of which names a run, a corpus or an experiment that is there."""
    monkeypatch.chdir(empty)
    missing = {"prepare": "--source=missing.txt", "train": "--config=missing.py", "import": "--from=missing"}
    missing["sweep"] = "--config=missing.py"
    last = missing.get(verb, "--run=missing")
    _assert_one_error([verb, *arguments, last])
    assert os.listdir(empty) == []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_for_every_field(text):
    """Each of the texts that broke parsers before, for every field there is."""
    for name in FIELDS:
        values = configs.default_config_dict()
        try:
            apply_overrides(values, [f"--config.{name}={text}"])
            configs.from_config_dict(values)
        except UserError as error:
            _one_line(error)

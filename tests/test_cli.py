"""The command line: what it prints and returns, and one line for every mistake."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest

from armd_jax.cli import main as cli

ROOT = pathlib.Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _listing(*folders: pathlib.Path) -> list[str]:
    return sorted(str(path) for folder in folders for path in folder.rglob("*"))


def _assert_one_error(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str) -> None:
    """The command returns 2 and ends stderr with its one line `error: ...`, which has all the words."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [number for number, line in enumerate(lines) if line.startswith("error:")] == [len(lines) - 1], err
    for word in words:
        assert word in lines[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=32", ["model.widht", "did you mean 'model.width'"]),
        ("modle.width=32", ["did you mean 'model'"]),
        ("model.width=wide", ["model.width", "expected int"]),
        ("model.num_heads=3", ["width=32", "num_heads=3"]),
        ("order.streams=3", ["max_length=64", "3 streams"]),
        ("data.path=MISSING", ["MISSING"]),
        ("data.path=EMPTY", ["no text"]),
        ("data.path=SHORT", ["one row", "64"]),
        ("training.init_from=MISSING", ["MISSING"]),
        ("mesh.data=7", ["devices"]),
    ],
)
def test_mistakes_in_the_config(tmp_path, capsys, smoke_config, corpus, override, words):
    """A config that cannot be trained is one error line that names the field; no workdir appears."""
    (tmp_path / "EMPTY.txt").write_text("")
    (tmp_path / "SHORT.txt").write_text("one two three.\n\nfour five six.\n\nseven eight.\n")
    field, value = override.split("=")
    if value in ("EMPTY", "SHORT", "MISSING"):
        value = str(tmp_path / f"{value}.txt")
    before = _listing(tmp_path)
    command = ["train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={corpus}"]
    _assert_one_error(capsys, [*command, f"--config.{field}={value}"], *words)
    assert _listing(tmp_path) == before


def test_vocabulary_mismatches(tmp_path, capsys, smoke_run, smoke_config, corpus):
    """A vocabulary that is not the data's, in the config or of the checkpoint to start from, begins no run."""
    command = ["train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={corpus}"]
    _assert_one_error(capsys, [*command, "--config.model.vocab_size=300"], "vocab_size=300")
    command += [f"--config.training.init_from={smoke_run}", "--config.data.tokenizer=sentencepiece"]
    _assert_one_error(capsys, [*command, "--config.data.vocab_size=300"], "vocab")
    assert _listing(tmp_path) == []


def test_unwritable_workdir(tmp_path, capsys, smoke_config, corpus):
    """A workdir at or below a regular file is an error."""
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        command = ["train", f"--config={smoke_config}", f"--workdir={workdir}", f"--config.data.path={corpus}"]
        _assert_one_error(capsys, command, "--workdir")
    assert _listing(tmp_path) == [str(tmp_path / "file")]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--workdir=RUN"], ["--config"]),
        (["train", "--config=MISSING.py", "--workdir=RUN"], ["MISSING.py"]),
        (["trian"], ["trian"]),
        ([], ["VERB"]),
        (["sample", "--run=RUN"], ["RUN"]),
        (["eval", "--run=RUN"], ["RUN"]),
        (["report", "--run=RUN"], ["RUN"]),
        (["export", "--run=RUN", "--out=OUT"], ["RUN"]),
        (["eval", "--run=HERE"], ["neither a training run nor an export"]),
        (["eval", "--run=HERE", "--bogus=1"], ["--bogus"]),
        (["sample", "--run=HERE", "--streams=two"], ["--streams"]),
        (["prepare", "--source=MISSING", "--out=OUT"], ["MISSING"]),
    ],
)
def test_mistakes_in_the_command(tmp_path, monkeypatch, capsys, argv, words):
    """Missing or unknown arguments and folders that are no runs are one error line; nothing is created."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HERE").mkdir()
    _assert_one_error(capsys, argv, *words)
    assert _listing(tmp_path) == [str(tmp_path / "HERE")]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sample", "--streams=65"], ["streams=65", "64 positions"]),
        (["sample", "--length=65"], ["length=65"]),
        (["sample", f"--prompt={'a' * 65}"], ["65", "longer"]),
        (["sample", f"--prompt={'a' * 40}", f"--suffix={'b' * 40}"], ["longer"]),
        (["sample", f"--prompt={'a' * 62}", "--streams=4"], ["streams=4"]),
        (["sample", "--temperature=-1"], ["temperature"]),
        (["eval", "--split=nowhere"], ["--split"]),
        (["eval", "--data=MISSING"], ["MISSING"]),
        (["eval", "--batch=0"], ["--batch"]),
        (["sample", "--sampler=ancestral"], ["--sampler", "denoiser", "--streams"]),
        (["sample", "--steps=4"], ["--steps", "denoiser", "--streams"]),
    ],
)
def test_mistakes_with_a_run(monkeypatch, tmp_path, capsys, smoke_run, argv, words):
    """What a run cannot do is one error line, and no file of the run appears or goes."""
    monkeypatch.chdir(tmp_path)
    before = _listing(smoke_run)
    _assert_one_error(capsys, [argv[0], f"--run={smoke_run}", *argv[1:]], *words)
    assert _listing(smoke_run, tmp_path) == before


@pytest.mark.slow
def test_errors_of_the_real_command_have_no_traceback(tmp_path, smoke_config):
    """As processes of their own, wrong commands exit with 2 and one error line, without a traceback."""
    train = ["train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}"]
    for argv in ([*train, "--config.model.widht=1"], [*train, f"--config.data.path={tmp_path / 'none.txt'}"]):
        command = [sys.executable, "-m", "armd_jax", *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
        assert done.returncode == 2 and done.stdout == ""
        assert [line.startswith("error:") for line in done.stderr.splitlines()].count(True) == 1
        assert "Traceback" not in done.stderr
    assert _listing(tmp_path) == []


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_train_eval_sample_export(tmp_path, capsys, smoke_run, smoke_config, corpus):
    """Each verb prints its result as one JSON object, and an export scores exactly as the run it came from."""
    again = ["train", f"--config={smoke_config}", f"--workdir={smoke_run}", f"--config.data.path={corpus}"]
    assert _json(capsys, *again) == {"workdir": str(smoke_run), "step": 40, "steps_done": 0, "stopped": False}

    copy = tmp_path / "export"
    assert _json(capsys, "export", f"--run={smoke_run}", f"--out={copy}") == {"out": str(copy)}
    scores = [_json(capsys, "eval", f"--run={run}", "--streams=2") for run in (smoke_run, copy)]
    assert scores[0] == scores[1] == json.loads((smoke_run / "eval.json").read_text())
    for name in ("left_to_right", "random_orders", "unigram"):
        assert {"nats_per_token", "perplexity_per_token", "perplexity_per_word", "bits_per_byte"} <= scores[0][
            name
        ].keys()
    assert list(scores[0]["strided"]) == ["2"]
    assert scores[0]["left_to_right"]["bits_per_byte"] < 8

    options = ("--streams=2", "--length=16", "--prompt=the ", "--suffix=.")
    drawn = [_json(capsys, "sample", f"--run={run}", *options)["samples"] for run in (smoke_run, copy)]
    assert drawn[0][0]["tokens"] == drawn[1][0]["tokens"]
    assert drawn[0][0]["num_calls"] == 2 + 6 - 1  # 11 free positions
    assert drawn[0][0]["text"].startswith("the ") and drawn[0][0]["text"].endswith(".")
    assert (smoke_run / "samples.json").exists()


SHORT = ["--config.optimizer.schedule=constant", "--config.training.tensorboard=false"]
SHORT += ["--config.training.num_steps=2", "--config.order.sbp_steps=0"]


def _events(run: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] != "spent"]


@pytest.mark.slow
def test_what_prepare_wrote_is_trained_on(tmp_path, monkeypatch, capsys, smoke_run, smoke_config, corpus):
    """On a machine without the text, the command that `armd prepare` prints trains on the rows that the text gives, and
    its run is evaluated there. Each of the verbs that cannot take them says which one can."""
    shutil.copy(corpus, tmp_path / "docs.jsonl")
    monkeypatch.chdir(tmp_path)
    words = ("--source=docs.jsonl", "--out=my rows", "--tokenizer=bytes", "--length=64")
    printed = shlex.split(_json(capsys, "prepare", *words)["train"])
    assert printed[:4] == ["armd", "train", "--config=FILE.py", "--workdir=RUN"]
    (tmp_path / "machine").mkdir()
    shutil.move("my rows", tmp_path / "machine")
    monkeypatch.chdir(tmp_path / "machine")
    (tmp_path / "docs.jsonl").unlink()
    train = ["train", f"--config={smoke_config}", "--workdir=run", *printed[4:], *SHORT]
    assert _json(capsys, *train)["steps_done"] == 2
    assert _events(pathlib.Path("run"))[0]["data"] == _events(smoke_run)[0]["data"]
    assert not pathlib.Path("run/data").exists()
    own = _json(capsys, "eval", "--run=run", "--streams=2", "--draws=0")
    other = _json(capsys, "eval", "--run=run", "--streams=2", "--draws=0", "--data=my rows")
    assert own | {"other_text": True} == other and own["ema"] and not own["other_text"]
    assert own["xz_bits_per_byte"] == json.loads(pathlib.Path("run/eval.json").read_text())["xz_bits_per_byte"] > 0
    quick = _json(capsys, "eval", "--run=run", "--streams=2", "--draws=0", "--no-baselines")
    assert quick["left_to_right"] == own["left_to_right"] and quick["unigram"] is quick["xz_bits_per_byte"] is None
    _assert_one_error(capsys, ["prepare", "--source=my rows", "--out=new"], "--config.data.path='my rows'")
    _assert_one_error(capsys, [*train, "--config.model.max_length=32"], "model.max_length was 64, now 32")
    train[2] = "--workdir=new"
    _assert_one_error(capsys, [*train, "--config.model.max_length=32"], "set model.max_length=64", "--length=32")
    assert not pathlib.Path("new").exists()


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder(tmp_path, monkeypatch, capsys, smoke_config, corpus):
    """However the path to the text is spelled; what changed is said once. Its test split needs no text at all."""
    shutil.copy(corpus, tmp_path / "docs.jsonl")
    monkeypatch.chdir(tmp_path)
    start = ["train", f"--config={smoke_config}", "--workdir=run", "--config.data.path=docs.jsonl", *SHORT]
    assert cli.main(start) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    go_on = ["train", f"--config={smoke_config}", "--workdir=../run", "--config.data.path=../docs.jsonl", *SHORT]
    go_on[-2] = "--config.training.num_steps=3"
    capsys.readouterr()
    for times_said in (1, 0):
        assert cli.main(go_on) == 0
        said = capsys.readouterr().err
        assert said.count("data.path was 'docs.jsonl', now '../docs.jsonl'") == times_said
    assert [row["event"] for row in _events(tmp_path / "run")] == ["start", "save", "end", "resume", "save", "end"]
    (tmp_path / "docs.jsonl").unlink()
    assert _json(capsys, "eval", "--run=../run", "--streams=2", "--draws=0")["tokens"] > 0
    capsys.readouterr()
    go_on[-2] = "--config.training.num_steps=4"
    assert cli.main(go_on) == 0
    assert "'../docs.jsonl': there is no such file or folder; the run goes on with its own" in capsys.readouterr().err


@pytest.mark.slow
def test_texts_under_a_judge(tmp_path, capsys, smoke_run):
    """A table of every setting and of real text; what is asked for once more is not drawn once more."""
    argv = ["eval", f"--run={smoke_run}", f"--judge={smoke_run}", "--samples=2", "--length=8", "--streams=1,2"]
    argv += [f"--out={tmp_path}"]
    first = _json(capsys, *argv, "--temperatures=0.5,1")
    file = tmp_path / "generation.json"
    assert first == json.loads(file.read_text()) and first["entries"][0]["text"] == "test split"
    drawn = [(one["streams"], one["temperature"]) for one in first["entries"][1:]]
    assert drawn == [(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)]
    assert all(one["judge"]["name"] == str(smoke_run) and one["judge_tokens"] == 16 for one in first["entries"])
    before = file.stat().st_mtime_ns
    assert cli.main([*argv, "--temperatures=1"]) == 0
    assert file.stat().st_mtime_ns == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("strided", "real"))]
    assert [" ".join(line.split()[:5]) for line in lines][:2] == ["strided, S = 1 1", "strided, S = 2 1"]
    assert len(lines) == 3 and lines[2].startswith("real text (test split)") and "±" in lines[0]


@pytest.mark.slow
def test_a_denoiser_through_all_verbs(tmp_path, capsys, corpus, smoke_run):
    """Training, evaluation, samples, export and report of model.kind=denoiser; no figure pretends to be exact."""
    run, copy = tmp_path / "run", tmp_path / "export"
    config = [f"--config={ROOT / 'experiments' / 'mdlm.py'}:smoke", f"--config.data.path={corpus}"]
    assert _json(capsys, "train", *config, f"--workdir={run}")["step"] == 40
    assert _json(capsys, "export", f"--run={run}", f"--out={copy}") == {"out": str(copy)}
    scores = [_json(capsys, "eval", f"--run={folder}", "--seed=3") for folder in (run, copy)]
    assert scores[0] == scores[1] == json.loads((run / "eval.json").read_text())
    assert not {"left_to_right", "random_orders"} & scores[0].keys() and scores[0]["strided"] == {}
    elbo = scores[0]["elbo"]
    assert elbo["draws"] == 4 and 0 < elbo["standard_error"] < 0.1 * elbo["nats_per_token"]
    assert 1 < elbo["bits_per_byte"] < 8 and elbo["diffusion_steps"] is None
    assert "standard_error" not in _json(capsys, "eval", f"--run={copy}", "--draws=1")["elbo"]
    assert cli.main(["eval", f"--run={run}"]) == 0
    assert "left to right" not in (table := capsys.readouterr().out) and "ELBO" in table and "±" in table

    options = ("--length=16", "--prompt=the ", "--suffix=.")
    for sampler, steps in (("first_hitting", ()), ("confidence", ("--steps=3",)), ("ancestral", ("--steps=3,6",))):
        drawn = [
            _json(capsys, "sample", f"--run={folder}", f"--sampler={sampler}", *steps, *options)["samples"]
            for folder in (run, copy)
        ]
        for one, other in zip(*drawn, strict=True):
            assert one["tokens"] == other["tokens"] and one["sampler"] == sampler and "streams" not in one
            assert one["text"].startswith("the ") and one["text"].endswith(".")
            assert one["num_calls"] == max(one["calls"]) <= 11
    assert [one["steps"] for one in drawn[0]] == [3, 6]

    judged = ["eval", f"--run={run}", f"--judge={smoke_run}", "--samples=2", "--length=8", "--temperatures=0.9"]
    entries = _json(capsys, *judged, "--samplers=ancestral,confidence", "--steps=3")["entries"]
    assert [(one["sampler"], one["steps"]) for one in entries[1:]] == [("ancestral", 3), ("confidence", 3)]
    assert entries[1]["own_nats_per_token"] is None and entries[1]["num_calls"] <= 3 == entries[2]["num_calls"]

    assert cli.main(["report", f"--run={run}"]) == 0
    page = (run / "report.html").read_text()
    assert "ancestral, 3 steps" in page.partition("What a judge says")[2] and (run / "frontier.png").exists()
    assert "a masked diffusion model" in page and "a bound: ELBO" in page and "negative ELBO" in page
    shown = re.sub('base64,[^"]*', "", page).partition("Configuration")[0]
    assert "exact" not in shown and "stream" not in shown
    assert not (run / "masks.png").exists() and "first-hitting" not in page and "ancestral, 3 steps" in page

    before = _listing(run)
    for argv, words in (
        (["sample", "--streams=2"], ["--streams", "--sampler"]),
        (["sample", "--steps=4"], ["first_hitting", "leave steps out"]),
        (["sample", "--sampler=ancestral", "--steps=0"], ["--steps", "whole numbers"]),
        (["sample", "--sampler=gibbs"], ["--sampler", "gibbs"]),
        (["eval", "--streams=2"], ["--streams=2", "leave it out"]),
        (["eval", "--orders=2"], ["--orders", "denoiser", "ELBO"]),
        (["eval", "--price"], ["--price", "denoiser", "ELBO"]),
        (["eval", "--tasks=lambada"], ["denoiser", "--tasks"]),
        (["eval", f"--judge={run}"], ["--judge", "denoiser"]),
        (["eval", f"--judge={smoke_run}", "--streams=2"], ["--streams=2", "belongs to an ARMD"]),
    ):
        _assert_one_error(capsys, [argv[0], f"--run={run}", *argv[1:]], *words)
    train = ["train", *config, f"--workdir={tmp_path / 'other'}"]
    _assert_one_error(capsys, [*train, "--config.order.sbp_steps=5"], "order.sbp_steps=5", "set it to 0")
    assert _listing(run) == before and not (tmp_path / "other").exists()


def test_only_closed_event_loops_are_kept_from_the_terminal(monkeypatch):
    """Whatever else goes wrong where nobody can catch it is shown as before, once, however many commands were run."""
    shown = []

    def show(unraisable):
        shown.append(unraisable)

    monkeypatch.setattr(sys, "unraisablehook", show)
    closed, other = (types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    hooks = []
    for _ in range(2):
        assert cli.main(["sample", "--run=missing"]) == 2
        hooks.append(sys.unraisablehook)
    assert hooks[0] is hooks[1]
    sys.unraisablehook(closed)
    sys.unraisablehook(other)
    assert shown == [other]

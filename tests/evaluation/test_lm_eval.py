"""The harness: its likelihoods are the parallel pass's, its texts those of the library, and its mistakes one line."""

import dataclasses
import importlib
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read when the harness is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import armd_jax.evaluation
from armd_jax import order
from armd_jax.cli import main as cli
from armd_jax.config import ModelConfig
from armd_jax.core import objective
from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop.load import load

harness = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
Instance = pytest.importorskip("lm_eval.api.instance").Instance
adapter = importlib.import_module("armd_jax.evaluation.lm_eval")

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 16  # of the model of the fixture `lm`
TEXT = "the old river moves slowly under a bird"


def _ask(model: Any, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    requests = [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]
    return getattr(model, kind)(requests, disable_tqdm=True)


def _plain(lm: LanguageModel, context: str, continuation: str, streams: int = 1) -> float:
    """log p of a continuation from `lm.log_prob`, one text at a time and without padding."""
    tokens = np.array([list((context + continuation).encode())])[:, -lm.config.max_length :]
    length, free = tokens.shape[1], min(len(continuation.encode()), tokens.shape[1])
    evidence = np.arange(length) < length - free
    if streams == 1:
        drawn = order.left_to_right(1, length)
    else:
        drawn = order.strided(1, length, streams, evidence=evidence if evidence.any() else None)
    return float(np.asarray(lm.log_prob(tokens, drawn), np.float64)[0, ~evidence].sum())


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_likelihoods_are_those_of_the_parallel_pass(lm, streams):
    """For contexts and continuations of any length, whatever batch they are in."""
    pairs = [("the", " river"), ("", "stones"), ("a", " b"), (TEXT, " sees"), ("old", TEXT[:12]), ("", TEXT + TEXT)]
    pairs += [("Ünï", "cödé")]
    expected = [_plain(lm, *pair, streams) for pair in pairs]
    for batch in (1, 3, 16):
        found = _ask(adapter.Armd(lm, streams, batch_size=batch), "loglikelihood", *pairs)
        np.testing.assert_allclose([nats for nats, _ in found], expected, rtol=1e-5)
    if streams == 2:  # or the other order would not be another one
        assert abs(expected[0] - _plain(lm, *pairs[0])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_greedy_is_what_greedy_decoding_writes(lm, streams):
    """A continuation is greedy if it is the one that temperature 0 gives, and not with any other token in it."""
    ids = list(b"the ")
    made = lm.generate(prompt=ids, max_new_tokens=6, temperature=0, streams=streams, stop_at_end=False)
    written = made.tokens_BN[0, 4:10].tolist()
    others = [written[:at] + [(written[at] + 1) % 256] + written[at + 1 :] for at in range(6)]
    pairs = [(("", ""), ids, each) for each in (written, *others, written[:1], [])]
    found = adapter.Armd(lm, streams)._loglikelihood_tokens(pairs, disable_tqdm=True)
    one_stream = streams == 1  # a prefix of what two streams write has another order
    assert [greedy for _, greedy in found[:7]] == [True] + [False] * 6
    assert found[7][1] or not one_stream
    assert found[8] == (0.0, True)  # nothing is certain


@pytest.mark.slow
def test_what_is_too_long_is_cut_from_the_left(lm, caplog):
    """The context goes first, then the beginning of the continuation, and one line says how many."""
    model = adapter.Armd(lm)
    found = _ask(model, "loglikelihood", (TEXT, " sees"), ("", TEXT), ("a", "b"))
    seen = (TEXT + " sees").encode()[-LENGTH:].decode()
    np.testing.assert_allclose(found[0][0], _plain(lm, seen[:-5], " sees"), rtol=1e-5)
    np.testing.assert_allclose(found[1][0], _plain(lm, "", TEXT[-LENGTH:]), rtol=1e-5)
    assert "2 of 3 texts are longer than 16" in caplog.text and "1 of them inside the continuation" in caplog.text
    caplog.clear()
    _ask(model, "loglikelihood_rolling", (TEXT,))  # windows are cut on purpose
    _ask(model, "loglikelihood", ("", TEXT[:LENGTH]))
    assert not caplog.text


@pytest.mark.slow
def test_rolling_windows(lm):
    """Full windows are rows of `armd eval`, each from the start token; the last one takes what is before it along."""
    model = adapter.Armd(lm)
    full, part, short = TEXT[: 2 * LENGTH], TEXT[: 2 * LENGTH + 5], TEXT[:7]
    found = _ask(model, "loglikelihood_rolling", (full,), (part,), ("",), (short,))
    rows = jnp.array(list(full.encode())).reshape(2, LENGTH)
    loss_sums = jax.jit(objective.loss_sums, static_argnums=1)
    scored = loss_sums(lm.params, lm.config, rows, order.left_to_right(2, LENGTH))
    np.testing.assert_allclose(found[0], -float(scored.nll), rtol=1e-5)
    last = _plain(lm, part[-LENGTH:-5], part[-5:])
    np.testing.assert_allclose(found[1] - found[0], last, rtol=1e-4)
    assert found[2] == 0
    np.testing.assert_allclose(found[3], _plain(lm, "", short), rtol=1e-5)
    # The first token has its probability under the start token, and not behind an end-of-text.
    alone = float(lm.log_prob(np.array([[ord("t")]]), order.left_to_right(1, 1))[0, 0])
    behind = float(lm.log_prob(np.array([[256, ord("t")]]), order.left_to_right(1, 2))[0, 1])
    np.testing.assert_allclose(_ask(model, "loglikelihood_rolling", ("t",))[0], alone, rtol=1e-5)
    np.testing.assert_allclose(_ask(model, "loglikelihood", ("", "t"))[0][0], alone, rtol=1e-5)
    assert abs(alone - behind) > 1e-3


def _toy(length: int) -> LanguageModel:
    fields: dict[str, Any] = dict(vocab_size=257, max_length=length, num_layers=2, two_stream_layers=1, width=16)
    config = ModelConfig(**fields, num_heads=2, mlp_width=32, positional_width=8, dtype="float32")
    return dataclasses.replace(LanguageModel.create(config), tokenizer=BytesTokenizer())


@pytest.mark.slow
def test_a_hundred_lengths_are_few_programs():
    """100 requests of 100 lengths compile a program for each of 3 widths, however often and however many are asked."""
    found: list[str] = []

    def listen(event: str, duration: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(facts.get("fun_name")))

    model = adapter.Armd(_toy(128))
    texts = [(TEXT * 3)[:length] for length in range(1, 101)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        _ask(model, "loglikelihood", *[(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts])
        assert 3 <= len(found) <= 9, found  # three to score, and what cuts their two results out
        found.clear()
        for text in texts[::9]:
            _ask(model, "loglikelihood", ("", text))
            _ask(model, "loglikelihood_rolling", (text + text,))
        assert not found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_texts_are_those_of_the_library(lm):
    """Texts end where they have to, are the same in every batch, and if they are drawn, differ by request."""
    prompts = ["the ", TEXT, "", "Ünï", "old "]
    greedy = {"until": ["\n\n"], "max_gen_toks": 6}
    expected = []
    for prompt in prompts:
        ids = list(prompt.encode())[-(LENGTH - 6) :]
        made = lm.generate(prompt=ids, max_new_tokens=6, temperature=0)
        whole, given = lm.texts(made)[0], lm.tokenizer.decode(ids)
        expected.append(whole[len(os.path.commonprefix([whole, given])) :])
    for batch, mode in ((1, "strided"), (4, "strided"), (1, "lossless")):
        model = adapter.Armd(lm, 2 if mode == "lossless" else 1, mode, batch_size=batch)
        assert _ask(model, "generate_until", *[(prompt, greedy) for prompt in prompts]) == expected
    # A text ends before what is in it for certain.
    inside = next(text for text in expected if len(text) > 3)
    stop = {"until": inside[2], "max_gen_toks": 6}
    cut = _ask(adapter.Armd(lm, batch_size=1), "generate_until", (prompts[expected.index(inside)], stop))[0]
    assert cut == inside[: inside.index(inside[2])]

    drawn = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 6}
    asked = [("the ", drawn), ("a ", greedy)] * 4
    several = [_ask(adapter.Armd(lm, seed=3, batch_size=batch), "generate_until", *asked) for batch in (1, 4)]
    assert several[0] == several[1] and len(set(several[0][::2])) == 4 and len(set(several[0][1::2])) == 1
    other = _ask(adapter.Armd(lm, seed=4, batch_size=4), "generate_until", *asked)
    assert other[0] != several[0][0] and other[1] == several[0][1]


def test_settings_that_cannot_be_are_an_error(lm):
    """One line each, also for what a task asks of generation."""
    for arguments, words in (
        ({"streams": 0}, "streams=0: must be"),
        ({"streams": "auto"}, "streams=auto: must be"),
        ({"mode": "confident"}, "scores no given text"),
        ({"mode": "fast"}, "mode"),
        ({"batch_size": 0}, "batch_size=0: must be"),
    ):
        with pytest.raises(UserError, match=words):
            adapter.Armd(lm, **arguments)
    with pytest.raises(UserError, match="no tokenizer"):
        adapter.Armd(dataclasses.replace(lm, tokenizer=None))
    denoiser = ModelConfig(kind="denoiser", vocab_size=257, max_length=8, num_layers=1, width=8, num_heads=1)
    with pytest.raises(UserError, match="no exact likelihood"):
        adapter.Armd(LanguageModel(denoiser, {}, BytesTokenizer()))
    for asked, words in (
        ({"max_gen_toks": LENGTH}, f"max_gen_toks={LENGTH}: .* room for a context"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"do_sample": True, "temperature": 1.0, "typical_p": 0.5}, "typical_p"),
    ):
        with pytest.raises(UserError, match=words):
            _ask(adapter.Armd(lm), "generate_until", ("the ", asked))


# --- tasks ------------------------------------------------------------------------------------------------------------


ROWS: dict[str, list[dict[str, Any]]] = {
    "own_rolling": [{"text": TEXT}, {"text": "old stone. " * 20}, {"text": "Ünïcödé ☃"}],
    "own_choice": [
        {"question": "the river moves", "choices": ["slowly", "zzzzzz"], "answer": 0},
        {"question": "a bird", "choices": ["qqqq", "sees"], "answer": 0},
        {"question": "new", "choices": ["light", "####"], "answer": 0},
    ],
    "own_words": [{"question": "the old river ", "answer": "no such answer"}, {"question": "a tree ", "answer": ""}],
}
TASKS = {
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" ", "\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of three tasks, whose data and the harness' copies of them are local."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        data = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text.lstrip())
    return folder


@pytest.fixture(scope="module")
def smoke(smoke_run: pathlib.Path) -> LanguageModel:
    return load(smoke_run)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2])
def test_three_tasks_offline(tmp_path, capsys, tasks, smoke_run, smoke, streams):
    """`armd eval --tasks` gives the figures that follow from the library, and keeps what it printed."""
    out = tmp_path / "out"
    command = ["eval", f"--run={smoke_run}", "--tasks=own_*", f"--include-path={tasks}", f"--out={out}"]
    assert cli.main([*command, f"--streams={streams}", "--json", "--batch=4"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found == json.loads((out / "lm_eval.json").read_text()) and os.listdir(out) == ["lm_eval.json"]
    assert (found["streams"], found["mode"], found["limit"]) == (streams, "strided", None)
    results = found["results"]

    length, nats = smoke.config.max_length, 0.0
    texts = [row["text"].encode() for row in ROWS["own_rolling"]]
    for text in texts:  # the harness' windows, written out
        ends = [*range(length, len(text), length), len(text)]
        for start, end in zip([0, *ends], ends, strict=False):
            row = np.array([list(text[max(end - length, 0) : end])])
            evidence = np.arange(row.shape[1]) < row.shape[1] - (end - start)
            drawn = (
                order.strided(1, row.shape[1], streams, evidence=evidence) if streams > 1 and evidence.any() else None
            )
            if drawn is None:
                drawn = _strided(row.shape[1], streams)
            nats -= float(np.asarray(smoke.log_prob(row, drawn), np.float64)[0, ~evidence].sum())
    bits = nats / math.log(2) / sum(map(len, texts))
    assert results["own_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)

    right = 0
    for row in ROWS["own_choice"]:
        scores = [_plain(smoke, row["question"], " " + choice, streams) for choice in row["choices"]]
        right += int(np.argmax(scores)) == row["answer"]
    assert results["own_choice"]["acc,none"] == pytest.approx(right / 3) and 0 < right < 3
    assert "acc_stderr,none" in results["own_choice"]

    exact = 0
    for row in ROWS["own_words"]:
        made = smoke.generate(
            prompt=list(row["question"].encode()), max_new_tokens=8, temperature=0, streams=streams, stop=[" ", "\n"]
        )
        exact += smoke.texts(made)[0][len(row["question"]) :] == row["answer"]
    assert results["own_words"]["exact_match,none"] == pytest.approx(exact / 2)


@pytest.mark.slow
def test_rolling_bits_are_those_of_the_evaluation(tmp_path, capsys, tasks, smoke_run, smoke):
    """A text that fills three rows has the same windows in both; the evaluation adds the end of the text."""
    text = "the old river moves slowly; " * 7
    text = text[: 3 * smoke.config.max_length]
    assert len(smoke.tokenizer.encode(text)) == 3 * smoke.config.max_length
    (tasks / "own_rolling.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "test.txt").write_text(text)
    (tmp_path / "train.txt").write_text("Training has to have a row at least. " * 9)
    here = [f"--run={smoke_run}", "--json"]
    assert cli.main(["eval", *here, "--tasks=own_rolling", f"--include-path={tasks}", f"--out={tmp_path / 'h'}"]) == 0
    harness = json.loads(capsys.readouterr().out)["results"]["own_rolling"]["bits_per_byte,none"]
    words = [f"--data={tmp_path}/*.txt", "--draws=0", "--no-baselines", "--streams=2", f"--out={tmp_path / 'e'}"]
    assert cli.main(["eval", *here, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    end = np.array([[smoke.tokenizer.end_of_text]])  # alone in a fourth row
    ending = -float(smoke.log_prob(end, order.left_to_right(1, 1))[0, 0]) / math.log(2)
    assert ending > 0.1
    assert found["left_to_right"]["bits_per_byte"] == pytest.approx(harness + ending / len(text), rel=1e-5)


def _strided(length: int, streams: int) -> Any:
    """The strided order of a text whose length S need not divide, from blocks."""
    sizes = [length // streams + (stream < length % streams) for stream in range(streams)]
    starts = np.cumsum([0, *sizes])[:-1]
    later = [[int(s) + d for s, n in zip(starts, sizes, strict=True) if n > d] for d in range(1, max(sizes))]
    return order.from_blocks([[int(start)] for start in starts] + later)


@pytest.mark.slow
def test_the_harness_knows_the_model_by_name(capsys, tasks, smoke_run):
    """From Python and from its own command line, which sees `armd` beside the models of the harness."""
    manager = adapter.TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = f"path={smoke_run},streams=2,mode=lossless"
    found = harness.simple_evaluate(
        model="armd", model_args=arguments, tasks=["own_choice"], task_manager=manager, bootstrap_iters=0, limit=2
    )
    assert found["n-samples"]["own_choice"] == {"original": 3, "effective": 2}
    assert found["results"]["own_choice"]["acc,none"] in (0, 0.5, 1)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """The harness' command line sets up logging to the standard error of its time."""
    logger = logging.getLogger("lm_eval")
    handlers, level, propagates = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagates
    logger.setLevel(level)


@pytest.mark.slow
@pytest.mark.usefixtures("logging_as_before")
def test_the_command_line_of_the_harness(monkeypatch, capsys, tasks, smoke_run, tmp_path):
    """`python -m armd_jax.evaluation.lm_eval` runs a task, and says our mistakes in one line."""
    # Without the harness' own tasks, which take seconds to read.
    monkeypatch.setattr(adapter.TaskManager.__init__, "__defaults__", (None, None, False, None))
    command = ["lm_eval", "--model", "armd", "--tasks", "own_choice", "--include_path", str(tasks), "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", f"path={smoke_run}"])
    assert adapter.main() == 0
    assert "|own_choice|" in capsys.readouterr().out.replace(" ", "")
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", f"path={tmp_path / 'nowhere'}"])
    assert adapter.main() == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_the_command_without_the_extra():
    """`python -m armd_jax.evaluation.lm_eval` says what to install in one line."""
    code = "import runpy, sys; sys.modules['lm_eval'] = None\n"
    code += "runpy.run_module('armd_jax.evaluation.lm_eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and ".[eval]" in done.stderr


@pytest.mark.slow
def test_mistakes_are_one_line(monkeypatch, capsys, tasks, smoke_run):
    """Names that are no tasks, tasks that cannot be loaded, and a harness that is not there; nothing is written."""
    (tasks / "broken.yaml").write_text(
        "task: own_broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    include, before = f"--include-path={tasks}", sorted(smoke_run.iterdir())

    def refuse(*words: str, argv: list[str]) -> None:
        capsys.readouterr()
        assert cli.main(["eval", f"--run={smoke_run}", *argv]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert out == "" and len(lines) == 1 and err.endswith(lines[0] + "\n") and "Traceback" not in err
        assert all(word in lines[0] for word in words), lines

    refuse("own_choise", "did you mean 'own_choice'?", argv=["--tasks=own_rolling,own_choise", include])
    refuse("--tasks=own_broken", "cannot be loaded", argv=["--tasks=own_broken", include])
    refuse("--include-path", "is not a folder", argv=["--tasks=own_rolling", f"{include}/none"])
    refuse("name at least one", argv=["--tasks=,"])
    refuse("one number of streams", argv=["--tasks=own_rolling", "--streams=1,2"])
    refuse("--limit=0", argv=["--tasks=own_rolling", "--limit=0"])
    refuse("--draws", "--tasks", argv=["--tasks=own_rolling", "--draws=2"])
    refuse("--split", "--tasks", argv=["--tasks=own_rolling", "--split=test"])
    refuse("--limit", "--tasks", argv=["--limit=2"])
    refuse("--include-path", "--tasks", argv=[include])
    monkeypatch.delattr(armd_jax.evaluation, "lm_eval")
    monkeypatch.delitem(sys.modules, "armd_jax.evaluation.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refuse("lm_eval", "pip install -e '.[eval]'", argv=["--tasks=own_rolling", include])
    assert sorted(smoke_run.iterdir()) == before

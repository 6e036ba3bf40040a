"""The benchmark of decoding modes: its figures are computed once more, in another way, from texts drawn one by one."""

import collections
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest

import armd_jax as armd
from armd_jax import typed
from armd_jax.config import Config, ModelConfig
from armd_jax.data.sentencepiece_training import train_model
from armd_jax.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, Tokenizer
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import readable
from armd_jax.names import DecodingMode
from armd_jax.order_config import OrderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
LENGTH, TEXTS, BATCH, TURNS, PROMPT, SEED = 8, 4, 2, 2, 3, 5
FLAGS = [f"--length={LENGTH}", f"--texts={TEXTS}", f"--batch={BATCH}", f"--turns={TURNS}", f"--prompt={PROMPT}"]
FLAGS += [f"--seed={SEED}", "--streams", "2", "--temperatures", "0", "--max-entropy=3.5"]
CASES = [("strided", 1), *((mode, 2) for mode in typed.choices(DecodingMode))]
MODEL = ModelConfig(
    vocab_size=BytesTokenizer().vocab_size, max_length=12, num_layers=1, two_stream_layers=1, width=16, num_heads=2
)


@functools.cache
def _params(seed: int) -> dict[str, Any]:
    """Nobody has trained them; they are larger than usual, so that a model is sure of some of its tokens.

    Among those that it likes is the end of a text, behind which the benchmark goes on.
    """
    params = jax.tree.map(lambda value: 1.5 * value, LanguageModel.create(MODEL, seed).params)
    return params | {"embedding": params["embedding"].at[BytesTokenizer().end_of_text].multiply(20)}


def _export(folder: pathlib.Path, seed: int, tokenizer: Tokenizer) -> pathlib.Path:
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    lm = LanguageModel(config, _params(seed), tokenizer)
    readable.write(readable.of(lm), Config(model=config, order=OrderConfig(max_permuted=4)), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """The model and its judge. Both have one shape, so that few programs are compiled."""
    folder = tmp_path_factory.mktemp("models")
    return _export(folder / "model", 0, BytesTokenizer()), _export(folder / "judge", 1, BytesTokenizer())


def _run(script: str, *words: str) -> int:
    """The exit code of a script that is run inside this process."""
    file = EXPERIMENTS / script
    spec = importlib.util.spec_from_file_location(f"script_{file.parent.name}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(file.parent))
        patch.setattr(sys, "argv", [str(file), *words])
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        code = module.main()
    for name in ("common", "trainings"):
        if name not in before:
            sys.modules.pop(name, None)
    return code


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> pathlib.Path:
    """What the benchmark writes about them."""
    file = tmp_path_factory.mktemp("results") / "new" / "modes.json"
    words = [f"--run={folders[0]}", f"--judge={folders[1]}", f"--results={file}", *FLAGS, "--turns=0"]
    assert _run("benchmarks/modes.py", *words) == 0
    return file


@pytest.fixture(scope="module")
def result(results):
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def timed(folders, tmp_path_factory):
    """The same with speeds, of lossless decoding alone."""
    file = tmp_path_factory.mktemp("results") / "modes.json"
    words = [f"--run={folders[0]}", f"--judge={folders[1]}", f"--results={file}", *FLAGS, "--modes", "lossless"]
    assert _run("benchmarks/modes.py", *words) == 0
    return json.loads(file.read_text())


def test_every_mode_has_a_row_for_every_number_of_streams(result):
    """Strided with S = 1, to which speeds are compared, comes first."""
    assert [(row["mode"], row["streams"]) for row in result["modes"]] == CASES


@pytest.mark.slow
def test_speeds_are_compared_with_one_stream(timed):
    """Its own ratio is 1, and every row has a speed."""
    assert [row["mode"] for row in timed["modes"]] == ["strided", "lossless"]
    for rows in (timed["modes"], timed["lossless"]):
        assert rows[0]["speed_over_s1"] == 1
        assert all(row["tokens_per_second"] > 0 and row["speed_over_s1"] > 0 for row in rows)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_figures_of_a_mode(folders, result, number):
    """Texts drawn in other company, scored token by token from logits, and counted with Python's own counters."""
    lm, judge = map(armd.load, folders)
    row = result["modes"][number]
    how = {"mode": row["mode"], "streams": row["streams"], "max_entropy": 3.5, "stop_at_end": False}
    texts, calls, own = [], [], []
    for seeds in ([SEED + 3, SEED], [SEED + 2, SEED + 1]):
        made = lm.generate(2, LENGTH, seed=seeds, **how)
        texts += made.tokens_BN.tolist()
        # Every call draws a token of each text that is not complete; of confident decoding, every other one does.
        calls += [len(set(call_N)) * (2 if row["mode"] == "confident" else 1) for call_N in made.call_BN.tolist()]
        own += (-made.log_prob_BN.sum(axis=1) / LENGTH).tolist()

    assert row["texts"] == TEXTS and any(BytesTokenizer().end_of_text in text[:-1] for text in texts)
    assert row["calls_per_token"] == pytest.approx(np.mean(calls) / LENGTH)
    assert row["mode"] != "confident" or 1 < row["calls_per_token"] < 2  # some blocks have one token, some have two
    assert row["nats_per_token"] == pytest.approx(np.mean(own), rel=1e-5)
    assert row["nats_per_token_error"] == pytest.approx(np.std(own, ddof=1) / TEXTS**0.5, rel=1e-4)
    assert row["largest_difference"] < 1e-4

    judged = []
    logits_BNV = np.asarray(judge.logits(np.array(texts), armd.order.left_to_right(TEXTS, LENGTH)), np.float64)
    for text, logits_NV in zip(texts, logits_BNV, strict=True):
        laws_NV = np.exp(logits_NV) / np.exp(logits_NV).sum(axis=1, keepdims=True)
        judged.append(-np.mean([math.log(law_V[token]) for law_V, token in zip(laws_NV, text, strict=True)]))
    perplexity = math.exp(np.mean(judged))
    assert row["generative_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    error = perplexity * np.std(judged, ddof=1) / TEXTS**0.5
    assert row["generative_perplexity_error"] == pytest.approx(error, rel=1e-3)

    counts = collections.Counter(token for text in texts for token in text)
    shares = [count / (TEXTS * LENGTH) for count in counts.values()]
    assert row["entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares))
    pairs = [pair for text in texts for pair in zip(text, text[1:], strict=False)]
    assert row["distinct_bigrams"] == pytest.approx(len(set(pairs)) / len(pairs))


def test_the_judge_writes_texts_that_suit_it(result):
    """Its own perplexity is what it says of its texts, and it is lower than that of the model's."""
    judge = result["judge"]
    assert judge["generative_perplexity"] == pytest.approx(math.exp(judge["nats_per_token"]), rel=1e-5)
    assert judge["generative_perplexity"] < result["modes"][0]["generative_perplexity"]


@pytest.mark.slow
def test_figures_of_lossless_decoding(folders, timed):
    """What is kept of the drafts of all turns, how many tokens a call gives, and that the texts are those of S = 1."""
    lm = armd.load(folders[0])
    rows = timed["lossless"]
    expected = [(0, "strided", 1), (0, "lossless", 2)]
    assert [(row["temperature"], row["mode"], row["streams"]) for row in rows] == expected
    for row in rows:
        drafted, kept, calls = 0, 0, 0
        for turn in range(TURNS):
            prompt = lm.generate(2, LENGTH, seed=[SEED + turn, 0], stop_at_end=False).tokens_BN[0, :PROMPT].tolist()
            how = {"mode": row["mode"], "streams": row["streams"], "temperature": row["temperature"]}
            made = lm.generate(prompt=prompt, length=LENGTH, seed=SEED + turn + 1, stop_at_end=False, **how)
            drafted, kept, calls = drafted + made.drafted, kept + made.accepted, calls + made.num_calls
        assert row["acceptance"] == (kept / drafted if drafted else None)
        assert row["tokens_per_call"] == pytest.approx(TURNS * (LENGTH - PROMPT) / calls)
        assert row["largest_difference"] < 1e-4
        assert row["same_texts"] == 1
    assert 0 < rows[1]["acceptance"] < 1


def test_figures_are_printed(folders, capsys):
    """Without timings, one mode: a table with a row for each number of streams, and the judge's."""
    flags = ["--modes", "confident", "--turns=0"]
    assert _run("benchmarks/modes.py", f"--run={folders[0]}", f"--judge={folders[1]}", *FLAGS, *flags) == 0
    lines = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = [(mode.removeprefix("| "), streams) for mode, streams in lines[2:]]
    assert found == [("strided", "1"), ("confident", "2"), ("AR judge itself", "1")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--texts=1"], "--texts=1: must be at least 2"),
        (["--length=13"], "--length=13: must be in 2 .. 12"),
        (["--prompt=8"], "--prompt=8: must be in 1 .. 7"),
        (["--streams", "2", "0"], "--streams=0: must be at least 1"),
        (["--judge=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(folders, capsys, flags, message):
    """Exit code 2, and a line that names what is wrong."""
    assert _run("benchmarks/modes.py", f"--run={folders[0]}", f"--judge={folders[1]}", *FLAGS, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_judge_with_another_tokenizer_is_refused(folders, tmp_path, capsys):
    """Its ids would mean other tokens."""
    other = _export(tmp_path / "judge", 1, SentencePieceTokenizer(train_model(["another text altogether"], 300)))
    assert _run("benchmarks/modes.py", f"--run={folders[0]}", f"--judge={other}", *FLAGS) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --judge={other}: its tokenizer is not that of") and error.count("\n") == 1


def test_the_picture_shows_every_mode(results, tmp_path):
    """There are pixels of the colour of each mode."""
    from matplotlib import colors, image

    out = tmp_path / "modes.png"
    assert _run("pictures/modes.py", str(results), f"--out={out}") == 0
    pixels = image.imread(out)[..., :3]
    from armd_jax.report import style

    for color in (style.BLUE, style.ORANGE, style.VERMILLION):
        assert (np.abs(pixels - np.array(colors.to_rgb(color))).max(axis=-1) < 0.01).sum() > 50


def test_a_picture_of_several_files(results, tmp_path):
    """Modes that were measured one after another make the picture of all; of two measurements, the first counts."""
    whole = json.loads(results.read_text())
    files, outs = [tmp_path / f"{number}.json" for number in range(2)], [tmp_path / name for name in ("a.png", "b.png")]
    first = [case for case in whole["modes"] if case["mode"] == "strided"]
    again = [case | {"generative_perplexity": 1e6} if case["mode"] == "strided" else case for case in whole["modes"]]
    for file, cases in zip(files, (first, again), strict=True):
        file.write_text(json.dumps(whole | {"modes": cases}))
    assert _run("pictures/modes.py", str(results), f"--out={outs[0]}") == 0
    assert _run("pictures/modes.py", *map(str, files), f"--out={outs[1]}") == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_picture_of_something_else_is_an_error(tmp_path, capsys):
    """One line, and no picture."""
    file, out = tmp_path / "other.json", tmp_path / "modes.png"
    file.write_text("{}")
    assert _run("pictures/modes.py", str(file), f"--out={out}") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()

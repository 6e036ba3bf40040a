"""`armd export --format=stablehlo`: the exported programs are the model, and need nothing but JAX."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

import armd_jax as armd
from armd_jax import order
from armd_jax.cli import main as cli
from armd_jax.config import ModelConfig
from armd_jax.data import tokenizers
from armd_jax.data_config import DataConfig
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import readable, stablehlo

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS: list[list[int]] = [[5, 6, 7, 8, 9], [1], [], [40, 3]] * 3
END = 256
SMALL = ModelConfig(vocab_size=257, max_length=40, num_layers=2, two_stream_layers=1, width=16, num_heads=2)
OTHER = dataclasses.replace(
    SMALL, two_stream_layers=2, tie_embeddings=False, attention_chunk=8, loss_chunk=16, norm="rmsnorm", mlp="swiglu"
)


def _model(config: ModelConfig) -> LanguageModel:
    """An untrained model that ends texts now and then: the vector of end-of-text is long."""
    tokenizer = tokenizers.load_or_train(DataConfig(tokenizer="bytes"), iter(()))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, END)
    lm = LanguageModel.create(config, seed=1)
    name, at = ("embedding", (END, slice(None))) if config.tie_embeddings else ("head", (slice(None), END))
    lm = lm.replace(lm.params | {name: lm.params[name].at[at].multiply(2.5)})
    return dataclasses.replace(lm, tokenizer=tokenizer)


def _padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    rows = np.zeros((len(prompts), max(lengths.max(), 1)), np.int32)
    for row, ids in zip(rows, prompts, strict=True):
        row[: len(ids)] = ids
        row[len(ids) :] = 99  # is no part of the prompt
    return rows, lengths


def _drawn(lm: LanguageModel, new: int, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the library draws behind the prompts."""
    made = lm.generate(prompt=PROMPTS, max_new_tokens=new, **how)
    parts = [slice(len(ids), len(ids) + new) for ids in PROMPTS]
    return tuple(
        np.stack([a[part] for a, part in zip(array, parts, strict=True)])
        for array in (made.tokens_BN, made.log_prob_BN)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "streams", "temperatures"), [(SMALL, 1, (1.0, 0.0)), (OTHER, 4, (0.6,))], ids=["one stream", "another"]
)
def test_programs_are_the_model(tmp_path, config, streams, temperatures):
    """Log-probabilities of texts of any length, under any order, to 1e-5; samples of any prompts, token by token."""
    lm = _model(config)
    stablehlo.write(readable.of(lm), streams, 24, tmp_path / "out")
    run = runpy.run_path(str(tmp_path / "out" / "run.py"))
    tokens = np.random.default_rng(0).integers(0, 257, (3, 17)).astype(np.int32)
    expected = lm.log_prob(tokens, order.left_to_right(3, 17))
    np.testing.assert_allclose(run["score"](tokens), expected, atol=1e-5)
    drawn = order.strided(3, 17, 4, np.arange(17) < 2)
    scores = run["score_in_order"](tokens, drawn.positions_BN, drawn.block_BN)
    np.testing.assert_allclose(scores, lm.log_prob(tokens, drawn), atol=1e-5)
    assert np.abs(scores - expected).max() > 0.01
    ends = 0
    for seed, temperature in enumerate(temperatures):
        made, log_probs = run["sample"](seed, *_padded(PROMPTS), temperature)
        wanted, wanted_log_probs = _drawn(lm, 24, streams=streams, seed=seed, temperature=temperature)
        np.testing.assert_array_equal(made, wanted)
        np.testing.assert_allclose(log_probs, wanted_log_probs, atol=1e-5)
        ends += (wanted_log_probs == 0).sum()
    assert (ends > 0) == (streams == 1)  # some texts ended before their last place


_ELSEWHERE = """
import runpy, sys
for name in ("armd_jax", "flax", "optax", "orbax", "safetensors", "tokenizers", "sentencepiece"):
    sys.modules[name] = None  # importing it fails
file, *commands = sys.argv[1:]
for words in commands:
    sys.argv = ["run.py", *words.split()]
    runpy.run_path(file, run_name="__main__")
"""


def _python(*words: str | pathlib.Path, **environment: str) -> str:
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_process_without_the_package(tmp_path, capsys, smoke_run):
    """The command's folder scores and samples as the run does, where the package and what it needs cannot be imported.

    Another process writes the same bytes, and the checksums are those of all files.
    """
    out, again = tmp_path / "out", tmp_path / "again"
    words = [f"--run={smoke_run}", "--format=stablehlo", "--streams=2", "--length=32"]
    assert cli.main(["export", *words, f"--out={out}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out)}
    package = pathlib.Path(armd.__file__).parent.parent
    _python("-m", "armd_jax", "export", *words, f"--out={again}", PYTHONPATH=str(package), PYTHONHASHSEED="1")
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"README.md", "SHA256SUMS", "export.json", "run.py", "sample.jax_export", "weights.npz"} <= found.keys()
    assert {name: (again / name).read_bytes() for name in found} == found
    sums = dict(line.split("  ")[::-1] for line in found.pop("SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}

    lm = armd.load(smoke_run)
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, (1, 64)).astype(np.int32)
    commands = f"score {' '.join(map(str, tokens[0]))}", "sample 3 1 5 6 7", "sample 3 0.5"
    printed = [json.loads(line) for line in _python("-I", "-c", _ELSEWHERE, out / "run.py", *commands).splitlines()]
    np.testing.assert_allclose(printed[0], lm.log_prob(tokens, order.left_to_right(1, 64))[0], atol=1e-5)
    for lines, prompt, temperature in ((printed[1:3], [5, 6, 7], 1.0), (printed[3:], [], 0.5)):
        asked = {"prompt": prompt, "max_new_tokens": 32, "seed": 3, "temperature": temperature}
        made = lm.generate(1, streams=2, **asked)
        assert lines[0] == made.tokens_BN[0, len(prompt) :].tolist() and len(lines) == 2
        np.testing.assert_allclose(lines[1], made.log_prob_BN[0, len(prompt) :], atol=1e-5)


@pytest.mark.slow
def test_what_the_programs_promise(tmp_path):
    """All platforms, no custom call but the check of sizes, open sizes with their limits, no folder of this machine."""
    stablehlo.write(readable.of(_model(SMALL)), 2, 24, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["jax"] == jax.__version__ and (facts["streams"], facts["length"]) == (2, 24)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "6 months newer or 3 weeks older" in page and "P is at most 16" in page and "{" not in page
    for name, limit in (("score", "n <= 40"), ("score_in_order", "n <= 40"), ("sample", "p <= 16")):
        content = (tmp_path / "out" / f"{name}.jax_export").read_bytes()
        exported = jax.export.deserialize(bytearray(content))
        assert exported.platforms == stablehlo.PLATFORMS == ("cpu", "cuda", "tpu")
        assert exported.calling_convention_version == facts["calling_convention_version"]
        assert not exported.disabled_safety_checks
        text = exported.mlir_module()
        assert set(re.findall(r"custom_call @(\w+)", text)) == {"shape_assertion"} and limit in text
        assert b".py" not in content
    run = runpy.run_path(str(tmp_path / "out" / "run.py"))
    with pytest.raises(ValueError) as error:
        run["score"](np.zeros((1, 41), np.int32))
    assert "n <= 40" in f"{error.value} {error.value.__cause__}"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--format=stablehlo", "--out=taken"], "--out=taken: exists already"),
        (["--format=stablehlo", "--out=file/new"], "--out=file/new"),
        (["--format=stablehlo", "--out=new", "--streams=3", "--length=32"], "--length=32 is not divisible by"),
        (["--format=stablehlo", "--out=new", "--streams=0"], "--streams=0"),
        (["--format=stablehlo", "--out=new", "--length=65"], "--length=65: must be in 1 .. 64"),
        (["--format=stablehlo", "--out=new", "--length=0"], "--length=0"),
        (["--format=onnx", "--out=new"], "--format"),
        (["--out=new", "--streams=2"], "--streams=2: belongs to --format=stablehlo"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, smoke_run, words, named):
    """Exit code 2 and one line that says what, before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    assert cli.main(["export", f"--run={smoke_run}", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and named in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


def test_what_cannot_be_exported(monkeypatch):
    """A denoiser, which has no order, and a missing package, are one line."""
    with pytest.raises(armd.UserError, match="denoiser"):
        stablehlo.check(dataclasses.replace(SMALL, kind="denoiser"), 1, None)
    assert [stablehlo.check(SMALL, 4, length) for length in (None, 40)] == [20, 40]
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(armd.UserError, match=r"needs flatbuffers.*\[stablehlo\]"):
        stablehlo.check(SMALL, 1, None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 50_000])
def test_the_folder_is_whole_or_absent(tmp_path, full_disk, size):
    """On a full disk, whichever file no longer fits, nothing is left behind. An existing folder is not written into."""
    lm = _model(SMALL)
    with full_disk(size), pytest.raises(OSError):
        stablehlo.write(readable.of(lm), 1, 40, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(armd.UserError, match="exists already"):
        stablehlo.write(readable.of(lm), 1, 40, tmp_path / "out")

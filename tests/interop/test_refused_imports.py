"""Damaged, foreign and hostile sources: one line, exit code 2, nothing written, and nothing made of a claimed size."""

import json
import pathlib
import pickle
import re
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from armd_jax.cli import main as cli

Change = Callable[[pathlib.Path], None]
EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}


def _config(**changes: Any) -> Change:
    """Changes fields of config.json; None removes one."""

    def change(folder: pathlib.Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def _write(file: pathlib.Path, content: bytes) -> None:
    file.write_bytes(content)


def _text(name: str, content: str | bytes) -> Change:
    """Writes a file."""
    return lambda folder: _write(folder / name, content.encode() if isinstance(content, str) else content)


def _without(*names: str) -> Change:
    """Removes files."""

    def change(folder: pathlib.Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def _tensors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Change:
    """Writes the weights that `change` makes of those there are."""

    def write(folder: pathlib.Path) -> None:
        file = folder / "model.safetensors"
        safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)

    return write


def _weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return _tensors(lambda weights: weights | {name: np.ascontiguousarray(change(weights[name]))})


def _index(weight_map: Any) -> Change:
    """An index in place of the one file, which gets the name of a shard."""

    def write(folder: pathlib.Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def _two_shards_with_one_weight(folder: pathlib.Path) -> None:
    _index({EMBEDDING: "a.safetensors", QUERY: "b.safetensors"})(folder)
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())


def _pickled(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({EMBEDDING: 1}))


def _cut(name: str, size: int) -> Change:
    """Leaves the first bytes of a file."""
    return lambda folder: _write(folder / name, (folder / name).read_bytes()[:size])


def _not_finite(a: np.ndarray) -> np.ndarray:
    return np.where(np.arange(a.size).reshape(a.shape) == 7, np.nan, a).astype(np.float32)


# What is done to a folder that could be imported, and what the line says. The folder is a Llama with its own head.
FOLDERS: dict[str, tuple[Change, str]] = {
    "no config": (_without("config.json"), r"has no config.json"),
    "a config that is no object": (_text("config.json", "[1, 2]"), r"config.json: expected an object"),
    "a config that is cut": (_cut("config.json", 20), r"config.json: cannot be read as JSON"),
    "a config nested too deeply": (_text("config.json", '{"a":' * 100_000), r"cannot be read as JSON: .*deeply"),
    "a config that is not text": (_text("config.json", b"\xff\xfe{}"), r"config.json: cannot be read as JSON"),
    "no type": (_config(model_type=None), r"has no field model_type"),
    "a type that is not known": (_config(model_type="mamba"), r"model_type='mamba' cannot be imported: known are"),
    "a type that is no text": (_config(model_type=["llama"]), r"model_type=\['llama'\].*expected a text"),
    "a mixture of experts": (_config(model_type="mixtral", num_local_experts=8), r"model_type='mixtral'"),
    "experts in a type that is known": (
        _tensors(lambda w: w | {"model.layers.0.mlp.experts.0.up_proj.weight": np.ones((40, 24), np.float32)}),
        r"has a weight 'model.layers.0.mlp.experts.0.up_proj.weight' that a model of its config does not have",
    ),
    "another activation": (_config(hidden_act="gelu"), r"hidden_act='gelu' cannot be imported: expected 'silu'"),
    "a sliding window": (_config(model_type="mistral", sliding_window=16), r"sliding_window=16 cannot be imported"),
    "a window that goes without saying": (_config(model_type="mistral"), r"sliding_window=None cannot be imported"),
    "a window with a switch": (
        _config(model_type="qwen2", sliding_window=16, use_sliding_window=True),
        r"sliding_window=16 cannot be imported",
    ),
    "a window in some layers": (_config(layer_types=["full_attention", "sliding_attention"]), r"layer_types="),
    "layer types that are no list": (_config(layer_types=5), r"layer_types=5 cannot be imported"),
    "yarn": (_config(rope_scaling=YARN), r"rope_scaling: rope_type='yarn' cannot be imported: known are default"),
    "dynamic RoPE": (_config(rope_scaling={"type": "dynamic", "factor": 2.0}), r"type='dynamic' cannot be imported"),
    "RoPE that shrinks": (_config(rope_scaling={"type": "linear", "factor": 0.5}), r"model.rope_factor=0.5"),
    "RoPE that is no object": (_config(rope_scaling=3), r"rope_scaling=3 cannot be imported: expected an object"),
    "partial RoPE": (_config(partial_rotary_factor=0.5), r"partial_rotary_factor=0.5 cannot be imported"),
    "partial RoPE of transformers 5": (
        _config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
        r"rope_parameters: partial_rotary_factor=0.25 cannot be imported",
    ),
    "quantised weights": (_config(quantization_config={"bits": 4}), r"quantization_config="),
    "another epsilon of qk norm": (_config(model_type="qwen3", head_dim=6, rms_norm_eps=1e-5), r"rms_norm_eps=1e-05"),
    "heads that do not divide": (_config(num_attention_heads=5), r"model.num_heads=5 is not divisible"),
    "odd heads": (_config(head_dim=5), r"heads of width 5: it is odd"),
    "NaN in the config": (_config(rms_norm_eps=float("nan")), r"rms_norm_eps=nan cannot be imported"),
    "infinity in the config": (_config(rope_theta=float("inf")), r"rope_theta=inf cannot be imported"),
    "a number beyond all": (_config(rope_theta=10**400), r"rope_theta=10+\.\.\.0+ cannot be imported"),
    "a size that is a fraction": (_config(hidden_size=24.5), r"hidden_size=24.5 cannot be imported"),
    "a size that is a flag": (_config(num_hidden_layers=True), r"num_hidden_layers=True cannot be imported"),
    "no layers": (_config(num_hidden_layers=0), r"num_hidden_layers=0 cannot be imported"),
    "a thousand million columns": (_config(hidden_size=10**9), r"asks for 2 layers of width 1000000000"),
    "a thousand million tokens": (_config(vocab_size=10**9), r"with 1000000000 as the longest other axis"),
    "a thousand million heads": (
        _config(num_attention_heads=10**9, num_key_value_heads=10**9, head_dim=2),
        r"with 2000000000 as the longest other axis",
    ),
    "a thousand million columns of an MLP": (_config(intermediate_size=10**9), r"with 1000000000 as the longest"),
    "a million layers": (_config(num_hidden_layers=10**6), r"asks for 1000000 layers"),
    "a size beyond all": (_config(hidden_size=10**30), r"hidden_size=10+ cannot be imported"),
    "too few layers": (_config(num_hidden_layers=1), r"has a weight 'model.layers.1.\S+' that .* \(9 such weights\)"),
    "too many layers": (_config(num_hidden_layers=3), r"has no weight model.layers.2.input_layernorm.weight"),
    "a first token outside the vocabulary": (_config(bos_token_id=270), r"bos_token_id=270 .* an id of the vocabulary"),
    "a first token that is a flag": (_config(bos_token_id=True), r"bos_token_id=True cannot be imported"),
    "no first token": (_config(bos_token_id=None, eos_token_id=None), r"neither bos_token_id nor eos_token_id"),
    "a pickle": (_pickled, r"pytorch_model.bin is a pickle, which can run code when it is read"),
    "no weights": (_without("model.safetensors"), r"has no model.safetensors and no model.safetensors.index.json"),
    "an index that leads out": (_index({EMBEDDING: "../../etc/passwd"}), r"'../../etc/passwd' is no file of this"),
    "an index that leads away": (_index({EMBEDDING: "/etc/passwd"}), r"'/etc/passwd' is no file of this folder"),
    "an index of a folder": (_index({EMBEDDING: ".."}), r"names '..', which is not there"),
    "an index of a shard that is missing": (_index({EMBEDDING: "b.safetensors"}), r"names 'b.safetensors', which is"),
    "an index of a weight that is missing": (_index({"extra": "a.safetensors"}), r"names 'extra', which no file has"),
    "an index of numbers": (_index({EMBEDDING: 3}), r"has no weight_map from names to files"),
    "an index of nothing": (_index(None), r"has no weight_map from names to files"),
    "one weight in two shards": (_two_shards_with_one_weight, r" is in 'b.safetensors' and in another of its files"),
    "weights that are cut": (_cut("model.safetensors", 5000), r"model.safetensors: cannot be read as safetensors"),
    "weights that are text": (_text("model.safetensors", "weights"), r"cannot be read as safetensors"),
    "weights with a header of 2**62 bytes": (
        _text("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        r"cannot be read as safetensors",
    ),
    "another shape": (
        _weight(QUERY, lambda a: a[:-1]),
        rf"{QUERY} has the shape \(23, 24\), its config says \(24, 24\)",
    ),
    "a weight that is missing": (
        _tensors(lambda w: {k: v for k, v in w.items() if k != QUERY}),
        rf"has no weight {QUERY}",
    ),
    "a weight too many": (
        _tensors(lambda w: w | {"../x": w[QUERY]}),
        r"has a weight '../x' that .* \(1 such weights\)",
    ),
    "whole numbers": (_weight(QUERY, lambda a: a.astype(np.int8)), rf"{QUERY} is I8; expected one of F32, F16, BF16"),
    "double precision": (_weight(QUERY, lambda a: a.astype(np.float64)), rf"{QUERY} is F64; expected one of"),
    "a weight that is not a number": (_weight(QUERY, _not_finite), rf"{QUERY} has numbers that are not finite"),
    "a head that is not the embedding": (_config(tie_word_embeddings=True), r"lm_head.weight is not the embedding"),
    "a head that is missing": (_tensors(lambda w: {k: v for k, v in w.items() if "lm" not in k}), r"no weight lm_head"),
    "no tokenizer": (_without("tokenizer.json"), r"source holds no tokenizer; looked for tokenizer.json"),
    "a tokenizer that is cut": (_cut("tokenizer.json", 500), r"source/tokenizer.json: cannot be read as JSON"),
    "a tokenizer with more tokens": (
        _config(vocab_size=200, bos_token_id=0, eos_token_id=0),
        r"its tokenizer has 270 tokens, its config says vocab_size=200",
    ),
}
# Command lines about a folder that could be imported.
ARGUMENTS: dict[str, tuple[str, str]] = {
    "more than all layers": ("--from=source --out=out --two-stream=3", r"--two-stream=3: must be in 0 .. 2"),
    "fewer than none": ("--from=source --out=out --two-stream=-1", r"--two-stream=-1: must be in 0 .. 2"),
    "longer rows": ("--from=source --out=out --max-length=41", r"--max-length=41: must be in 1 .. 40, the source's"),
    "no rows": ("--from=source --out=out --max-length=0", r"--max-length=0: must be in 1 .. 40"),
    "a place that is taken": ("--from=source --out=taken", r"--out=taken: exists already"),
    "a place below a file": ("--from=source --out=file/out", r"--out=file/out: cannot be written"),
    "another aggregator": ("--from=source --out=out --aggregator=mean", r"--aggregator: invalid choice"),
    "no source": ("--from=missing --out=out", r"--from=missing: there is no such file or folder"),
    "a file of something else": ("--from=file --out=out", r"file: is not a GGUF file"),
    "no place": ("--from=source", r"required: --out"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, pretrained: Any) -> pathlib.Path:
    """The current folder, with a folder `source` that can be imported, a file and a folder that is taken."""
    monkeypatch.chdir(tmp_path)
    pretrained.write(tmp_path / "source", pretrained.configs["llama without groups, untied"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("file")
    return tmp_path


def _refused(place: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    """The line of the error. Nothing is written, and the command is quick and takes little memory."""
    before, began = sorted(place.rglob("*")), time.monotonic()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cli.main(["import", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and len(err) < 1000, err
    assert sorted(place.rglob("*")) == before
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 300_000  # kB
    return err


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_imported_is_one_line(place, capsys, case):
    change, reason = FOLDERS[case]
    change(place / "source")
    line = _refused(place, capsys, "--from=source --out=out")
    assert re.search(reason, line), line
    assert "source" in line


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_that_cannot_be_met_is_one_line(place, capsys, case):
    arguments, reason = ARGUMENTS[case]
    line = _refused(place, capsys, arguments)
    assert re.search(reason, line), line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_function": "gelu"}, r"activation_function='gelu' cannot be imported"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True cannot be imported"),
        ({"n_positions": 41}, r"transformer.wpe.weight has the shape \(40, 24\), its config says \(41, 24\)"),
        ({"n_positions": 10**9}, r"with 1000000000 as the longest other axis"),
        ({"n_embd": 10**9}, r"asks for 2 layers of width 1000000000"),
        ({"n_head": 5}, r"model.width=24 is not divisible by model.num_heads=5"),
        ({"n_layer": None}, r"has no field n_layer"),
    ],
)
def test_a_gpt2_that_cannot_be_imported_is_one_line(place, capsys, pretrained, changes, reason):
    pretrained.write(place / "gpt2", pretrained.configs["gpt2"])
    _config(**changes)(place / "gpt2")
    assert re.search(reason, _refused(place, capsys, "--from=gpt2 --out=out"))


def test_the_folder_itself_can_be_imported(place):
    """What is refused above is refused for what was changed."""
    assert cli.main(["import", "--from=source", "--out=out"]) == 0
    assert (place / "out" / "model.safetensors").is_file()

"""Models that cannot be exported for transformers, and exported folders that were damaged: one line each."""

import dataclasses
import errno
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import armd_jax as armd
from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import readable
from armd_jax.interop.huggingface import exporting
from armd_jax.interop.huggingface.card import Facts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _json(file: pathlib.Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_armd) -> pathlib.Path:
    """The export of the default model; tests only read it."""
    out = tmp_path_factory.mktemp("export") / "model"
    exporting.write(readable.of(small_armd.model("default")), out, Facts())
    return out


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_one_line(tmp_path, small_armd, capsys):
    """A denoiser, a shard of no size, and flags of another format, before anything is loaded or written."""
    lm = small_armd.model("default")
    readable.write(readable.of(lm), configs.Config(model=lm.config), tmp_path / "run")
    denoiser = LanguageModel.create(dataclasses.replace(lm.config, kind="denoiser"))
    denoiser = dataclasses.replace(denoiser, tokenizer=lm.tokenizer)
    order_section = configs.OrderConfig(kind="left_to_right")
    readable.write(readable.of(denoiser), configs.Config(model=denoiser.config, order=order_section), tmp_path / "mask")
    before = sorted(tmp_path.iterdir())
    for run, flags, message in [
        ("mask", ["--format=huggingface"], "a denoiser"),
        ("run", ["--format=huggingface", "--shard-size=0"], "--shard-size=0: must be above 0"),
        ("run", ["--format=huggingface", "--shard-size=nan"], "--shard-size=nan: must be above 0"),
        ("run", ["--dtype=bfloat16"], "--dtype=bfloat16: belongs to --format=huggingface"),
        ("run", ["--format=huggingface", "--streams=2"], "--streams=2: belongs to --format=stablehlo"),
        ("run", ["--format=huggingface", "--code=native"], "--code=native: not a network of transformers' own"),
        ("run", ["--format=pickle"], "--format"),
    ]:
        assert cli.main(["export", f"--run={tmp_path / run}", f"--out={tmp_path / 'out'}", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.strip().splitlines()[-1].startswith(("error: ", "armd export: error: "))
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_is_whole_or_absent(tmp_path, small_armd, full_disk):
    """A full disk leaves nothing behind, in one file or in shards, and an existing folder is not written into."""
    lm = small_armd.model("default")
    for shard_gb in (5, 2e-5):
        with full_disk(10_000), pytest.raises(OSError) as error:
            exporting.write(readable.of(lm), tmp_path / "out", Facts(), shard_gb=shard_gb)
        assert error.value.errno == errno.EFBIG and not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        exporting.write(readable.of(lm), tmp_path / "out", Facts())
    with pytest.raises(UserError, match="no tokenizer"):
        exporting.write(readable.of(dataclasses.replace(lm, tokenizer=None)), tmp_path / "other", Facts())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _edit(name: str, **changes: Any) -> Any:
    def damage(folder: pathlib.Path) -> None:
        values = _json(folder / name)
        for key, value in changes.items():
            values.pop(key) if value is None else values.update({key: value})
        (folder / name).write_text(json.dumps(values))

    return damage


def _weights(change: Any) -> Any:
    def damage(folder: pathlib.Path) -> None:
        held = safetensors.numpy.load_file(folder / "model.safetensors")
        change(held)
        safetensors.numpy.save_file(held, folder / "model.safetensors")

    return damage


def _cut(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def _index(value: Any) -> Any:
    def damage(folder: pathlib.Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))

    return damage


_NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "cut config": (_cut("config.json"), "cannot be read as JSON"),
    "another model": (_edit("config.json", model_type="bert"), "armd import"),
    "no aggregator": (_edit("config.json", aggregator=None), "no field aggregator"),
    "unknown aggregator": (_edit("config.json", aggregator="sum"), "aggregator"),
    "text as a number": (_edit("config.json", hidden_size="32"), "width"),
    "a flag as a number": (_edit("config.json", qk_norm=1), "qk_norm"),
    "too many two-stream layers": (_edit("config.json", two_stream_layers=99), "two_stream_layers=99"),
    "more layers than weights": (_edit("config.json", num_hidden_layers=10**9), "layers"),
    "other width": (_edit("config.json", hidden_size=16), "shape"),
    "unknown RoPE": (_edit("config.json", rope_parameters={"rope_type": "yarn"}), "rope_type"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "cut weights": (_cut("model.safetensors"), "cannot be read as safetensors"),
    "missing weight": (_weights(lambda held: held.pop(_NAME)), f"no weight {_NAME}"),
    "one weight too many": (_weights(lambda held: held.update(extra=np.zeros(2, np.float32))), "extra"),
    "not finite": (_weights(lambda held: held[_NAME].fill(np.nan)), "not finite"),
    "whole numbers": (_weights(lambda held: held.update({_NAME: held[_NAME].astype(np.int32)})), "expected one of"),
    "missing shard": (_index({"weight_map": {"a": "b.safetensors"}}), "not there"),
    "shard elsewhere": (_index({"weight_map": {"a": "../b.safetensors"}}), "no file of this folder"),
    "index without a map": (_index([]), "no weight_map"),
    "cut tokenizer": (_cut("tokenizer/tokenizer_config.json"), "tokenizer"),
    "larger tokenizer": (_edit("config.json", vocab_size=200), "vocab_size=200"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_one_line(tmp_path, folder, name):
    """A folder that was changed is refused with one line that says where, and nothing in it is executed."""
    damage, message = DAMAGES[name]
    shutil.copytree(folder, tmp_path / "model")
    for code in (tmp_path / "model").rglob("*.py"):
        code.write_text("raise SystemExit('executed')")
    damage(tmp_path / "model")
    with pytest.raises(UserError) as error:
        armd.load(tmp_path / "model")
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1, str(error.value)

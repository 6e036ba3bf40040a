"""Models read weight by weight: the bytes of the library's files, the bits of `armd.load`, and little memory."""

import dataclasses
import errno
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import armd_jax as armd
from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.config import Config, ModelConfig
from armd_jax.data import tokenizers
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import load, readable, safetensors_format
from armd_jax.training import checkpoints, stored_params
from armd_jax.training import state as states

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_files_are_those_of_the_library(tmp_path, monkeypatch, dtype):
    """To the last byte, in whatever sequence tensors come, however they lie in memory, and however small the blocks."""
    rng, kind = np.random.default_rng(0), np.dtype(jnp.dtype(dtype))
    shapes = {"b": (7, 3), "a.10": (5,), "a.9": (2, 3, 4), "é": (1, 1)}
    values = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    values["b"] = values["b"].T.copy().T
    metadata = {"format": "pt"}
    safetensors.numpy.save_file({n: np.ascontiguousarray(v) for n, v in values.items()}, tmp_path / "theirs", metadata)
    for number, block in enumerate((1 << 24, 10)):
        monkeypatch.setattr(readable, "_BLOCK", block)
        ours = readable.SafetensorsFile(tmp_path / f"{number}", shapes, kind, metadata)
        readable.put_all(
            [readable.Job(ours, name, lambda v=values[name]: v) for name in list(shapes)[:: 1 - 2 * number]]
        )
        assert (tmp_path / f"{number}").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_wrong_shape_or_a_missing_tensor_is_no_file(tmp_path):
    """The one would lie on its neighbour, the other would be zeros."""
    ours = readable.SafetensorsFile(tmp_path / "file", {"a": (2, 3), "b": (2,)}, np.dtype(np.float32), {})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match="a has the shape"):
        ours.put("a", np.ones((3, 3), np.float32))
    assert (tmp_path / "file").read_bytes() == before
    ours.put("a", np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="b was not written"):
        ours.finish()
    ours.put("b", np.ones(2, np.float32))
    ours.finish()


@pytest.fixture
def small() -> readable.Readable:
    """A model of bytes."""
    model = ModelConfig(vocab_size=257, max_length=32, num_layers=2, two_stream_layers=1, width=8, num_heads=2)
    lm = LanguageModel.create(dataclasses.replace(model, positional_width=4))
    return readable.of(dataclasses.replace(lm, tokenizer=tokenizers.BytesTokenizer()))


def test_a_disk_that_fills_up_between_weights(tmp_path, monkeypatch, small):
    """The header fits, as it does for a file with holes, and a weight does not: nothing is left."""
    real = readable.SafetensorsFile.put

    def put(file: readable.SafetensorsFile, name: str, value: np.ndarray) -> None:
        if name == "final_norm.scale":
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(value.tobytes())
        real(file, name, value)

    monkeypatch.setattr(readable.SafetensorsFile, "put", put)
    with pytest.raises(OSError) as error:
        readable.write(small, Config(model=small.config), tmp_path / "out")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "out" / "model.safetensors"))
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_replaced_while_it_is_read(tmp_path, small):
    """All weights are of the file that was opened."""
    readable.write(small, Config(model=small.config), tmp_path / "one")
    other = dataclasses.replace(small, read=lambda name: small.read(name) + 1)
    readable.write(other, Config(model=small.config), tmp_path / "two")
    with load.open_model(tmp_path / "one") as (model, step):
        os.replace(tmp_path / "two" / "model.safetensors", tmp_path / "one" / "model.safetensors")
        for name in safetensors_format.shapes(small.config):
            np.testing.assert_array_equal(model.read(name), small.read(name))
    assert step is None


@pytest.mark.slow
def test_damage_behind_the_first_weights_is_one_line(tmp_path, monkeypatch, capsys, smoke_run):
    """What is found while an export is written ends it: exit code 2, no traceback, no folder."""
    real = stored_params.StoredArray.__getitem__

    def read(array: stored_params.StoredArray, index: object) -> np.ndarray:
        if "mlp_out" in array._path:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "40", ignore_errors=True)
        return real(array, index)

    shutil.copytree(smoke_run, tmp_path / "run")
    monkeypatch.setattr(stored_params.StoredArray, "__getitem__", read)
    for words in ([], ["--format=huggingface"]):
        assert cli.main(["export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", *words]) in (2,)
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("error: ") and "checkpoints/" in err and "Traceback" not in err
        assert [file.name for file in tmp_path.iterdir()] == ["run"]
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(smoke_run, tmp_path / "run")


@pytest.mark.slow
def test_a_run_is_read_as_it_is_loaded(smoke_run):
    """Every weight of a run, with its average and without, is that of `armd.load` to the last bit."""
    for ema in (True, False):
        lm = armd.load(smoke_run, ema)
        flat = safetensors_format.flatten(lm.params, lm.config)
        with load.open_model(smoke_run, ema) as (model, step):
            assert (model.config, step, model.tokenizer.hash) == (lm.config, 40, lm.tokenizer.hash)
            for name, value in flat.items():
                np.testing.assert_array_equal(model.read(name), value)
            for a, b in zip(jax.tree.leaves(model.load().params), jax.tree.leaves(lm.params), strict=True):
                np.testing.assert_array_equal(a, b)


def _begin(run: pathlib.Path, config: Config) -> None:
    """A run without a checkpoint."""
    run.mkdir()
    (run / "config.json").write_text(configs.to_json(config))
    tokenizers.load_or_train(configs.DataConfig(tokenizer="bytes"), iter(())).save(run / "tokenizer")


@pytest.mark.slow
def test_checkpoints_of_any_mesh(tmp_path):
    """What eight devices saved, each its part, is exported by one device as what it was."""
    model = ModelConfig(vocab_size=257, max_length=32, num_layers=3, two_stream_layers=2, width=16, num_heads=2)
    _begin(tmp_path / "run", Config(model=dataclasses.replace(model, positional_width=4)))
    program = pathlib.Path(__file__).with_name("mesh_checkpoint.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    words = [sys.executable, str(program), str(tmp_path / "run"), str(tmp_path / "saved.npz")]
    subprocess.run(words, check=True, env=environment)
    assert cli.main(["export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 0
    saved, found = np.load(tmp_path / "saved.npz"), safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == found.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, saved[name])


def test_a_model_without_a_tokenizer_is_refused():
    """It could be written, and never read."""
    lm = LanguageModel.create(
        ModelConfig(vocab_size=9, max_length=8, num_layers=1, two_stream_layers=1, width=8, num_heads=1)
    )
    with pytest.raises(UserError, match="no tokenizer"):
        readable.of(lm)


# --- memory -----------------------------------------------------------------------------------------------------------

# What a process inherits of its parent counts in `ru_maxrss`, and not here.
_PEAK = """
import pathlib, sys
from armd_jax.cli.main import main
assert main(sys.argv[1:]) == 0
(line,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(line.split()[1])
"""


def _peak(*words: str) -> int:
    """Bytes of host memory that a command needed at most.

    glibc gives large blocks back as soon as they are free. Else it keeps some, more or fewer from run to run.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", _PEAK, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.splitlines()[-1]) * 1024


def _save_zeros(run: pathlib.Path, model: ModelConfig) -> None:
    """A run whose numbers are all 0, which are small on a disk."""
    config = Config(model=model, optimizer=configs.OptimizerConfig(ema_decay=0.0))
    _begin(run, config)
    target = states.abstract(config, checkpoints.one_device())
    with checkpoints.Checkpointer(run, config) as checkpointer:
        checkpointer.save(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), target), 1, force=True)


@pytest.mark.slow
def test_memory_is_that_of_the_largest_array(tmp_path):
    """Exports of a run, and an import of one of them, need far less than the weights have: no copy of the model.

    The largest array is an eighth of them, and to read it takes twice as much.
    """
    model = ModelConfig(vocab_size=257, max_length=32, num_layers=24, two_stream_layers=12, width=512, num_heads=8)
    model = dataclasses.replace(model, mlp="swiglu", mlp_width=2048)
    _save_zeros(tmp_path / "large", model)
    _save_zeros(tmp_path / "small", dataclasses.replace(model, num_layers=2, two_stream_layers=1, width=16))
    all_bytes = sum(leaf.size * 4 for leaf in safetensors_format.shapes(model).values())
    for verb, where, flags in (
        ("export", "--run", []),
        ("export", "--run", ["--format=huggingface"]),
        ("import", "--from", []),
    ):
        source = {"export": "{}", "import": "{}-out1export"}[verb]
        peaks = []
        for name in ("small", "large"):
            out = tmp_path / f"{name}-out{len(flags)}{verb}"
            peaks.append(_peak(verb, f"{where}={tmp_path / source.format(name)}", f"--out={out}", *flags))
        assert peaks[1] - peaks[0] < 0.3 * all_bytes, (verb, flags, peaks)

"""`armd.load`: a run and its export are the same model, and what is no model is refused."""

import dataclasses
import errno
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import armd_jax as armd
from armd_jax import config as configs
from armd_jax import order
from armd_jax.config import Config, ModelConfig
from armd_jax.core import parameters
from armd_jax.data import tokenizers
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import load, readable
from armd_jax.training import checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, smoke_run: pathlib.Path) -> pathlib.Path:
    """The export of the smoke run; tests only read it."""
    out = tmp_path_factory.mktemp("export") / "model"
    readable.write(readable.of(armd.load(smoke_run)), configs.read(smoke_run), out)
    return out


def _assert_same_params(one: parameters.Params, other: parameters.Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_run_and_export_are_the_same_model(smoke_run, export):
    """Parameters, logits, samples and tokenizer of a run and of its export are equal to the last bit."""
    run, copy = armd.load(smoke_run), armd.load(str(export))
    assert run.config == copy.config and run.tokenizer.hash == copy.tokenizer.hash
    _assert_same_params(run.params, copy.params)
    tokens = np.random.default_rng(0).integers(0, run.config.vocab_size, (2, 64)).astype(np.int32)
    drawn = order.strided(2, 64, 4)
    np.testing.assert_array_equal(run.logits(tokens, drawn), copy.logits(tokens, drawn))
    one, other = (lm.generate(2, 16, streams=2, prompt=[5, 6], seed=3) for lm in (run, copy))
    np.testing.assert_array_equal(one.tokens_BN, other.tokens_BN)
    np.testing.assert_array_equal(one.log_prob_BN, other.log_prob_BN)


@pytest.mark.slow
def test_average_or_raw_weights(smoke_run):
    """`load` takes the averaged weights of the newest checkpoint, with ema=False the raw ones."""
    config = configs.read(smoke_run)
    state = checkpoints.restore_for_inference(smoke_run, config)
    assert int(state.step) == 40
    real = slice(config.model.vocab_size)
    for lm, params in ((armd.load(smoke_run), state.ema), (armd.load(smoke_run, ema=False), state.params)):
        np.testing.assert_array_equal(lm.params["embedding"][real], params["embedding"][real])
        assert not np.asarray(lm.params["embedding"])[config.model.vocab_size :].any()
        _assert_same_params(lm.params["causal"], params["causal"])
    assert not np.array_equal(state.ema["embedding"], state.params["embedding"])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("two_stream_layers", [0, 1, 3])
def test_export_of_every_shape_of_model(tmp_path, two_stream_layers, tied):
    """With no, one or only two-stream layers, head tied or not, `load` gives back what was exported, bit for bit."""
    tokenizer = tokenizers.load_or_train(DataConfig(tokenizer="bytes"), iter(()))
    model = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=32, num_layers=3, width=8, num_heads=2)
    model = dataclasses.replace(
        model, two_stream_layers=two_stream_layers, tie_embeddings=tied, mlp="swiglu", positional_width=4
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32),
        jax.eval_shape(lambda: parameters.init(jax.random.key(0), model)),
    )
    config = Config(model=model)
    lm = LanguageModel(model, load.without_padding(params, config), tokenizer)
    readable.write(readable.of(lm), config, tmp_path / "out")
    again = armd.load(tmp_path / "out")
    assert again.config == model
    _assert_same_params(again.params, lm.params)
    flat = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert flat["embedding"].shape == (tokenizer.vocab_size, 8) and ("head" in flat) != tied
    assert {name.split(".")[1] for name in flat if name.startswith("layers.")} == {"0", "1", "2"}


def test_old_exports_keep_their_meaning(tmp_path):
    """A config.json from before embeddings were scaled means embeddings that are not: old weights are not misread."""
    tokenizer = tokenizers.load_or_train(DataConfig(tokenizer="bytes"), iter(()))
    model = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=32, num_layers=2, two_stream_layers=1, width=8)
    model = dataclasses.replace(model, num_heads=2, aggregator="positional", positional_width=4)
    new = dataclasses.replace(LanguageModel.create(model), tokenizer=tokenizer)
    readable.write(readable.of(new), Config(model=model), tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    values = json.loads(file.read_text())
    for newer in ("embedding_scale", "neighbours", "positional_gain", "qk_norm", "logit_cap", "residual_init", "kind"):
        del values["model"][newer]
    file.write_text(json.dumps(values))
    before = armd.load(tmp_path / "old")
    assert before.config == dataclasses.replace(model, embedding_scale="one", residual_init="depth_scaled")
    tokens, drawn = np.arange(16, dtype=np.int32)[None], order.left_to_right(1, 16)
    expected = dataclasses.replace(new, config=before.config).log_prob(tokens, drawn)
    np.testing.assert_array_equal(before.log_prob(tokens, drawn), expected)
    assert np.abs(before.log_prob(tokens, drawn) - new.log_prob(tokens, drawn)).max() > 0.1


def _cut_weights(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _drop_tensor(folder: pathlib.Path) -> None:
    flat = safetensors.numpy.load_file(folder / "model.safetensors")
    del flat["start"]
    safetensors.numpy.save_file(flat, folder / "model.safetensors")


def _other_width(folder: pathlib.Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["model"]["width"] *= 2
    (folder / "config.json").write_text(json.dumps(values))


def _other_field(folder: pathlib.Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["model"]["widht"] = 3
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no checkpoints"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (_cut_weights, "cannot be read"),
        (_drop_tensor, "start"),
        (_other_width, "does not fit"),
        (_other_field, "widht"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
    ],
    ids=["no weights", "no config", "cut config", "no tokenizer", "nothing", "cut weights"]
    + ["missing tensor", "other width", "unknown field", "binary config"],
)
def test_damaged_exports_are_user_errors(tmp_path, export, damage, names):
    """A missing, cut or contradicting file of an export is a UserError that says which."""
    folder = tmp_path / "model"
    shutil.copytree(export, folder)
    damage(folder)
    with pytest.raises(UserError, match=names):
        armd.load(folder)


def test_export_is_whole_or_absent(tmp_path, monkeypatch, export, full_disk):
    """An existing folder is never written into, and an export that fails leaves nothing behind."""
    lm, config = armd.load(export), configs.read(export)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        readable.write(readable.of(lm), config, tmp_path / "taken")

    def fails(*_):
        raise OSError("disk full")

    with full_disk(1000), pytest.raises(OSError) as error:
        readable.write(readable.of(lm), config, tmp_path / "out")
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "out" / "model.safetensors"))
    monkeypatch.setattr(type(lm.tokenizer), "save", fails)
    with pytest.raises(OSError, match="disk full"):
        readable.write(readable.of(lm), config, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]
    with pytest.raises(UserError, match="no tokenizer"):
        readable.write(readable.of(dataclasses.replace(lm, tokenizer=None)), config, tmp_path / "out")

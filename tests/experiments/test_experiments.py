"""Every experiment file is a config that can be trained."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from armd_jax import config as configs
from armd_jax import experiment_file
from armd_jax.errors import UserError
from armd_jax.training import placement, sharding, state, step

FILES = sorted((pathlib.Path(__file__).resolve().parents[2] / "experiments").glob("*.py"))
CASES = [(file, arg) for file in FILES for arg in ("", "smoke")]
CASES += [(file, "cpu") for file in FILES if file.stem == "wikitext2"]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "arg"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_one_training_step_can_be_traced(file, arg):
    """The config validates, and one whole update of it has consistent shapes; nothing is allocated."""
    config = configs.from_config_dict(experiment_file.load_config_file(f"{file}:{arg}" if arg else str(file)))
    # On one device: an experiment's own mesh wants the devices that its docstring names.
    model = dataclasses.replace(config.model, vocab_size=50257)
    config = dataclasses.replace(config, model=model, mesh=configs.MeshConfig())
    mesh = sharding.make_mesh(config.mesh)
    tokens = jax.ShapeDtypeStruct((config.training.batch_size, config.model.max_length), jnp.int32)
    before = jax.eval_shape(lambda key: state.init(config, key), jax.random.key(0))
    after, metrics = jax.eval_shape(step.make_train_step(placement.for_training(config, mesh)), before, tokens)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, before, after))
    assert metrics["train/loss"].shape == ()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docstring_is_documentation(file):
    """The docstring gives the command and the hardware, and an unknown argument is refused."""
    text = file.read_text()
    assert "Command:" in text and "Hardware:" in text and f"experiments/{file.name}" in text
    with pytest.raises(UserError, match="smokee"):
        experiment_file.load_config_file(f"{file}:smokee")

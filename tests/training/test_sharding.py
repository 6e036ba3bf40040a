"""Training on a mesh of devices is training on one."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from armd_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig, UserError
from armd_jax.training import sharding

CASES = pathlib.Path(__file__).with_name("sharding_cases.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    """What `sharding_cases.py` found on 8 virtual devices."""
    out = tmp_path_factory.mktemp("sharding") / "results.npz"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, str(CASES), str(out)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(out))


@pytest.mark.parametrize(("mesh", "share"), [("data", 1), ("fsdp", 1 / 8), ("mixed", 1 / 4), ("tensor", 1 / 8)])
def test_meshes_train_like_one_device(results, mesh, share):
    """First gradients agree to 1e-5 of each leaf's norm and 20 losses to 1e-4, with weights cut as the mesh says."""
    assert results[f"{mesh}/parts"] == 8 and results[f"{mesh}/share"] == share
    names = [name.removeprefix("one/") for name in results if name.startswith("one/gradient")]
    assert len(names) > 10
    for name in names:
        one, other = results[f"one/{name}"], results[f"{mesh}/{name}"]
        assert np.linalg.norm(one) > 0, name
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one), name
    np.testing.assert_allclose(results[f"{mesh}/losses"], results["one/losses"], rtol=1e-4)
    assert len(results["one/losses"]) == 20 and results["one/losses"][-1] < results["one/losses"][0] - 0.3


def test_a_run_moves_between_meshes(results):
    """Saved on 8 devices, continued on 4, then on 1: the losses are those of one device all along."""
    np.testing.assert_allclose(results["moved/losses"], results["one/losses"], rtol=1e-4)


def test_meshes_that_do_not_fit_are_user_errors():
    """Axes that do not multiply to the devices, and batches that do not divide over them, are named."""
    with pytest.raises(UserError, match="devices"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=5, tensor=1))
    with pytest.raises(UserError, match="devices"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=7, tensor=1))

    class Mesh:
        shape = {"data": 2, "fsdp": 2, "tensor": 2}

    fits = Config(model=ModelConfig(vocab_size=100), training=TrainingConfig(batch_size=8))
    sharding.check_divisible(fits, Mesh)
    for model, training, name in (
        (fits.model, TrainingConfig(batch_size=6), "batch_size"),
        (ModelConfig(vocab_size=100, width=9, num_heads=3), fits.training, "width"),
        (ModelConfig(vocab_size=100, width=6, num_heads=3), fits.training, "num_heads"),
    ):
        with pytest.raises(UserError, match=name):
            sharding.check_divisible(Config(model=model, training=training), Mesh)

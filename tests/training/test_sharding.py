"""Training on a mesh of devices is training on one."""

import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from armd_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.order_config import OrderConfig
from armd_jax.training import divisibility, placement, sharding

pytestmark = pytest.mark.slow

CASES = pathlib.Path(__file__).with_name("sharding_cases.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    """What `sharding_cases.py` found on 8 virtual devices."""
    out = tmp_path_factory.mktemp("sharding") / "results.npz"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, str(CASES), str(out)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(out))


@pytest.mark.parametrize(
    ("mesh", "share"), [("data", 1), ("fsdp", 1 / 8), ("mixed", 1 / 4), ("tensor", 1 / 8), ("flash", 1 / 4)]
)
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


def test_no_work_is_done_twice(results):
    """Every device does an eighth of the floating-point operations, those of the aggregator included."""
    for name in ("data", "fsdp", "mixed", "tensor"):
        assert results[f"{name}/flops"] < 1.1 * results["one/flops"] / 8, name


def test_rows_need_not_be_divisible_by_the_tensor_axis(results):
    """The aggregator's vectors of 15 targets are cut into 4 parts."""
    np.testing.assert_allclose(results["uneven/tensor"], results["uneven/one"], rtol=1e-5)
    assert len(results["uneven/one"]) == 2


def test_a_denoiser_trains_on_a_mesh_like_on_one_device(results):
    """Its masks are drawn for the whole batch, so that 20 losses agree to 1e-4."""
    one, mixed = results["denoiser/one"], results["denoiser/mixed"]
    np.testing.assert_allclose(mixed, one, rtol=1e-4)
    assert len(one) == 20 and len(set(one.round(3).tolist())) > 15


def test_the_rows_of_a_process_make_its_batch(results):
    """Rows read by their place in the global batch lie there, on every mesh."""
    for name in ("one", "data", "fsdp", "mixed", "tensor"):
        assert results[f"{name}/batch"].all() and results[f"{name}/batch"].shape == (8, 16), name


def test_the_flash_mesh_runs_kernels(results):
    """Forward, and the gradients of queries and of keys and values, of the two-stream layer and of the causal one."""
    assert results["flash/kernels"] == 2 * 3


def _mesh_of(platform: str, **facts: str) -> types.SimpleNamespace:
    """As much of a mesh of one such device as decides on the kernel."""
    device = types.SimpleNamespace(platform=platform, **facts)
    return types.SimpleNamespace(devices=np.array([device]), size=1)


def test_the_device_decides_on_flash_attention():
    """`auto` is flash on GPUs that Triton compiles for, by size on others; asked for elsewhere it is one line."""
    gpu = {
        capability: _mesh_of("gpu", compute_capability=capability) for capability in ("7.5", "8.0", "12.0", "gfx90a")
    }
    chosen = {name: placement.for_training(Config(), mesh).config.model.attention for name, mesh in gpu.items()}
    assert chosen == {"7.5": "auto", "8.0": "flash", "12.0": "flash", "gfx90a": "auto"}
    assert placement.for_training(Config(), _mesh_of("cpu")).config.model.attention == "auto"
    apart = Config(data=DataConfig(reset="document"))  # what begins within a row is for no kernel
    for mesh in (gpu["8.0"], _mesh_of("tpu")):
        placed = placement.for_training(apart, mesh)
        assert placed.config.model.attention == "auto" and placed.context.attend is None
    flash = Config(model=ModelConfig(attention="flash"), order=OrderConfig(kind="masked_diffusion"))
    assert callable(placement.for_training(flash, gpu["8.0"]).context.attend)
    with pytest.raises(
        UserError, match="'flash' needs an NVIDIA GPU of compute capability 8.0 or newer, not this Tesla"
    ):
        placement.for_training(flash, _mesh_of("gpu", compute_capability="7.5", device_kind="Tesla T4"))
    with pytest.raises(UserError, match="'flash' runs on GPU, not on tpu: use auto or chunked"):
        placement.for_training(flash, _mesh_of("tpu"))
    splash = Config(model=ModelConfig(attention="splash"))
    with pytest.raises(UserError, match="'splash' runs on TPU, not on gpu: use auto or chunked"):
        placement.for_training(splash, gpu["8.0"])


def test_evaluation_has_the_kernel_that_its_orders_allow():
    """Text is scored left to right, whose mask is known, unless drawn blocks bound the likelihood."""
    tpu = _mesh_of("tpu")
    for order, training, evaluation in (
        (OrderConfig(), True, True),
        (OrderConfig(kind="contiguous"), False, True),
        (OrderConfig(mix=("contiguous:0.1",)), False, True),
        (OrderConfig(kind="masked_diffusion"), False, False),
    ):
        config = Config(order=order)
        assert (placement.for_training(config, tpu).context.attend is not None) == training
        assert (placement.for_evaluation(config, tpu).context.attend is not None) == evaluation


def test_a_run_moves_between_meshes(results):
    """Saved on 8 devices, continued on 4, then on 1: the losses are those of one device all along."""
    np.testing.assert_allclose(results["moved/losses"], results["one/losses"], rtol=1e-4)


def test_a_run_with_muon_moves_between_meshes(results):
    """The same with Muon, whose updates need whole matrices however they are cut over the devices."""
    np.testing.assert_allclose(results["muon moved/losses"], results["muon/losses"], rtol=1e-3)
    assert results["muon/losses"][-1] < results["muon/losses"][0] - 0.3


def test_meshes_that_do_not_fit_are_user_errors():
    """Axes that do not multiply to the devices, and batches that do not divide over them, are named."""
    with pytest.raises(UserError, match="devices"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=5, tensor=1))
    with pytest.raises(UserError, match="devices"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=7, tensor=1))

    class Mesh:
        shape = {"data": 2, "fsdp": 2, "tensor": 2}

    fits = Config(model=ModelConfig(vocab_size=100), training=TrainingConfig(batch_size=8))
    divisibility.check(fits, Mesh)
    for model, training, name in (
        (fits.model, TrainingConfig(batch_size=6), "batch_size"),
        (ModelConfig(vocab_size=100, width=9, num_heads=3), fits.training, "width"),
        (ModelConfig(vocab_size=100, width=6, num_heads=3), fits.training, "num_heads"),
    ):
        with pytest.raises(UserError, match=name):
            divisibility.check(Config(model=model, training=training), Mesh)

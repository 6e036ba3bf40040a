"""What must not grow: the memory of a training step with the length, and its program with the depth."""

import jax
import pytest

from armd_jax import config as configs
from armd_jax.compilation import compile as compilation
from armd_jax.compilation import topology
from armd_jax.compilation.hlo import Program
from armd_jax.training import sharding

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def environment():
    """libtpu looks for no TPU."""
    topology.prepare_environment()


def _compiled(**model) -> jax.stages.Compiled:
    """The training step of one row on one chip."""
    values = configs.default_config_dict()
    values.model.update(vocab_size=1280, width=128, num_heads=1, remat="dots", **model)
    values.mesh.update(data=1, fsdp=1)
    values.training.batch_size = 1
    values.order.kind = "left_to_right"  # compiles sooner than the branches of drawn orders
    config = configs.from_config_dict(values)
    mesh = sharding.make_mesh(config.mesh, topology.devices(topology.parse("v5e:1x1")))
    return compilation.compile_lowered(compilation.lower_train_step(config, mesh))


def test_memory_is_linear_in_the_length():
    """Eight times the length takes at most nine times the temporary memory: no N x N array, no whole logits.

    Shorter rows would show nothing: up to about 4096 tokens, the compiler keeps an N x N array in the memory of the
    core (128 MiB), and none of it is counted as temporary memory in HBM.
    """
    sizes = {"num_layers": 1, "two_stream_layers": 1, "loss_chunk": 256}
    short, long = (_compiled(max_length=length, **sizes) for length in (1024, 8192))
    assert "splash_mha_dq" in long.as_text()
    assert long.memory_analysis().temp_size_in_bytes <= 9 * short.memory_analysis().temp_size_in_bytes


def test_program_is_flat_in_the_depth():
    """48 layers are hardly more instructions than 12, because the layers are a loop."""
    shallow, deep = (
        Program(_compiled(max_length=128, num_layers=layers, two_stream_layers=layers // 2).as_text())
        for layers in (12, 48)
    )
    assert deep.num_instructions <= 1.2 * shallow.num_instructions

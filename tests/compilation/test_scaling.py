"""What must not grow: memory of a step with the length, its program with the depth, what it gathers with the batch."""

import itertools
import math

import jax
import pytest

from armd_jax import config as configs
from armd_jax.compilation import compile as compilation
from armd_jax.compilation import topology
from armd_jax.compilation.hlo import Program
from armd_jax.core import axes, parameters
from armd_jax.training import sharding

# Sizes of activations that are no weight's: 8 rows of 384 tokens.
ROWS, LENGTH, WIDTH, VOCAB = 8, 384, 256, 1280
ONE_CHIP = {"mesh__fsdp": 1, "training__batch_size": 1}


@pytest.fixture(scope="module", autouse=True)
def environment():
    """libtpu looks for no TPU."""
    topology.prepare_environment()


def _config(**flags) -> configs.Config:
    values = configs.default_config_dict()
    values.model.update(vocab_size=VOCAB, num_layers=2, two_stream_layers=1, width=WIDTH, num_heads=4, remat="dots")
    values.mesh.update(data=1, fsdp=4)
    values.order.kind = "left_to_right"  # compiles sooner than the branches of drawn orders
    for name, value in flags.items():
        section, field = name.split("__")
        values[section][field] = value
    return configs.from_config_dict(values)


def _compiled(config: configs.Config, slice_name: str = "v5e:2x2") -> jax.stages.Compiled:
    mesh = sharding.make_mesh(config.mesh, topology.devices(topology.parse(slice_name)))
    return compilation.compile_lowered(compilation.lower_train_step(config, mesh))


def test_memory_is_linear_in_the_length():
    """Eight times the length takes at most nine times the temporary memory: no N x N array, no whole logits."""
    small = {"model__num_layers": 1, "model__width": 128, "model__num_heads": 1, "model__loss_chunk": 256}
    short, long = (_compiled(_config(model__max_length=n, **small, **ONE_CHIP), "v5e:1x1") for n in (1024, 8192))
    assert "splash_mha_dq" in long.as_text()
    assert long.memory_analysis().temp_size_in_bytes <= 9 * short.memory_analysis().temp_size_in_bytes


def test_program_is_flat_in_the_depth():
    """48 layers are hardly more instructions than 12: the layers are a loop."""
    small = {"model__max_length": 256, "model__width": 128, "model__num_heads": 1}
    shallow, deep = (
        Program(
            _compiled(
                _config(model__num_layers=n, model__two_stream_layers=n // 2, **small, **ONE_CHIP), "v5e:1x1"
            ).as_text()
        )
        for n in (12, 48)
    )
    assert deep.num_instructions <= 1.2 * shallow.num_instructions


@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 4, "tensor": 1}, {"data": 1, "fsdp": 2, "tensor": 2}])
def test_only_weights_are_gathered(mesh):
    """No gather makes logits whole, or rows of activations: what is gathered are weights, and integers of the order."""
    axes = {f"mesh__{axis}": size for axis, size in mesh.items()}
    config = _config(model__max_length=LENGTH, training__batch_size=ROWS, **axes)
    gathers = [c for c in Program(_compiled(config).as_text()).collectives(4) if c.kind == "all-gather"]
    assert gathers
    asked = _weights(config, mesh)
    for shape in (shape for gather in gathers for shape in gather.shapes):
        assert _key(shape) in asked or math.prod(shape) <= ROWS * LENGTH, shape


def _weights(config: configs.Config, mesh: dict[str, int]) -> set[tuple[int, ...]]:
    """What a weight looks like on the way from its part on a chip to the whole: each axis in parts or whole."""
    params = jax.eval_shape(lambda key: parameters.init(key, config.model), jax.random.key(0))
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = axes.PARAMETERS.get(path[-1].key, ())
        shape = leaf.shape[leaf.ndim - len(names) :]
        parts = [mesh.get(sharding.PARAM_RULES[axis], 1) for axis in names]
        sizes = ({size, size // part} for size, part in zip(shape, parts, strict=True))
        found |= {_key(leaf.shape), *(_key(on_the_way) for on_the_way in itertools.product(*sizes))}
    return found


def _key(shape) -> tuple[int, ...]:
    """A shape whatever the order of its axes."""
    return tuple(sorted(size for size in shape if size > 1))

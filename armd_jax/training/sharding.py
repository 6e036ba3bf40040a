"""The mesh, and one table from logical axis names to mesh axes.

Parameters are sharded over `fsdp` along the model width and over `tensor` along heads, MLP width and vocabulary;
activations over `data` and `fsdp` along the batch. Every sharding is a NamedSharding: no mesh context is needed.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from armd_jax.config import Config, MeshConfig, UserError
from armd_jax.core import network
from armd_jax.core.network import Constrain

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
PARAM_RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}
ACTIVATION_RULES = {"batch": BATCH_AXES, "length": None, "embed": None, "vocab": "tensor", None: None}

# Logical axes of every parameter that is sharded, by its last name; stacked layers have one more axis in front.
# What is not listed (norms, biases, the start token) is small and replicated.
PARAM_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads", None),
    "key_value": ("embed", None, "heads", None),
    "attention_out": ("heads", None, "embed"),
    "mlp_in": ("embed", "mlp"),
    "mlp_gate": ("embed", "mlp"),
    "mlp_out": ("mlp", "embed"),
}


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices; raises UserError where the axes do not multiply to their number."""
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    devices = jax.device_count()
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if -1 in sizes.values():
        if devices % fixed:
            raise UserError(f"mesh: {devices} devices cannot be divided by the fixed axes {sizes}")
        sizes = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    elif fixed != devices:
        raise UserError(f"mesh: {sizes} needs {fixed} devices, but there are {devices}; make one axis -1")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Raises UserError where batch, width, heads, MLP or vocabulary cannot be divided over the mesh."""
    batch_parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.training.batch_size // config.training.microbatches
    if rows % batch_parts:
        raise UserError(
            f"training.batch_size / training.microbatches = {rows} is not divisible by mesh data x fsdp = {batch_parts}"
        )
    for field, size, axis in (
        ("model.width", config.model.width, "fsdp"),
        ("model.num_heads", config.model.num_heads, "tensor"),
        ("model.mlp_width", network.mlp_width(config.model), "tensor"),
        ("the padded vocabulary", network.padded_vocab(config.model), "tensor"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(f"{field}={size} is not divisible by mesh.{axis}={mesh.shape[axis]}")


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def param_shardings(mesh: Mesh, params: network.Params) -> network.Params:
    """The sharding of every parameter, a tree like `params` (arrays or shapes)."""

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = PARAM_AXES.get(path[-1].key, ())
        stacked = (None,) * (leaf.ndim - len(axes)) if axes else ()
        return NamedSharding(mesh, PartitionSpec(*stacked, *(PARAM_RULES[axis] for axis in axes)))

    return jax.tree_util.tree_map_with_path(sharding, params)


def constrain(mesh: Mesh) -> Constrain:
    """What tells the network's activations how to lie on the mesh."""

    def apply(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = PartitionSpec(*(ACTIVATION_RULES[axis] for axis in axes))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return network.no_constraint if mesh.size == 1 else apply


def placement(params: network.Params) -> str:
    """A table of where parameters lie: name, shape, mesh axes, bytes a device."""
    lines = [f"{'parameter':<34} {'shape':<22} {'axes':<28} bytes/device"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(key.key for key in path)
        local = leaf.sharding.shard_shape(leaf.shape)
        size = int(np.prod(local)) * leaf.dtype.itemsize
        lines.append(f"{name:<34} {leaf.shape!s:<22} {tuple(leaf.sharding.spec)!s:<28} {size:,}")
    return "\n".join(lines)

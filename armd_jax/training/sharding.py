"""The mesh, and one table from logical axis names to mesh axes.

Parameters are sharded over `fsdp` along the model width and over `tensor` along heads, MLP width and vocabulary;
activations over `data` and `fsdp` along the batch. Every sharding is a NamedSharding: no mesh context is needed.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from armd_jax.config import MeshConfig
from armd_jax.core import axes
from armd_jax.core.axes import Axes
from armd_jax.core.context import Constrain, no_constraint
from armd_jax.core.parameters import Params
from armd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
PARAM_RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}
# For activations, and for weights at the moment they are used.
USE_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    **PARAM_RULES,
    "batch": BATCH_AXES,
    "length": None,
    "targets": "tensor",
    "embed": None,
}


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis, with -1 resolved. Raises UserError if they do not multiply to `num_devices`."""
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if -1 in sizes.values():
        if num_devices % fixed:
            raise UserError(f"mesh: {num_devices} devices cannot be divided by the fixed axes {sizes}")
        return {name: num_devices // fixed if size == -1 else size for name, size in sizes.items()}
    if fixed != num_devices:
        raise UserError(f"mesh: {sizes} needs {fixed} devices, but there are {num_devices}; make one axis -1")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them).

    On several TPU slices, the outer part of the data axis goes over the slices: weights are replicated across the slow
    network between them and sharded inside each, so that only gradients cross it.
    Raises UserError if the axes do not multiply to the number of devices, or the slices do not divide the data axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data={sizes['data']} is not divisible by the {slices} slices: only the data axis may cross slices"
        )
    inner = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    return Mesh(mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int64: the rows of a global batch that the devices of this process hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places]))


def global_rows(mesh: Mesh, batch_size: int, here: np.ndarray, rows: np.ndarray) -> jax.Array:
    """The global batch as one array; `rows` are those that `rows_here` names, this process's part of it."""

    def part(place: tuple[slice, ...] | None) -> np.ndarray:
        wanted = np.arange(batch_size) if place is None else np.arange(batch_size)[place[0]]
        return rows[np.searchsorted(here, wanted)]

    return jax.make_array_from_callback((batch_size, *rows.shape[1:]), batch_sharding(mesh), part)


def param_shardings(mesh: Mesh, params: Params) -> Params:
    """The sharding of every parameter, a tree like `params` (arrays or shapes)."""

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = axes.PARAMETERS.get(path[-1].key, ())
        stacked = (None,) * (leaf.ndim - len(names)) if names else ()
        return NamedSharding(mesh, PartitionSpec(*stacked, *(PARAM_RULES[name] for name in names)))

    return jax.tree_util.tree_map_with_path(sharding, params)


def constrain(mesh: Mesh) -> Constrain:
    """What tells the network's activations how to lie on the mesh."""

    def apply(array: jax.Array, axes: Axes) -> jax.Array:
        spec = PartitionSpec(*(USE_RULES[axis] for axis in axes))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return no_constraint if mesh.size == 1 else apply

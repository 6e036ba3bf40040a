"""The mesh, and one table from logical axis names to mesh axes.

Parameters are sharded over `fsdp` along the model width and over `tensor` along heads, MLP width and vocabulary;
activations over `data` and `fsdp` along the batch. Every sharding is a NamedSharding: no mesh context is needed.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from armd_jax.config import Config, MeshConfig, ModelConfig, UserError
from armd_jax.core import network, objective
from armd_jax.core.network import Attend, Constrain

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
PARAM_RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}
# Of activations, and of weights where they are used.
USE_RULES = PARAM_RULES | {"batch": BATCH_AXES, "length": None, "embed": None}


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis, -1 resolved; UserError where they do not multiply to `num_devices`."""
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
    """The mesh over `devices` (default: all); raises UserError where the axes do not multiply to their number.

    On several TPU slices the outer part of the data axis goes over the slices: weights are replicated across the slow
    network between them and sharded inside each, and only gradients cross. The data axis must be divisible by them.
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


def for_mesh(config: Config, mesh: Mesh) -> Config:
    """The config with what is `auto` decided for the mesh's devices, and the chunk of logits sized for one of them."""
    device = mesh.devices.flat[0]
    model = config.model.for_platform(device.platform)
    if model.attention == "flash" and config.model.attention == "auto" and not _compiles_flash(device):
        model = dataclasses.replace(model, attention="auto")
    if not model.loss_chunk and mesh.size > 1:
        rows = config.training.batch_size // config.training.microbatches // (mesh.shape["data"] * mesh.shape["fsdp"])
        vocab_part = network.padded_vocab(model) // mesh.shape["tensor"]
        model = dataclasses.replace(model, loss_chunk=objective.chunk_size(max(rows, 1) * vocab_part, model.max_length))
    return dataclasses.replace(config, model=model)


def _compiles_flash(device: jax.Device) -> bool:
    """Whether Triton compiles for this GPU, in bfloat16 too; others than NVIDIA's do not number their capability."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability[:1].isdigit() and float(capability) >= 8


def attend(config: Config, mesh: Mesh, patterns: tuple[int, ...] | None) -> Attend | None:
    """The attention kernel of the mesh's devices for orders of these patterns (`order.patterns`); None: none fits.

    config: as `for_mesh` gives it. The kernel runs per device on its own rows and heads. On CPU it is interpreted.
    Raises UserError where the config asks for a kernel that the devices do not run.
    """
    kind, device = config.model.attention, mesh.devices.flat[0]
    home = {"splash": "tpu", "flash": "gpu"}.get(kind)
    if home is None or (kind == "splash" and patterns is None):
        return None
    if device.platform not in (home, "cpu"):
        raise UserError(
            f"model.attention={kind!r} runs on {home.upper()}, not on {device.platform}: use auto or chunked"
        )
    if device.platform == "gpu" and not _compiles_flash(device):
        raise UserError(
            "model.attention='flash' needs an NVIDIA GPU of compute capability 8.0 or newer, not this"
            f" {device.device_kind}: use auto or chunked"
        )
    interpret = device.platform == "cpu"
    if kind == "splash":
        from armd_jax.core import splash  # imports Pallas

        kernel = functools.partial(splash.attention, patterns=patterns, interpret=interpret)
    else:
        from armd_jax.core import flash  # imports Pallas

        def kernel(*arrays, group):
            del group  # lengths say it all
            return flash.attention(*arrays, interpret=interpret)

    rows, lens = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES, None)

    def apply(q_BQHK, k_BTHK, v_BTHK, len_BQ, group):
        local = functools.partial(kernel, group=group)
        # Pallas kernels carry no annotation of what varies over the mesh: check_vma must be off.
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, lens), out_specs=rows, check_vma=False)
        return mapped(q_BQHK, k_BTHK, v_BTHK, len_BQ)

    return apply


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Raises UserError where batch, width, heads, MLP or vocabulary cannot be divided over the mesh."""
    batch_parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.training.batch_size // config.training.microbatches
    if rows % batch_parts:
        raise UserError(
            f"training.batch_size / training.microbatches = {rows} is not divisible by mesh data x fsdp = {batch_parts}"
        )
    check_model_divisible(config.model, mesh)


def check_model_divisible(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError where width, heads, MLP or vocabulary cannot be divided over the mesh."""
    for field, size, axis in (
        ("model.width", model.width, "fsdp"),
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.mlp_width", network.mlp_width(model), "tensor"),
        ("the padded vocabulary", network.padded_vocab(model), "tensor"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(f"{field}={size} is not divisible by mesh.{axis}={mesh.shape[axis]}")


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int64: which rows of a global batch the devices of this process hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places]))


def global_rows(mesh: Mesh, batch_size: int, here: np.ndarray, rows: np.ndarray) -> jax.Array:
    """The global batch of which this process gives `rows`, those that `rows_here` names."""

    def part(place: tuple[slice, ...]) -> np.ndarray:
        return rows[np.searchsorted(here, np.arange(batch_size)[place[0]])]

    return jax.make_array_from_callback((batch_size, *rows.shape[1:]), batch_sharding(mesh), part)


def param_shardings(mesh: Mesh, params: network.Params) -> network.Params:
    """The sharding of every parameter, a tree like `params` (arrays or shapes)."""

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = network.PARAM_AXES.get(path[-1].key, ())
        stacked = (None,) * (leaf.ndim - len(axes)) if axes else ()
        return NamedSharding(mesh, PartitionSpec(*stacked, *(PARAM_RULES[axis] for axis in axes)))

    return jax.tree_util.tree_map_with_path(sharding, params)


def constrain(mesh: Mesh) -> Constrain:
    """What tells the network's activations how to lie on the mesh."""

    def apply(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = PartitionSpec(*(USE_RULES[axis] for axis in axes))
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

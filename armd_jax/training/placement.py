"""A config on a mesh: what is `auto` decided for its devices, and how network calls are carried out there."""

import dataclasses
import functools
from typing import assert_never

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from armd_jax.config import Config
from armd_jax.core import curriculum, objective
from armd_jax.core.context import Attend, Context, LayerGroup
from armd_jax.core.sizes import activation_dtype, padded_vocab
from armd_jax.errors import UserError
from armd_jax.names import GpuKernel, Reset, TpuKernel
from armd_jax.order_config import block_patterns
from armd_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Placement:
    """What training and evaluation steps are made from.

    config: with every `auto` decided. mesh: the devices. context: constraints and attention kernel for these devices.
    """

    config: Config
    mesh: Mesh
    context: Context


def for_training(config: Config, mesh: Mesh) -> Placement:
    """The placement of training steps. Raises UserError if the config asks for a kernel that the devices do not run."""
    # Without orders every query sees the whole row, of which training has no padding: a single pattern.
    return _place(config, mesh, block_patterns(config.order) if config.model.has_orders else (1,))


def for_evaluation(config: Config, mesh: Mesh) -> Placement:
    """The placement of evaluation steps, which take a batch at once.

    Text is scored left to right with padding behind everything else, so that every block is one token, or under blocks
    that are drawn if those bound the likelihood. Without orders, the lengths of the rows are data.
    """
    exact = config.model.has_orders and curriculum.bounding_order(config.order) is None
    patterns = (1,) if exact else None
    # Without accumulation, so that the chunks of logits are not sized for a microbatch.
    training = dataclasses.replace(config.training, microbatches=1)
    return _place(dataclasses.replace(config, training=training), mesh, patterns)


def _place(config: Config, mesh: Mesh, patterns: tuple[int, ...] | None) -> Placement:
    config = _decided(config, mesh)
    context = Context(sharding.constrain(mesh), _attend(config, mesh, patterns), float32_sums=_float32_sums(config))
    return Placement(config, mesh, context)


def _float32_sums(config: Config) -> bool:
    """Whether sums of gradients need a dtype of their own."""
    match config.training.gradient_sums:
        case "float32":
            return activation_dtype(config.model) != jnp.float32
        case "activations":
            return False
        case _:
            assert_never(config.training.gradient_sums)


def _decided(config: Config, mesh: Mesh) -> Config:
    """The config with every `auto` decided for the mesh's devices, and the chunk of logits sized for one of them."""
    device = mesh.devices.flat[0]
    model = config.model.for_platform(device.platform)
    chosen_here = model.attention != config.model.attention
    compiles = device.platform != "gpu" or _triton_compiles_for(device)
    # Kernels know nothing but prefixes of the row, and a document that is kept apart begins within it.
    if chosen_here and not (compiles and _sees_prefixes(config.data.reset)):
        model = dataclasses.replace(model, attention="auto")
    if not model.loss_chunk and mesh.size > 1 and model.vocab_size:  # 0: it is not known yet
        rows = config.training.batch_size // config.training.microbatches // (mesh.shape["data"] * mesh.shape["fsdp"])
        vocab_part = padded_vocab(model) // mesh.shape["tensor"]
        model = dataclasses.replace(model, loss_chunk=objective.loss_chunk(max(rows, 1) * vocab_part, model.max_length))
    return dataclasses.replace(config, model=model)


def _sees_prefixes(reset: Reset) -> bool:
    """Whether every query sees the row from its start."""
    match reset:
        case "none":
            return True
        case "document":
            return False
        case _:
            assert_never(reset)


def _triton_compiles_for(device: jax.Device) -> bool:
    """Whether Triton compiles for this GPU, bfloat16 included. Only NVIDIA's GPUs number their compute capability."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability[:1].isdigit() and float(capability) >= 8


def _attend(config: Config, mesh: Mesh, patterns: tuple[int, ...] | None) -> Attend | None:
    """The attention kernel of the mesh's devices for orders of these block patterns; None if none fits.

    The kernel runs per device, on the device's own rows and heads. On CPU it is interpreted.
    Raises UserError if the config asks for a kernel that the devices do not run.
    """
    kernel: Attend
    kind, device = config.model.attention, mesh.devices.flat[0]
    interpret = device.platform == "cpu"
    match kind:
        case "splash":
            if patterns is None:
                return None
            _check_platform(kind, "tpu", device)
            from armd_jax.core.kernels import splash  # imports Pallas

            kernel = functools.partial(splash.attention, patterns=patterns, interpret=interpret)
        case "flash":
            _check_platform(kind, "gpu", device)
            if device.platform == "gpu" and not _triton_compiles_for(device):
                raise UserError(
                    "model.attention='flash' needs an NVIDIA GPU of compute capability 8.0 or newer, not this"
                    f" {device.device_kind}: use auto or chunked"
                )
            from armd_jax.core.kernels import flash  # imports Pallas

            def kernel(
                q_BQHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, len_BQ: jax.Array, group: LayerGroup
            ) -> jax.Array:
                del group  # prefix lengths are data for this kernel
                return flash.attention(q_BQHK, k_BTHK, v_BTHK, len_BQ, interpret=interpret)

        case "auto" | "dense" | "chunked":
            return None
        case _:
            assert_never(kind)

    rows, lens = PartitionSpec(sharding.BATCH_AXES, None, "tensor", None), PartitionSpec(sharding.BATCH_AXES, None)

    def attend(
        q_BQHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, len_BQ: jax.Array, group: LayerGroup
    ) -> jax.Array:
        local = functools.partial(kernel, group=group)
        # Pallas kernels carry no annotation of what varies over the mesh, so check_vma must be off.
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, lens), out_specs=rows, check_vma=False)
        return mapped(q_BQHK, k_BTHK, v_BTHK, len_BQ)

    return attend


def _check_platform(kind: TpuKernel | GpuKernel, home: str, device: jax.Device) -> None:
    if device.platform not in (home, "cpu"):
        raise UserError(
            f"model.attention={kind!r} runs on {home.upper()}, not on {device.platform}: use auto or chunked"
        )

"""Compiles the training step or the sampler for a TPU topology, and reports what it needs, without a TPU.

The program is the one that trains: `training.step.make_train_step` on the experiment's mesh, with the shardings of its
state, compiled with one option of our own (`_OPTIONS`). Nothing is allocated. Bytes are per chip. `report` is the
whole of `armd compile`.
"""

import dataclasses
import functools
import math
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from armd_jax.compilation import roofline, topology
from armd_jax.compilation.hlo import Program
from armd_jax.compilation.topology import Topology
from armd_jax.config import Config, MeshConfig, ModelConfig
from armd_jax.core import flops, order, parameters
from armd_jax.errors import UserError
from armd_jax.inference import sampler, schedule
from armd_jax.inference.draw import Draw
from armd_jax.training import divisibility, placement, sharding, state, step

GPT2_VOCABULARY, BERT_VOCABULARY, BYTES_VOCABULARY = 50_257, 30_522, 257
WHATS = ("train", "sample")
_SPLASH = "splash"
# Chips with SparseCores (v5p, v6e) would look embeddings up on them, as an instruction that libtpu 0.0.52 writes and
# JAX 0.10 cannot read back ("async-update instruction should have 1 operands"); libtpu 0.0.42 leaves it alone anyway.
_OPTIONS = {"xla_tpu_offload_gather_to_sparsecore": "false"}


class CompilerFailed(RuntimeError):
    """The TPU compiler gave up on a program that nobody said anything wrong about."""


@dataclasses.dataclass(frozen=True)
class DoesNotFit(Exception):
    """The compiler found that the program needs more memory than a chip has; both in bytes."""

    needed: int
    available: int


def assumed_vocabulary(config: Config) -> Config:
    """The config with a vocabulary size: its own, else that of its tokenizer's kind. No tokenizer is read.

    A folder of vocabulary files counts as GPT-2's (50257), or as bert-base-uncased's (30522) where its name says bert.
    """
    if config.model.vocab_size:
        return config
    kinds = {"sentencepiece": config.data.vocab_size, "bytes": BYTES_VOCABULARY}
    folder = BERT_VOCABULARY if "bert" in config.data.tokenizer.lower() else GPT2_VOCABULARY
    size = kinds.get(config.data.tokenizer, folder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The training step on shapes alone; config with its vocabulary size."""
    rows = (config.training.batch_size, config.model.max_length)
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=sharding.batch_sharding(mesh))
    return step.make_train_step(placement.for_training(config, mesh)).lower(state.abstract(config, mesh), tokens)


def lower_sampler(config: Config, mesh: Mesh, batch: int, streams: int) -> jax.stages.Lowered:
    """`inference.sampler.generate` of whole rows on shapes alone, rows spread over the mesh like a training batch."""
    length = config.model.max_length
    order.check_streams(length, streams, length)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % parts:
        raise UserError(f"--batch={batch} is not divisible by mesh data x fsdp = {parts}")
    model = config.model.for_platform("tpu")
    params = jax.eval_shape(lambda key: parameters.unstack(parameters.init(key, model)), jax.random.key(0))
    everywhere, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def place(tree, where):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

    plan = schedule.strided(batch, length, streams)
    plan = dataclasses.replace(place(plan, everywhere), order=place(plan.order, rows))
    draw = Draw(jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere), top_p=None, greedy=False, top_k=None)
    return sampler.generate.lower(
        jax.tree.map(place, params, sharding.param_shardings(mesh, params)),
        model,
        place(jax.eval_shape(lambda: jax.random.key(0)), everywhere),
        jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows),
        plan,
        draw,
    )


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program; raises DoesNotFit where it needs too much memory, CompilerFailed for anything else."""
    # Programs for a machine that is not here can be written into the compilation cache but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile(compiler_options=dict(_OPTIONS))
    except jax.errors.JaxRuntimeError as error:
        sizes = re.search(r"([\d.]+)([KMGT])[^\d]*(?:exceeds available HBM|of) \(?([\d.]+)([KMGT])", str(error))
        if "HbmOom" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            raise CompilerFailed(str(error)[:300]) from error
        needed, available = (
            int(float(n) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[u])
            for n, u in (sizes.group(1, 2), sizes.group(3, 4))
        )
        raise DoesNotFit(needed, available) from error


def state_bytes(config: Config, mesh: Mesh) -> int:
    """What the training state takes on one device: parameters, two moments and the average, each like the other."""
    shapes = _parameter_shapes(config.model)
    places = sharding.param_shardings(mesh, shapes)
    sizes = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * 4, shapes, places)
    return sum(jax.tree.leaves(sizes)) * (4 if config.optimizer.ema_decay else 3)


@functools.lru_cache(maxsize=4)
def _parameter_shapes(model: ModelConfig) -> parameters.Params:
    return jax.eval_shape(lambda key: parameters.init(key, model), jax.random.key(0))


def report(
    config: Config,
    name: str,
    where: Topology,
    what: str = "train",
    batch: int = 0,
    streams: int = 1,
    hlo_file: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Compiles and reports; the keys are those of `armd compile --json`. Raises UserError on impossible input.

    name: the experiment, as shown. batch, streams: of the sampler; batch 0: one row a device of data x fsdp.
    """
    config = assumed_vocabulary(config)
    mesh = sharding.make_mesh(config.mesh, topology.devices(where))
    if what == "train":
        divisibility.check(config, mesh)
    else:
        divisibility.check_model(config.model, mesh)
    result: dict[str, Any] = {
        "config": name,
        "what": what,
        "topology": where.name,
        "slices": where.slices,
        "chips": where.chips,
        "mesh": dict(mesh.shape),
        "vocab_size": config.model.vocab_size,
        "hbm_bytes": where.chip.hbm_bytes,
    }
    if what == "train":
        lowered = lower_train_step(config, mesh)
        tokens = config.training.batch_size * config.model.max_length
        per_token, forward = flops.training_flops_per_token(config.model), flops.forward_flops_per_token(config.model)
    else:
        batch = batch or mesh.shape["data"] * mesh.shape["fsdp"]
        lowered = lower_sampler(config, mesh, batch, streams)
        tokens = batch * config.model.max_length
        per_token = forward = flops.decoding_flops_per_token(config.model)
        result |= {"batch": batch, "streams": streams}
    result["model_flops"] = per_token.total * tokens
    began = time.perf_counter()
    try:
        compiled = compile_lowered(lowered)
    except DoesNotFit as error:
        result["compile_seconds"] = time.perf_counter() - began
        return result | _too_large(config, where, mesh, error, what)
    result["compile_seconds"] = time.perf_counter() - began
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise CompilerFailed(f"the compiled program cannot be read back: {str(error)[:300]}") from error
    if hlo_file is not None:
        hlo_file.write_text(text)
    return (
        result | _memory(compiled) | _program(Program(text), where, result["model_flops"], forward.attention * tokens)
    )


def _memory(compiled: jax.stages.Compiled) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    return {
        "fits": True,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
    }


def _program(program: Program, where: Topology, model_flops: float, forward_attention: float) -> dict[str, Any]:
    collectives = program.collectives(where.chips // where.slices)
    kernels = {name: count for name, count in program.kernels().items() if _SPLASH in name}
    executed = program.product_flops() + roofline.kernel_flops(kernels, forward_attention / where.chips)
    moved = program.hbm_traffic()
    times = roofline.times(where.chip, executed, moved, collectives)
    grouped: dict[tuple[str, bool], list[float]] = {}
    for collective in collectives:
        sums = grouped.setdefault((collective.kind, collective.crosses_slices), [0, 0, 0.0])
        sums[0] += collective.times
        sums[1] += collective.times * collective.bytes
        sums[2] += collective.sent_bytes
    return {
        "collectives": [
            {"kind": kind, "count": count, "bytes": size, "sent_bytes": round(sent), "between_slices": crosses}
            for (kind, crosses), (count, size, sent) in sorted(grouped.items())
        ],
        "attention_kernels": kernels,
        "executed_flops": executed * where.chips,
        "hbm_traffic_bytes": moved,
        "roofline_seconds": dataclasses.asdict(times),
        "predicted_step_seconds": times.step,
        "predicted_mfu": times.mfu(model_flops / where.chips, where.chip),
        "limiting_term": times.limiting_term,
        "hlo_instructions": program.num_instructions,
        "suggestion": None,
    }


def _too_large(config: Config, where: Topology, mesh: Mesh, error: DoesNotFit, what: str) -> dict[str, Any]:
    held = state_bytes(config, mesh) if what == "train" else 0
    return {
        "fits": False,
        "argument_bytes": held,
        "output_bytes": held,
        "temp_bytes": error.needed - held,
        "peak_bytes": error.needed,
        "collectives": [],
        "attention_kernels": {},
        "predicted_step_seconds": None,
        "predicted_mfu": None,
        "limiting_term": None,
        "suggestion": suggest(config, where, mesh, error) if what == "train" else None,
    }


def suggest(config: Config, where: Topology, mesh: Mesh, error: DoesNotFit) -> str | None:
    """The smallest slice of the same chip, and a mesh on it, that should hold the step: an estimate.

    The state's part on a device follows from the rules; all else is taken to shrink with the rows and the share of the
    `tensor` axis on a device.
    """
    rest = error.needed - state_bytes(config, mesh)
    rest_a_row = rest * mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["tensor"]
    for candidate in (where, *where.larger()):
        slices, inside = candidate.slices, candidate.chips // candidate.slices
        for tensor in (1, 2, 4, 8):
            if inside % tensor:
                continue
            sizes = MeshConfig(data=slices, fsdp=inside // tensor, tensor=tensor)
            try:
                other = sharding.make_mesh(sizes, topology.devices(candidate))
                divisibility.check(config, other)
            except UserError:
                continue
            if state_bytes(config, other) + rest_a_row / other.size < error.available:
                flags = f"--topology={candidate.name}" + (f" --slices={slices}" if slices > 1 else "")
                mesh_flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in other.shape.items())
                return f"{flags} {mesh_flags}"
    return None


def table(result: dict[str, Any]) -> str:
    """The report as text."""
    gib = lambda size: f"{size / 2**30:.2f} GiB"  # noqa: E731
    slices = f" x {result['slices']} slices" if result["slices"] > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    lines = [
        f"{result['config']} ({result['what']}) on {result['topology']}{slices}: {result['chips']} chips, mesh {mesh}",
        f"  fits           {'yes' if result['fits'] else 'NO'}: peak {gib(result['peak_bytes'])} of"
        f" {gib(result['hbm_bytes'])} a chip (arguments {gib(result['argument_bytes'])}, temporary"
        f" {gib(result['temp_bytes'])})",
    ]
    if not result["fits"]:
        hint = result["suggestion"]
        if result["what"] == "sample":
            lines.append("  try            a smaller --batch, or a mesh with a larger fsdp or tensor axis")
        else:
            lines.append(
                f"  try            {hint}" if hint else "  no slice of this chip holds it: use fewer rows or remat"
            )
        return "\n".join(lines)
    for entry in result["collectives"]:
        kind = entry["kind"] + (" between slices" if entry["between_slices"] else "")
        lines.append(
            f"  {kind:<30} {entry['count']:>6,} times {gib(entry['bytes']):>12}, sent {gib(entry['sent_bytes'])}"
        )
    kernels = ", ".join(f"{name} {count}" for name, count in result["attention_kernels"].items())
    seconds = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in result["roofline_seconds"].items())
    lines += [
        f"  attention      {kernels or 'no kernel'}",
        f"  model FLOPs    {result['model_flops']:.3e} (executed {result['executed_flops']:.3e})",
        f"  roofline ms    {seconds}",
        f"  predicted      {result['predicted_step_seconds'] * 1e3:.2f} ms, MFU {result['predicted_mfu']:.1%},"
        f" limited by {result['limiting_term']}",
        f"  compiled       {result['compile_seconds']:.1f} s, {result['hlo_instructions']:,} HLO instructions",
    ]
    return "\n".join(lines)

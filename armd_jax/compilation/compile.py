"""Compiles the training step or the sampler for a TPU topology, and finds out what it needs, without a TPU.

The program is the one that trains: `training.step.make_train_step` on the experiment's mesh, with the shardings of its
state, compiled with one option of our own (`_OPTIONS`). Nothing is allocated. `run` is the whole of `armd compile`.
"""

import dataclasses
import functools
import math
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any, TypeVar, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from armd_jax.compilation import attention, bill, collectives, costs, roofline, topology
from armd_jax.compilation.collectives import Collective
from armd_jax.compilation.hlo import CollectiveKind, Program
from armd_jax.compilation.result import CollectiveTotal, CompileResult, Memory, Sampling, Work
from armd_jax.compilation.topology import Topology
from armd_jax.config import Config, MeshConfig
from armd_jax.core import flops, order, parameters
from armd_jax.core.parameters import Params
from armd_jax.errors import UserError
from armd_jax.inference import sampler, schedule
from armd_jax.inference.draw import Draw
from armd_jax.inference.sampler import SamplingState
from armd_jax.inference.schedule import Schedule
from armd_jax.names import CompiledProgram
from armd_jax.training import divisibility, placement, sharding, state, step
from armd_jax.training.state import TrainState

GPT2_VOCABULARY, BERT_VOCABULARY, BYTES_VOCABULARY = 50_257, 30_522, 257
_SPLASH = "splash"
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}  # powers of two, as the compiler writes sizes
# On chips with SparseCores (v5p, v6e) the compiler would look embeddings up there. libtpu 0.0.52 writes an instruction
# for that which JAX 0.10 cannot read back ("async-update instruction should have 1 operands"). libtpu 0.0.42 does not
# do it anyway.
_OPTIONS = {"xla_tpu_offload_gather_to_sparsecore": "false"}

Tree = TypeVar("Tree")


class CompilerFailed(RuntimeError):
    """The TPU compiler gave up for another reason than a lack of memory."""


@dataclasses.dataclass(frozen=True)
class DoesNotFit(Exception):
    """The compiler found that the program needs more memory than a chip has; both in bytes."""

    needed: int
    available: int


@dataclasses.dataclass(frozen=True)
class _Job:
    """A lowered program, and what is known of it without compiling.

    model_flops, ar_model_flops: of one run on all chips, see `CompileResult`. forward_kernel_flops: those of the
    attention kernels in one forward pass, on all chips. sampling: None for the training step.
    """

    lowered: jax.stages.Lowered
    model_flops: float
    ar_model_flops: float
    forward_kernel_flops: float
    sampling: Sampling | None = None


def run(
    config: Config,
    name: str,
    where: Topology,
    what: CompiledProgram = "train",
    batch: int = 0,
    streams: int = 1,
    hlo_file: pathlib.Path | None = None,
    price: float | None = None,
) -> CompileResult:
    """Compiles a program and finds out what it needs.

    name: of the experiment, for the result. batch, streams: of the sampler; batch 0: one row per device of data x fsdp.
    hlo_file: where the compiled program is written; None: nowhere. price: of a chip for an hour, for the bill.
    Raises UserError if the input is impossible, and CompilerFailed if the compiler gives up.
    """
    config = assumed_vocabulary(config)
    mesh = sharding.make_mesh(config.mesh, topology.devices(where))
    match what:
        case "train":
            job = _training_job(config, mesh)
        case "sample":
            if price is not None:
                raise UserError("--price-per-chip-hour: only a training has a schedule to price; leave --what at train")
            job = _sampling_job(config, mesh, batch or mesh.shape["data"] * mesh.shape["fsdp"], streams)
        case _:
            assert_never(what)
    work = suggestion = charged = None
    began = time.perf_counter()
    try:
        compiled = compile_lowered(job.lowered)
    except DoesNotFit as error:
        compile_seconds = time.perf_counter() - began
        memory, suggestion = _too_large(config, where, mesh, what, error)
    else:
        compile_seconds = time.perf_counter() - began
        text = _text(compiled)
        if hlo_file is not None:
            hlo_file.write_text(text, encoding="utf-8")
        memory = _memory(compiled)
        work = _work(Program(text, attention.iterations(config)), where, job)
        if job.sampling is None and not work.unknown_loops:
            parameters_of_ar = flops.ar_parameters(config.model)
            charged = bill.make(
                config, where.chip_name, where.chips, parameters_of_ar, work.predicted_step_seconds, price
            )
    return CompileResult(
        config=name,
        what=what,
        topology=where.name,
        slices=where.slices,
        chips=where.chips,
        mesh=dict(mesh.shape),
        vocab_size=config.model.vocab_size,
        hbm_bytes=where.chip.hbm_bytes,
        sampling=job.sampling,
        model_flops=job.model_flops,
        ar_model_flops=job.ar_model_flops,
        compile_seconds=compile_seconds,
        memory=memory,
        work=work,
        bill=charged,
        suggestion=suggestion,
    )


def assumed_vocabulary(config: Config) -> Config:
    """The config with a vocabulary size: its own, or else that of its tokenizer's kind. No tokenizer is read.

    A folder of vocabulary files counts as GPT-2's (50257), or as that of bert-base-uncased (30522) if its name contains
    "bert".
    """
    if config.model.vocab_size:
        return config
    kinds = {"sentencepiece": config.data.vocab_size, "bytes": BYTES_VOCABULARY}
    folder = BERT_VOCABULARY if "bert" in config.data.tokenizer.lower() else GPT2_VOCABULARY
    size = kinds.get(config.data.tokenizer, folder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


# --- lowering and compiling -------------------------------------------------------------------------------------------


def _training_job(config: Config, mesh: Mesh) -> _Job:
    divisibility.check(config, mesh)
    tokens = config.training.batch_size * config.model.max_length
    return _Job(
        lower_train_step(config, mesh),
        model_flops=flops.training_flops_per_token(config.model).total * tokens,
        ar_model_flops=flops.ar_training_flops_per_token(config.model) * tokens,
        forward_kernel_flops=attention.splash_forward_flops(config),
    )


def _sampling_job(config: Config, mesh: Mesh, batch: int, streams: int) -> _Job:
    if not config.model.has_orders:
        raise UserError(
            "--what=sample: the samplers of a denoiser (model.kind) cannot be compiled here; use --what=train"
        )
    divisibility.check_model(config.model, mesh)
    tokens = batch * config.model.max_length
    return _Job(
        lower_sampler(config, mesh, batch, streams),
        model_flops=flops.decoding_flops_per_token(config.model).total * tokens,
        ar_model_flops=flops.ar_training_flops_per_token(config.model) / 3 * tokens,  # without the backward pass
        forward_kernel_flops=0.0,  # it attends without a kernel
        sampling=Sampling(batch, streams),
    )


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the training step on shapes alone. The config must have a vocabulary size."""
    shape = (config.training.batch_size, config.model.max_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    return step.make_train_step(placement.for_training(config, mesh)).lower(state.abstract(config, mesh), tokens)


def lower_sampler(config: Config, mesh: Mesh, batch: int, streams: int) -> jax.stages.Lowered:
    """Lowers the loop of `inference.sampler.advance` over whole rows, on shapes alone.

    Rows are spread like those of a batch. The number of calls is known here, so that costs can be counted.

    Raises UserError if the length does not divide into the streams, or the rows do not divide over the mesh.
    """
    length = config.model.max_length
    order.check_streams(length, streams, length)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % parts:
        raise UserError(f"--batch={batch} is not divisible by mesh data x fsdp = {parts}")
    model = config.model.for_platform("tpu")
    params = jax.eval_shape(lambda key: parameters.unstack(parameters.init(key, model)), jax.random.key(0))
    everywhere, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    plan = schedule.strided(np.full((batch, length), schedule.FREE), streams, length, rows=batch)
    seeds = jax.ShapeDtypeStruct(plan.first_B.shape, jnp.int32)
    began = jax.eval_shape(
        functools.partial(sampler.begin, config=model, size=1), params, plan=plan, seed_B=seeds, stream_B=seeds
    )

    def by_row(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows if leaf.ndim else everywhere)

    def sample(params: Params, plan: Schedule, began: SamplingState, draw: Draw) -> SamplingState:
        ending = sampler.Ending(jnp.int32(-1), jnp.float32(0))
        step = lambda _, state: sampler.draw_block(params, model, plan, state, draw, ending)  # noqa: E731
        return jax.lax.fori_loop(0, schedule.num_calls(length, streams), step, began)

    return jax.jit(sample, donate_argnums=2).lower(
        jax.tree.map(_shapes, params, sharding.param_shardings(mesh, params)),
        jax.tree.map(by_row, plan),
        jax.tree.map(by_row, began),
        _shapes(jax.eval_shape(Draw.make), everywhere),
    )


def _shapes(tree: Tree, where: NamedSharding) -> Tree:
    """The tree with shapes in place of its arrays, all with the same sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program. Raises DoesNotFit if it needs too much memory, and CompilerFailed for anything else."""
    # Programs for a machine that is not here can be written into the compilation cache but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile(compiler_options=dict(_OPTIONS))
    except jax.errors.JaxRuntimeError as error:
        sizes = re.search(r"([\d.]+)([KMGT])[^\d]*(?:exceeds available HBM|of) \(?([\d.]+)([KMGT])", str(error))
        if "HbmOom" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            raise CompilerFailed(str(error)[:300]) from error
        needed, available = (
            int(float(number) * 2 ** _UNITS[unit]) for number, unit in (sizes.group(1, 2), sizes.group(3, 4))
        )
        raise DoesNotFit(needed, available) from error


# --- what a compiled program needs ------------------------------------------------------------------------------------


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise CompilerFailed(f"the compiled program cannot be read back: {str(error)[:300]}") from error
    if text is None:
        raise CompilerFailed("the compiled program cannot be read back: the compiler shows no text of it")
    return text


def _memory(compiled: jax.stages.Compiled) -> Memory:
    sizes: Any = compiled.memory_analysis()  # JAX gives it no type
    return Memory(
        argument_bytes=sizes.argument_size_in_bytes,
        output_bytes=sizes.output_size_in_bytes,
        temp_bytes=sizes.temp_size_in_bytes,
        peak_bytes=sizes.peak_memory_in_bytes,
    )


def _work(program: Program, where: Topology, job: _Job) -> Work:
    sent = collectives.find(program, where.chips // where.slices)
    kernels = {name: runs for name, runs in costs.kernels(program).items() if _SPLASH in name}
    executed = costs.product_flops(program) + roofline.kernel_flops(kernels, job.forward_kernel_flops / where.chips)
    moved = costs.hbm_traffic(program)
    seconds = roofline.seconds(where.chip, executed, moved, sent)
    unknown = bool(program.unknown_loops)
    return Work(
        collectives=_totals(sent),
        attention_kernels=kernels,
        executed_flops=executed * where.chips,
        hbm_traffic_bytes=moved,
        roofline_seconds=seconds,
        predicted_step_seconds=seconds.step,
        predicted_mfu=None if unknown else seconds.mfu(job.model_flops / where.chips, where.chip),
        predicted_ar_mfu=None if unknown else seconds.mfu(job.ar_model_flops / where.chips, where.chip),
        unknown_loops=len(program.unknown_loops),
        limiting_term=seconds.limiting_term,
        hlo_instructions=program.num_instructions,
    )


def _totals(found: Sequence[Collective]) -> tuple[CollectiveTotal, ...]:
    """The collectives summed by kind and by whether they cross slices, in the order of their names."""
    groups: dict[tuple[CollectiveKind, bool], list[Collective]] = {}
    for one in found:
        groups.setdefault((one.kind, one.crosses_slices), []).append(one)
    return tuple(
        CollectiveTotal(
            kind=kind,
            count=round(sum(one.runs for one in group)),
            bytes=round(sum(one.runs * one.bytes for one in group)),
            sent_bytes=round(sum(one.sent_bytes for one in group)),
            between_slices=crosses,
        )
        for (kind, crosses), group in sorted(groups.items(), key=lambda item: item[0])
    )


# --- what a program that does not fit needs ---------------------------------------------------------------------------


def _too_large(
    config: Config, where: Topology, mesh: Mesh, what: CompiledProgram, error: DoesNotFit
) -> tuple[Memory, str | None]:
    """What is known of the memory of a program that does not fit, and what to try instead."""
    match what:
        case "train":
            held = state_bytes(state.abstract(config, mesh), mesh)
            suggestion = suggest(config, where, mesh, error)
        case "sample":
            held, suggestion = 0, None
        case _:
            assert_never(what)
    return Memory(held, held, error.needed - held, error.needed), suggestion


def state_bytes(shapes: TrainState, mesh: Mesh) -> int:
    """Bytes of a training state on one device of a mesh: parameters, optimizer state, moving average and counters.

    shapes: from `training.state.abstract`, which may have been made for another mesh: shardings name axes, and all
    meshes have the same ones.
    """
    sizes = (
        math.prod(NamedSharding(mesh, leaf.sharding.spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )
    return sum(sizes)


def suggest(config: Config, where: Topology, mesh: Mesh, error: DoesNotFit) -> str | None:
    """Flags of the smallest slice of the same chip, and a mesh on it, that should hold the training step: an estimate.

    The state's part on a device follows from the shardings. All other memory is assumed to shrink with the device's
    part of the rows and of the `tensor` axis. None if no slice is large enough.
    """
    shapes = state.abstract(config, mesh)
    rest = error.needed - state_bytes(shapes, mesh)
    rest_on_one_device = rest * mesh.size
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
            if state_bytes(shapes, other) + rest_on_one_device / other.size < error.available:
                flags = f"--topology={candidate.name}" + (f" --slices={slices}" if slices > 1 else "")
                mesh_flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in other.shape.items())
                return f"{flags} {mesh_flags}"
    return None

"""The result of `armd compile`: what a program needs on a TPU slice, as a dataclass, as JSON and as text."""

import dataclasses
from typing import Any, assert_never

from armd_jax.compilation.bill import Bill
from armd_jax.compilation.hlo import CollectiveKind
from armd_jax.compilation.roofline import Resource, RooflineSeconds
from armd_jax.names import CompiledProgram

# What the JSON says of the work of a program that does not fit. It has no keys for the other figures of `Work`.
_NO_WORK: dict[str, Any] = {
    "collectives": [],
    "attention_kernels": {},
    "predicted_step_seconds": None,
    "predicted_mfu": None,
    "predicted_ar_mfu": None,
    "limiting_term": None,
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What only the sampler has. batch: rows that are drawn together. streams: S."""

    batch: int
    streams: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip, as the compiler assigned them.

    For a program that does not fit, only the peak is the compiler's. Arguments and outputs are then the training state
    (0 for the sampler), and temporaries are the rest.
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind on one chip: number, bytes of their arrays, and bytes that the chip sends."""

    kind: CollectiveKind
    count: int
    bytes: int
    sent_bytes: int
    between_slices: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a compiled program does, and how long that takes at least.

    Of a conditional, this is the mean over its branches. attention_kernels: runs by name, on one chip. executed_flops:
    on all chips. hbm_traffic_bytes: on one chip. predicted_step_seconds: a bound, the longest of `roofline_seconds`,
    which is that of `limiting_term`. predicted_mfu, predicted_ar_mfu: the utilisation that `model_flops` and
    `ar_model_flops` would have in that time, which no run exceeds. unknown_loops: number of loops that count once,
    because it is not known how often they run; if there are any, FLOPs, bytes and times are too small, and the
    utilisations are None.
    """

    collectives: tuple[CollectiveTotal, ...]
    attention_kernels: dict[str, float]
    executed_flops: float
    hbm_traffic_bytes: float
    roofline_seconds: RooflineSeconds
    predicted_step_seconds: float
    predicted_mfu: float | None
    predicted_ar_mfu: float | None
    unknown_loops: int
    limiting_term: Resource
    hlo_instructions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileResult:
    """One compilation.

    config: the experiment, as it was named. topology: one slice, such as v5e:4x4. slices: number of slices.
    chips: in all slices together. mesh: devices by axis. hbm_bytes: memory of one chip.
    sampling: None for the training step. model_flops: of the mathematics alone, for one run on all chips, with both
    streams of an ARMD. ar_model_flops: those of an autoregressive model of the same size by the convention of the field
    (`core.flops.ar_training_flops_per_token`).
    work: None if the program does not fit. bill: of the whole schedule; None for the sampler, if the program does not
    fit, and if it has loops whose number of iterations is not known.
    suggestion: if a training step does not fit, the flags of a smallest slice and a mesh that should hold it; None if
        there is no such slice of this chip.
    """

    config: str
    what: CompiledProgram
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    vocab_size: int
    hbm_bytes: int
    sampling: Sampling | None = None
    model_flops: float
    ar_model_flops: float
    compile_seconds: float
    memory: Memory
    work: Work | None = None
    bill: Bill | None = None
    suggestion: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the program fits into the memory of the chips."""
        return self.work is not None

    def as_dict(self) -> dict[str, Any]:
        """The object that `armd compile --json` prints: flat, but for the mesh, collectives, kernels and the bill."""
        flat: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            match name:
                case "sampling":
                    flat |= value or {}
                case "memory":
                    flat |= {"fits": self.fits, **value}
                case "work":
                    flat |= value or _NO_WORK
                case _:
                    flat[name] = value
        return flat


def as_text(result: CompileResult) -> str:
    """The result for people."""
    slices = f" x {result.slices} slices" if result.slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in result.mesh.items())
    memory = result.memory
    lines = [
        f"{result.config} ({result.what}) on {result.topology}{slices}: {result.chips} chips, mesh {mesh}",
        f"  fits           {'yes' if result.fits else 'NO'}: peak {_gib(memory.peak_bytes)} of"
        f" {_gib(result.hbm_bytes)} per chip (arguments {_gib(memory.argument_bytes)}, temporary"
        f" {_gib(memory.temp_bytes)})",
    ]
    work = result.work
    if work is None:
        return "\n".join([*lines, f"  try            {_advice(result)}"])
    for total in work.collectives:
        kind = total.kind + (" between slices" if total.between_slices else "")
        lines.append(f"  {kind:<30} {total.count:>6,} times {_gib(total.bytes):>12}, sent {_gib(total.sent_bytes)}")
    kernels = ", ".join(f"{name} {count:.3g}" for name, count in work.attention_kernels.items())
    seconds = dataclasses.asdict(work.roofline_seconds)
    milliseconds = ", ".join(f"{resource} {value * 1e3:.2f}" for resource, value in seconds.items())
    lines += [
        f"  attention      {kernels or 'no kernel'}",
        f"  model FLOPs    {result.model_flops:.3e} of the model's own mathematics, executed {work.executed_flops:.3e}",
        f"  AR FLOPs       {result.ar_model_flops:.3e} of an autoregressive model of this size (6 N + 12 L H K T)",
        f"  roofline ms    {milliseconds}",
        f"  at best        {work.predicted_step_seconds * 1e3:.2f} ms, {_utilization(work)}, limited by"
        f" {work.limiting_term}; a bound, not a prediction",
        *(_bill(result.bill, result.chips) if result.bill else ()),
        f"  compiled       {result.compile_seconds:.1f} s, {work.hlo_instructions:,} HLO instructions",
    ]
    return "\n".join(lines)


def _utilization(work: Work) -> str:
    if work.predicted_mfu is None or work.predicted_ar_mfu is None:
        return f"MFU unknown ({work.unknown_loops} loops count once, because nothing tells how often they run)"
    return f"MFU {work.predicted_mfu:.1%} (AR {work.predicted_ar_mfu:.1%})"


def _bill(bill: Bill, chips: int) -> list[str]:
    """The lines about the whole schedule."""
    hours, chip_hours = (f"{low:,.1f} to {high:,.1f}" for low, high in (bill.hours, bill.chip_hours))
    lines = [
        f"  whole schedule {bill.steps:,} steps, {bill.tokens:,} tokens: {chip_hours} chip-hours, {hours} hours on"
        f" {chips} chips",
        f"                 from the bound to the bound / {bill.efficiency:.2%} ({bill.efficiency_source})",
    ]
    if bill.cost is not None:
        low, high = bill.cost
        lines.append(
            f"  price          USD {low:,.0f} to {high:,.0f} at USD {bill.price_per_chip_hour:g} per chip-hour"
        )
    return lines


def _advice(result: CompileResult) -> str:
    match result.what:
        case "train":
            return result.suggestion or "fewer rows, or remat: no slice of this chip holds it"
        case "sample":
            return "a smaller --batch, or a mesh with a larger fsdp or tensor axis"
        case _:
            assert_never(result.what)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

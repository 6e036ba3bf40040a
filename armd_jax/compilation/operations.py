"""Where a training step's time goes, by kind of operation: from a trace of `jax.profiler`, or else from the program."""

import copy
import dataclasses
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from armd_jax.compilation import compile as compiling
from armd_jax.compilation import costs
from armd_jax.compilation.hlo import Instruction, Program
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.training import sharding

# Where XLA's profilers for TPU put operations; other profilers mark each operation by a statistic.
_OPERATIONS_LINE = "XLA Ops"


@dataclasses.dataclass(frozen=True)
class Traced:
    """The operations of one kind in a trace, over all devices and traced steps.

    seconds: without what other operations inside them took, such as those of a loop. share: of the time of all.
    """

    kind: str
    count: int
    seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The instructions of one kind (HLO opcode) in the program of one device, as often as they run in a step.

    flops: of matrix products. bytes: read from and written to memory, by instructions outside fusions.
    """

    kind: str
    count: int
    flops: float
    bytes: float


# --- from a trace -----------------------------------------------------------------------------------------------------


def traced(file: pathlib.Path) -> list[Traced]:
    """The operations in a `.xplane.pb` file, the kind that took longest first.

    The kind is the category that the profiler names, or else the name of the operation without its number.
    Raises UserError if the file is no trace, or has no operations of a device.
    """
    try:
        data = jax.profiler.ProfileData.from_file(str(file))
        planes = [(plane.name, list(plane.lines)) for plane in data.planes]
        devices = [plane for plane in planes if plane[0].startswith("/device:")]
        found = _by_kind(devices) or _by_kind(planes)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: cannot be read as a trace: {reason}") from error
    if not found:
        raise UserError(f"{file}: the trace has no operations in it; trace again, with more steps")
    total = sum(seconds for _, seconds in found.values()) or 1.0
    rows = [Traced(kind, count, seconds, seconds / total) for kind, (count, seconds) in found.items()]
    return sorted(rows, key=lambda row: (-row.seconds, row.kind))


def _by_kind(planes: Iterable[tuple[str, list[Any]]]) -> dict[str, tuple[int, float]]:
    """(count, seconds) of each kind."""
    counts: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for _, lines in planes:
        own = [line for line in lines if line.name == _OPERATIONS_LINE]
        for line in own or lines:
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if own or "hlo_op" in stats:
                    events.append((event.start_ns, event.duration_ns, kind_of(event.name, stats)))
            for kind, nanoseconds in own_time(events):
                counts[kind] += 1
                seconds[kind] += nanoseconds / 1e9
    return {kind: (counts[kind], seconds[kind]) for kind in counts}


def kind_of(name: str, stats: Mapping[str, Any]) -> str:
    """The kind of an operation: its category, or its name without `%`, without its type and without numbers."""
    if category := stats.get("hlo_category"):
        return str(category)
    plain = str(stats.get("hlo_op") or name).partition(" = ")[0].lstrip("%")
    return re.sub(r"(\.clone|\.remat\d*|\.\d+)+$", "", plain) or plain


def own_time(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """(kind, nanoseconds) of each event of one line, without those of the events inside it.

    events: (start, duration, kind). Of events that begin together, the longer one is outside.
    """
    open_events: list[list[Any]] = []  # [end, kind, own nanoseconds], the innermost last
    for start, duration, kind in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            _, ended, left = open_events.pop()
            yield ended, max(left, 0.0)
        if open_events:
            open_events[-1][2] -= duration
        open_events.append([start + duration, kind, duration])
    for _, ended, left in reversed(open_events):
        yield ended, max(left, 0.0)


# --- from the program -------------------------------------------------------------------------------------------------


class _OfOneKind(Program):
    """A program in which only the instructions of one opcode run, for those who add up costs of what runs."""

    def __init__(self, whole: Program, opcode: str) -> None:
        self.__dict__.update(copy.copy(whole.__dict__))
        self.__dict__["fused"] = whole.fused  # found from all that runs
        self._opcode = opcode

    def running(self) -> Iterator[tuple[str, Instruction, float]]:
        """The instructions of the opcode alone."""
        return (one for one in super().running() if one[1].opcode == self._opcode)


def of_program(program: Program) -> list[Compiled]:
    """What the instructions of a program cost, the kind that moves most first; those that cost nothing are left out."""
    counts: dict[str, float] = defaultdict(float)
    for name, instruction, runs in program.running():
        if name not in program.fused or instruction.opcode in ("dot", "convolution"):
            counts[instruction.opcode] += runs
    rows = []
    for opcode, count in counts.items():
        part = _OfOneKind(program, opcode)
        rows.append(Compiled(opcode, round(count), costs.product_flops(part), costs.hbm_traffic(part)))
    return sorted((row for row in rows if row.flops or row.bytes), key=lambda row: (-row.bytes, -row.flops, row.kind))


def of_step(config: Config) -> list[Compiled]:
    """`of_program` of the training step, compiled for the devices of this machine.

    Raises UserError if the mesh of the config does not fit them.
    """
    config = compiling.assumed_vocabulary(config)
    text = compiling.lower_train_step(config, sharding.make_mesh(config.mesh)).compile().as_text()
    if text is None:
        raise UserError("the compiler of this machine shows no text of its programs, so nothing is known of their cost")
    return of_program(Program(text))

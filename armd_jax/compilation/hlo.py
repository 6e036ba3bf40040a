"""What a compiled program does, read from its HLO text: collectives, kernels, matrix products, memory traffic.

The text is that of one device. An instruction inside a loop is counted once an iteration where the text says how many
there are (`known_trip_count`, or a condition that compares the counter with a constant, from where the counter starts),
else once; of the branches of a conditional every one is counted.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
# Instructions that move nothing themselves.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "async-start",
    "async-update",
    "async-done",
    "recv-done",
    "send-done",
}
# What a fusion passes on without reading: buffers updated in place, collectives under way.
_IN_PLACE = {"dynamic-update-slice", "tuple", "custom-call", *COLLECTIVES}
_SLICES = {"dynamic-slice", "slice", "gather"}
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16, "token": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: elements, bytes, and whether it lies in HBM (not in a memory space on the core)."""

    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # everything after the operands
    is_root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.type)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. bytes: of the whole array on a device (gathered, or before it is scattered).

    shapes: of what the instruction returns; of one that only starts, of its operands too.
    """

    kind: str
    bytes: int
    group: int  # devices that take part together
    crosses_slices: bool
    times: int
    computation: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in a run of the program, by the ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "send": 1.0}.get(self.kind, share)
        return self.times * factor * self.bytes


def arrays(text: str) -> list[Array]:
    """The arrays that a type names, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in dims.split(",") if size)
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 1)
        found.append(Array(shape, math.ceil(math.prod(shape) * width), "S(" not in layout))
    return found


class Program:
    """A parsed HLO module."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                operands, attributes = _split_operands(match[4])
                root = line.lstrip().startswith("ROOT ")
                current.append(Instruction(match[1], match[2], match[3], operands, attributes, root))
            elif current and line.startswith("}}"):  # attributes that hold a line break go on
                current[-1] = dataclasses.replace(current[-1], attributes=current[-1].attributes + line)
        self.times = self._times()

    @property
    def num_instructions(self) -> int:
        return sum(len(body) for body in self.computations.values())

    @functools.cached_property
    def _types(self) -> dict[str, dict[str, list[Array]]]:
        return {name: {i.name: i.arrays for i in body} for name, body in self.computations.items()}

    def _times(self) -> dict[str, int]:
        """How often each computation runs."""
        times: dict[str, int] = defaultdict(int)

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations.get(name, ()):
                trips = self._trips(name, instruction) if instruction.opcode == "while" else 1
                for callee in called(instruction):
                    visit(callee, count * trips)

        visit(self.entry, 1)
        return dict(times)

    def _trips(self, computation: str, loop: Instruction) -> int:
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        body = self.computations.get(condition[1], []) if condition else []
        compared = [i for i in body if i.is_root and i.opcode == "compare" and "direction=LT" in i.attributes]
        if not compared:
            return 1
        limit = _constants(body).get(compared[0].operands[1], 1)
        return max(limit - self._first(computation, loop, body, compared[0].operands[0]), 1)

    def _first(self, computation: str, loop: Instruction, condition: list[Instruction], counter: str) -> int:
        """What a loop's counter starts at: 0, or the rounds that the compiler took out in front of the loop."""
        outside = self.computations[computation]
        index = next((re.search(r"index=(\d+)", i.attributes) for i in condition if i.name == counter), None)
        state = next((i for i in outside if i.name == loop.operands[0] and i.opcode == "tuple"), None)
        if index is None or state is None:
            return 0
        value, copies = state.operands[int(index[1])], {i.name: i for i in outside if i.opcode in ("copy", "bitcast")}
        while value in copies:
            value = copies[value].operands[0]
        return _constants(outside).get(value, 0)

    def _fused(self) -> set[str]:
        """Computations inside fusions: what they pass on stays on the core."""
        return {callee for _, i, _ in self.running() if i.opcode == "fusion" for callee in called(i)}

    def running(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that runs, with its computation and how often."""
        for name, times in self.times.items():
            for instruction in self.computations.get(name, ()):
                yield name, instruction, times

    # --- what it does ---------------------------------------------------------------------------------------------

    def collectives(self, chips_a_slice: int) -> list[Collective]:
        """Every collective; devices are numbered slice by slice."""
        found, fused, seen = [], self._fused(), set()
        for name, instruction, times in self.running():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or (kind == "send" and "is_host_transfer=true" not in instruction.attributes):
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if name in fused and channel:
                # An asynchronous collective is spread over several fusions, each of which names it.
                if channel[1] in seen:
                    continue
                seen.add(channel[1])
            if kind == "all-reduce" and any(
                i.opcode == "dynamic-slice" for i in self.computations[name] if name in fused
            ):
                kind = "reduce-scatter"  # of which each device keeps its part at once
            members = _group(instruction.attributes)
            group = len(members) or 2
            sizes = [array.bytes for array in instruction.arrays]
            if instruction.opcode.endswith("-start") or kind == "send":  # a tuple of operand and result
                size = max(sizes)
            else:
                size = sum(sizes) * (group if instruction.opcode == "reduce-scatter" else 1)
            crosses = kind == "send" or len({member // chips_a_slice for member in members}) > 1
            shapes = tuple(array.shape for array in instruction.arrays)
            found.append(Collective(kind, size, group, crosses, times, name, shapes))
        return found

    def kernels(self) -> dict[str, int]:
        """Runs of every Pallas kernel, by its name in the program's metadata."""
        counts: dict[str, int] = defaultdict(int)
        for _, instruction, times in self.running():
            if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
                counts[kernel_name(instruction)] += times
        return dict(counts)

    def product_flops(self) -> float:
        """FLOPs of all matrix products outside kernels; a multiply-add is two."""
        total = 0.0
        for name, instruction, times in self.running():
            if instruction.opcode in ("dot", "convolution"):
                left, right = (self._types[name][operand][0].shape for operand in instruction.operands[:2])
                total += times * _product_flops(instruction, left, right)
        return total

    def hbm_traffic(self) -> float:
        """Bytes read from and written to HBM: operands and results of everything that runs outside fusions.

        A slice read out of a large array, or written into one, counts as the slice.
        """
        fused, total = self._fused(), 0.0
        for name, instruction, times in self.running():
            if name not in fused and instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                total += times * self._moved(name, instruction)
        return total

    def _moved(self, computation: str, instruction: Instruction) -> int:
        types = self._types[computation]
        operands = [types.get(name, []) for name in instruction.operands]
        if instruction.opcode in _SLICES:
            return 2 * _in_hbm(instruction.arrays)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _in_hbm(operands[1 if instruction.opcode == "dynamic-update-slice" else -1])
        if instruction.opcode.removesuffix("-start") in (*COLLECTIVES, "copy"):  # its type names source and target
            return _in_hbm(instruction.arrays) + (
                0 if instruction.opcode.endswith("-start") else _in_hbm(sum(operands, []))
            )
        if instruction.opcode != "fusion":
            return _in_hbm(instruction.arrays) + sum(_in_hbm(operand) for operand in operands)
        body = self.computations.get(next(iter(called(instruction)), ""), [])
        return self._fusion_moved(body, instruction, operands)

    def _fusion_moved(self, body: list[Instruction], fusion: Instruction, operands: list[list[Array]]) -> int:
        by_name = {inner.name: inner for inner in body}
        users: dict[str, list[Instruction]] = defaultdict(list)
        for inner in body:
            for operand in inner.operands:
                if inner.opcode not in _SLICES or operand == inner.operands[0]:  # not as an index
                    users[operand].append(inner)

        def through(name: str) -> list[Instruction]:
            """What uses a value, bitcasts looked through."""
            found = []
            for user in users[name]:
                found += through(user.name) if user.opcode == "bitcast" else [user]
            return found

        total = 0
        parameters = {int(inner.attributes or 0): inner for inner in body if inner.opcode == "parameter"}
        for number, operand in enumerate(operands):
            reads = through(parameters[number].name) if number in parameters else []
            if reads and all(read.opcode in _SLICES for read in reads):
                total += sum(_hbm_like(operand, read.arrays) for read in reads)
            elif not all(read.opcode in _IN_PLACE for read in reads):
                total += _in_hbm(operand)
        root = next((inner for inner in body if inner.is_root), None)
        results = root.operands if root and root.opcode == "tuple" else [root.name] if root else []
        for name, array in zip(results, fusion.arrays, strict=False):
            made = by_name.get(name)
            while made and made.opcode == "bitcast":
                made = by_name.get(made.operands[0])
            if made and made.opcode == "dynamic-update-slice":
                total += _hbm_like([array], by_name[made.operands[1]].arrays)
            elif not (made and made.opcode in ("parameter", *_IN_PLACE)):
                total += _in_hbm([array])
        return total


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; the scalar functions of reductions are left out."""
    if instruction.opcode in ("reduce", "reduce-window", "sort", "scatter", "map", "select-and-scatter"):
        return []
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return []
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def kernel_name(instruction: Instruction) -> str:
    """The name a Pallas kernel was given, or where in the program it was called."""
    name = re.search(r'kernel_name"?[:=]\s*"?([\w.\-]+)', instruction.attributes)
    if name:
        return name[1]
    where = re.search(r'op_name="([^"]*)"', instruction.attributes)
    parts = [part for part in where[1].split("/") if part != "pallas_call"] if where else []
    return parts[-1] if parts else "tpu_custom_call"


def _split_operands(rest: str) -> tuple[tuple[str, ...], str]:
    """Operand names, and the text after the closing parenthesis (for a parameter: its number)."""
    depth, end = 1, len(rest)
    for index, char in enumerate(rest):
        depth += (char in "({") - (char in ")}")
        if depth == 0:
            end = index
            break
    inside, attributes = rest[:end], rest[end + 1 :].lstrip(", ")
    if inside.isdigit():
        return (), inside
    return tuple(re.findall(r"%([\w.\-]+)", inside)), attributes


def _constants(body: list[Instruction]) -> dict[str, int]:
    """The integers among the constants, by name."""
    return {i.name: int(i.attributes) for i in body if i.opcode == "constant" and i.attributes.isdigit()}


def _group(attributes: str) -> list[int]:
    """Device numbers of the first group of a collective."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return _numbers(listed[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, dims, order = (_numbers(part) for part in iota.groups())
        return _iota(dims, order).reshape(groups)[0].tolist()
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}", attributes)
    if not axes:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
    strides = dict(zip(sizes, np.cumprod([1, *reversed(sizes.values())])[-2::-1].tolist(), strict=True))
    members = np.zeros(1, int)
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes[3]):
        count = int(part) if part else sizes[name]
        step = strides[name] * sizes[name] // (int(before or 1) * count)
        members = np.add.outer(members, step * np.arange(count)).ravel()
    return _mesh_devices(axes[2], math.prod(sizes.values()))[members].tolist()


def _mesh_devices(text: str | None, count: int) -> np.ndarray:
    """The devices of a mesh in row-major order: listed (`0,2,1,3`), transposed (`[2,2]T(1,0)`), or simply counted."""
    if transposed := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text or ""):
        return _iota(*(_numbers(part) for part in transposed.groups()))
    return np.asarray(_numbers(text)) if text else np.arange(count)


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    return np.arange(math.prod(dims)).reshape(dims).transpose(order or None).ravel()


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]


def _in_hbm(found: list[Array]) -> int:
    return sum(array.bytes for array in found if array.in_hbm)


def _hbm_like(operand: list[Array], slices: list[Array]) -> int:
    return sum(array.bytes for array in slices) if operand and operand[0].in_hbm else 0


def _product_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    out = math.prod(instruction.arrays[0].shape)
    if instruction.opcode == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return 2.0 * out * math.prod(left[int(n)] for n in contracting[1].split(",") if n)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    inputs, kernel, outputs = labels.groups()
    flops = 2.0 * out * right[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in sorted(set(kernel) - set("io")):
        sizes = (left[inputs.index(axis)], right[kernel.index(axis)], instruction.arrays[0].shape[outputs.index(axis)])
        flops *= _valid_taps(*sizes, fields, int(axis)) / sizes[2]
    return flops


def _valid_taps(size: int, taps: int, out: int, fields: dict[str, str], axis: int) -> int:
    """Products of a kernel tap with a real input element along one axis of a convolution (padding gives none)."""

    def field(name: str, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    stride, low = int(field("stride", "1")), int(field("pad", "0_0").split("_")[0])
    lhs, rhs = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    return sum(
        (at := position * stride - low + tap * rhs) % lhs == 0 and 0 <= at // lhs < size
        for position in range(out)
        for tap in range(taps)
    )

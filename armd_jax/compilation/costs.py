"""The work of a compiled program on one device: its kernels, the FLOPs of its matrix products, its memory traffic."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from armd_jax import typed
from armd_jax.compilation.hlo import Array, CollectiveKind, Instruction, Program, called, collective_kind

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
# Instructions whose operand a fusion passes on without reading it: buffers updated in place, collectives under way.
_IN_PLACE = {"dynamic-update-slice", "tuple", "custom-call", *typed.choices(CollectiveKind)}
_SLICES = {"dynamic-slice", "slice", "gather"}


def kernels(program: Program) -> dict[str, float]:
    """How often every Pallas kernel runs, by its name in the program's metadata."""
    runs_by_name: dict[str, float] = defaultdict(float)
    for _, instruction, runs in program.running():
        if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
            runs_by_name[kernel_name(instruction)] += runs
    return dict(runs_by_name)


def kernel_name(instruction: Instruction) -> str:
    """The name that a Pallas kernel was given; if it has none, the name of the function that called it."""
    name = re.search(r'kernel_name"?[:=]\s*"?([\w.\-]+)', instruction.attributes)
    if name:
        return name[1]
    path = re.search(r'op_name="([^"]*)"', instruction.attributes)
    parts = [part for part in path[1].split("/") if part != "pallas_call"] if path else []
    return parts[-1] if parts else "tpu_custom_call"


# --- matrix products ------------------------------------------------------------------------------------------------


def product_flops(program: Program) -> float:
    """FLOPs of all matrix products outside kernels. A multiplication with its addition is two."""
    total = 0.0
    for name, instruction, runs in program.running():
        if instruction.opcode not in ("dot", "convolution"):
            continue
        left, right = (program.types[name][operand][0].shape for operand in instruction.operands[:2])
        out = instruction.arrays[0].shape
        flops = _dot_flops if instruction.opcode == "dot" else _convolution_flops
        total += runs * flops(instruction.attributes, left, right, out)
    return total


def _dot_flops(attributes: str, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> float:
    del right
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    summed = [left[int(axis)] for axis in contracting[1].split(",") if axis] if contracting else []
    return 2.0 * math.prod(out) * math.prod(summed)


def _convolution_flops(attributes: str, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> float:
    """FLOPs of a matrix product that the compiler has written as a convolution.

    Axes of a batched product become axes of the window, with padding. Taps that fall on padding multiply with zeros,
    which the plain product would not, and are left out.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels, "every convolution names its axes"
    inputs, kernel, outputs = labels.groups()
    flops = 2.0 * math.prod(out) * right[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in sorted(set(kernel) - set("io")):
        sizes = (left[inputs.index(axis)], right[kernel.index(axis)], out[outputs.index(axis)])
        flops *= _valid_taps(*sizes, fields, int(axis)) / sizes[2]
    return flops


def _valid_taps(size: int, taps: int, out: int, fields: dict[str, str], axis: int) -> int:
    """How many products of a kernel tap with a real input element, not with padding, one axis of a window has."""

    def field(name: str, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    stride, low = int(field("stride", "1")), int(field("pad", "0_0").split("_")[0])
    lhs, rhs = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    places = (position * stride - low + tap * rhs for position in range(out) for tap in range(taps))
    return sum(1 for place in places if place % lhs == 0 and 0 <= place // lhs < size)


# --- memory traffic -------------------------------------------------------------------------------------------------


def hbm_traffic(program: Program) -> float:
    """Bytes read from and written to HBM: operands and results of everything that runs outside fusions.

    A slice that is read out of a large array, or written into one, counts as the slice.
    """
    total = 0.0
    for name, instruction, runs in program.running():
        opcode = instruction.opcode
        if name not in program.fused and opcode not in _FREE and not opcode.endswith("-done"):
            total += runs * _moved(program, name, instruction)
    return total


def _moved(program: Program, computation: str, instruction: Instruction) -> int:
    types, opcode = program.types[computation], instruction.opcode
    operands = [types.get(name, []) for name in instruction.operands]
    if opcode in _SLICES:
        return 2 * _in_hbm(instruction.arrays)
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _in_hbm(operands[1 if opcode == "dynamic-update-slice" else -1])
    if opcode == "copy-start" or (opcode.endswith("-start") and collective_kind(opcode)):
        return _in_hbm(instruction.arrays)  # the type of what only begins names both source and target
    if opcode == "fusion":
        body = program.computations.get(next(iter(called(instruction)), ""), [])
        return _moved_by_fusion(body, instruction, operands)
    return _in_hbm(instruction.arrays) + sum(_in_hbm(operand) for operand in operands)


def _moved_by_fusion(body: list[Instruction], fusion: Instruction, operands: list[list[Array]]) -> int:
    """Bytes that a fusion reads and writes: of an operand that it only slices the slices, of others the whole."""
    by_name = {inner.name: inner for inner in body}
    users: dict[str, list[Instruction]] = defaultdict(list)
    for inner in body:
        for operand in inner.operands:
            if inner.opcode not in _SLICES or operand == inner.operands[0]:  # not if it is an index
                users[operand].append(inner)

    def readers(name: str) -> list[Instruction]:
        """The instructions that use a value, directly or through bitcasts."""
        found = []
        for user in users[name]:
            found += readers(user.name) if user.opcode == "bitcast" else [user]
        return found

    total = 0
    parameters = {int(inner.attributes or 0): inner for inner in body if inner.opcode == "parameter"}
    for number, arrays in enumerate(operands):
        reads = readers(parameters[number].name) if number in parameters else []
        if reads and all(read.opcode in _SLICES for read in reads):
            total += sum(_hbm_like(arrays, read.arrays) for read in reads)
        elif not all(read.opcode in _IN_PLACE for read in reads):
            total += _in_hbm(arrays)
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


def _in_hbm(arrays: list[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _hbm_like(whole: list[Array], slices: list[Array]) -> int:
    """Bytes of slices of an array, if that array is in HBM. The slices themselves may be on the core."""
    return sum(array.bytes for array in slices) if whole and whole[0].in_hbm else 0

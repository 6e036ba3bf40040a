"""What devices send to one another: the collective instructions of a compiled program, with their bytes and groups."""

import dataclasses
import math
import re
from typing import assert_never

import numpy as np

from armd_jax.compilation.hlo import CollectiveKind, Instruction, Program, collective_kind


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    bytes: of the whole array on a device, that is after it is gathered, or before it is scattered.
    group: number of devices that take part together. crosses_slices: whether a group has devices of several slices.
    runs: how often the instruction runs on average. computation: the one that holds the instruction.
    shapes: of the arrays that the instruction returns, and of its operands too if it only begins the collective.
    """

    kind: CollectiveKind
    bytes: int
    group: int
    crosses_slices: bool
    runs: float
    computation: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one run of the program, if the ring algorithms are used."""
        share = (self.group - 1) / self.group
        match self.kind:
            case "all-gather" | "reduce-scatter" | "all-to-all":
                factor = share
            case "all-reduce":  # a reduce-scatter, and then an all-gather
                factor = 2 * share
            case "collective-permute" | "send":
                factor = 1.0
            case _:
                assert_never(self.kind)
        return self.runs * factor * self.bytes


def find(program: Program, chips_per_slice: int) -> list[Collective]:
    """Every collective of a program. Devices are numbered slice by slice."""
    found: list[Collective] = []
    seen: set[str] = set()
    for name, instruction, runs in program.running():
        opcode, fused = instruction.opcode, name in program.fused
        kind = collective_kind(opcode)
        # What one slice sends to another goes through the hosts. No other send is counted.
        if kind is None or (opcode == "send" and "is_host_transfer=true" not in instruction.attributes):
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if fused and channel:
            # An asynchronous collective is spread over several fusions, and each of them names it.
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        if fused and opcode.startswith("all-reduce") and _has_slice(program.computations[name]):
            kind = "reduce-scatter"  # each device keeps only its part of the sum
        members = _first_group(instruction.attributes)
        group = len(members) or 2
        sizes = [array.bytes for array in instruction.arrays]
        if opcode.endswith("-start") or opcode == "send":  # the type is a tuple of operand and result
            size = max(sizes)
        else:
            size = sum(sizes) * (group if opcode == "reduce-scatter" else 1)
        crosses = opcode == "send" or len({member // chips_per_slice for member in members}) > 1
        shapes = tuple(array.shape for array in instruction.arrays)
        found.append(Collective(kind, size, group, crosses, runs, name, shapes))
    return found


def _has_slice(body: list[Instruction]) -> bool:
    return any(instruction.opcode == "dynamic-slice" for instruction in body)


def _first_group(attributes: str) -> list[int]:
    """Device numbers of the first group of a collective, which may be written in three ways.

    As lists (`{{0,1},{2,3}}`), as a numbering that is reshaped and transposed (`[2,2]<=[2,2]T(1,0)`), or as axes of a
    mesh (`mesh['a'=2,'b'=2] {'b'}`). Empty if there is none.
    """
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
    # An axis may be split: 'a':(2)4 is the part of size 4 of axis a that has a part of size 2 before it.
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes[3]):
        count = int(part) if part else sizes[name]
        step = strides[name] * sizes[name] // (int(before or 1) * count)
        members = np.add.outer(members, step * np.arange(count)).ravel()
    return _mesh_devices(axes[2], math.prod(sizes.values()))[members].tolist()


def _mesh_devices(text: str | None, count: int) -> np.ndarray:
    """The devices of a mesh in row-major order: listed (`0,2,1,3`), transposed (`[2,2]T(1,0)`), or 0, 1, 2 …"""
    if transposed := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text or ""):
        return _iota(*(_numbers(part) for part in transposed.groups()))
    return np.asarray(_numbers(text)) if text else np.arange(count)


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    """0, 1, 2 … in the shape `dims`, transposed by `order` if it is not empty, and flattened."""
    return np.arange(math.prod(dims)).reshape(dims).transpose(order or None).ravel()


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]

"""A compiled program, parsed from its HLO text: computations, instructions, and how often each of them runs.

The text is the program of one device. What runs inside a loop is counted once per iteration if the text tells the
number of iterations: either directly (`known_trip_count`), or because the loop's condition compares a counter with a
constant. The iterations are then those from the counter's first value on.

Two cases are not known from the text. A loop whose number of iterations depends on data counts as often as the caller
expects; if the caller does not know either, it counts once and is listed in `Program.unknown_loops`, because everything
that is derived from the counts is then too little. Of a conditional, one branch runs, and the text does not tell which:
each of its b branches counts 1 / b times, which makes the mean over the branches. That is what a step does on average
if all branches are taken equally often, as those for the numbers of streams of strided orders are.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal, TypeGuard

from armd_jax import typed

CollectiveKind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send"]

# Bytes per element if they do not follow from the number of bits in the type's name. A token holds no data.
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "token": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type.

    bytes: its size. in_hbm: whether it is stored in HBM, and not in a memory on the core.
    """

    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    type: the type of the result, as text. operands: names of other instructions of the same computation. attributes:
    everything after the operands; of a parameter its number, and of a constant its value.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The arrays of the result, tuples flattened."""
        return arrays(self.type)


def no_expectation(loop: Instruction) -> float | None:
    """Nothing is known of a loop beyond the program's text."""
    del loop
    return None


class Program:
    """A parsed HLO module.

    computations: the instructions of each, by name. entry: the computation that the program starts with. runs: how
    often each computation runs on average (the module's docstring says how loops and conditionals count).
    unknown_loops: names of the loops that run and whose number of iterations is not known.
    """

    def __init__(self, text: str, iterations: Callable[[Instruction], float | None] = no_expectation) -> None:
        """Parses a text.

        iterations: of a loop of which the text does not tell how often it runs, the expected number; None: unknown.
        """
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
            elif current and line.startswith("}}"):  # attributes that contain a line break continue here
                current[-1] = dataclasses.replace(current[-1], attributes=current[-1].attributes + line)
        self.unknown_loops: list[str] = []
        self.runs = self._count_runs(iterations)

    @property
    def num_instructions(self) -> int:
        """Instructions in the text, each counted once."""
        return sum(len(body) for body in self.computations.values())

    @functools.cached_property
    def types(self) -> dict[str, dict[str, list[Array]]]:
        """The arrays of every result, by computation and instruction."""
        return {name: {i.name: i.arrays for i in body} for name, body in self.computations.items()}

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations inside fusions. What their instructions pass to one another stays on the core."""
        return {callee for _, i, _ in self.running() if i.opcode == "fusion" for callee in called(i)}

    def running(self) -> Iterator[tuple[str, Instruction, float]]:
        """Every instruction that runs: (computation, instruction, number of runs)."""
        for name, runs in self.runs.items():
            for instruction in self.computations.get(name, ()):
                yield name, instruction, runs

    def _count_runs(self, iterations: Callable[[Instruction], float | None]) -> dict[str, float]:
        runs: dict[str, float] = defaultdict(float)

        def times(name: str, instruction: Instruction) -> float:
            """How often one run of an instruction runs each computation that it calls."""
            if instruction.opcode == "conditional":
                return 1 / max(len(called(instruction)), 1)
            if instruction.opcode != "while":
                return 1.0
            known = self._trips(name, instruction)
            trips = iterations(instruction) if known is None else known
            if trips is None and instruction.name not in self.unknown_loops:
                self.unknown_loops.append(instruction.name)
            return 1.0 if trips is None else trips

        def visit(name: str, count: float) -> None:
            runs[name] += count
            for instruction in self.computations.get(name, ()):
                if callees := called(instruction):
                    factor = times(name, instruction)
                    for callee in callees:
                        visit(callee, count * factor)

        visit(self.entry, 1)
        return dict(runs)

    def _trips(self, computation: str, loop: Instruction) -> int | None:
        """Iterations of a loop; None if the text does not tell their number."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        body = self.computations.get(condition[1], []) if condition else []
        compared = next((i for i in body if i.is_root and i.opcode == "compare"), None)
        if compared is None or "direction=LT" not in compared.attributes:
            return None
        limit = _constants(body).get(compared.operands[1])
        if limit is None:
            return None
        return max(limit - self._first_value(computation, loop, body, compared.operands[0]), 1)

    def _first_value(self, computation: str, loop: Instruction, condition: list[Instruction], counter: str) -> int:
        """The value that a loop's counter starts from.

        It is 0, or the number of iterations that the compiler has moved out of the loop and in front of it.
        """
        outside = self.computations[computation]
        index = next((re.search(r"index=(\d+)", i.attributes) for i in condition if i.name == counter), None)
        state = next((i for i in outside if i.name == loop.operands[0] and i.opcode == "tuple"), None)
        if index is None or state is None:
            return 0
        value, copies = state.operands[int(index[1])], {i.name: i for i in outside if i.opcode in ("copy", "bitcast")}
        while value in copies:
            value = copies[value].operands[0]
        return _constants(outside).get(value, 0)


def arrays(text: str) -> list[Array]:
    """The arrays that a type names, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in dims.split(",") if size)
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 1)
        # A layout with S(1) or the like names a memory space other than HBM.
        found.append(Array(shape, math.ceil(math.prod(shape) * width), "S(" not in layout))
    return found


def collective_kind(opcode: str) -> CollectiveKind | None:
    """The kind of collective that an opcode performs, or begins if it ends in -start. None for other opcodes."""
    name = opcode.removesuffix("-start")
    return name if _is_collective(name) else None


def _is_collective(name: str) -> TypeGuard[CollectiveKind]:
    return name in typed.choices(CollectiveKind)


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; the scalar functions of reductions are left out."""
    if instruction.opcode in ("reduce", "reduce-window", "sort", "scatter", "map", "select-and-scatter"):
        return []
    if collective_kind(instruction.opcode):
        return []
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def _split_operands(rest: str) -> tuple[tuple[str, ...], str]:
    """Operand names, and the text after the closing parenthesis.

    The number of a parameter and the value of a constant stand between the parentheses, but are attributes here.
    """
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

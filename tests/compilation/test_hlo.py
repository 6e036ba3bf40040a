"""Parsing a compiled program's text: types of arrays, and how often each computation runs."""

import pytest

from armd_jax import typed
from armd_jax.compilation.hlo import CollectiveKind, Program, arrays, collective_kind

# Makes the counter of the loop start from 1.
MOVED = """
  %one = s32[]{:T(128)} constant(1)
  %begin.1 = s32[]{:T(128)} copy(%one)
  %from1 = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[12,128,128]{2,1,0}) tuple(%begin.1, %c, %c)
"""


def test_types():
    """Shapes, bytes and memory spaces of a type, tuples flattened."""
    found = arrays("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:T(256)S(1)}, pred[], s8[5,1]{1,0})")
    assert [a.shape for a in found] == [(2, 3), (4,), (), (5, 1)]
    assert [a.bytes for a in found] == [24, 8, 1, 5]
    assert [a.in_hbm for a in found] == [True, False, True, True]
    assert [a.bytes for a in arrays("(c64[2], c128[2], s4[3], u4[3], f8e4m3fn[2], token[])")] == [16, 32, 3, 3, 2, 0]


def test_loops_count_their_iterations(program, program_text):
    """The body of a loop, and what the body calls, run as often as the loop's condition says."""
    assert program.entry == "main" and program.runs["main"] == 1
    assert program.runs["body"] == program.runs["product"] == 12
    later = program_text.replace("while(%a)", "while(%from1)").replace("  %loop =", MOVED + "  %loop =")
    assert Program(later).runs["product"] == 11  # the compiler moved the first iteration out of the loop
    known = program_text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Program(known).runs["product"] == 5


@pytest.mark.parametrize("change", [("direction=LT", "direction=NE"), ("constant(12)", "copy(%i.1)")])
def test_unknown_loops_are_named(program, program_text, change):
    """A loop whose iterations the text does not tell counts as often as the caller expects, else once, and is named."""
    unknown = program_text.replace(*change)
    assert Program(unknown).runs["product"] == 1 and Program(unknown).unknown_loops == ["loop"]
    expected = Program(unknown, lambda loop: 1.5 if loop.name == "loop" else None)
    assert expected.runs["product"] == 1.5 and expected.unknown_loops == program.unknown_loops == []
    assert Program(program_text, lambda _: 1.5).runs["product"] == 12  # what the text tells counts


def test_a_conditional_is_the_mean_of_its_branches(program_text):
    """Each of two branches counts half."""
    conditional = program_text.replace(
        "while(%a), condition=%condition, body=%body", "conditional(%c, %a, %a), branch_computations={%body, %other}"
    )
    found = Program(conditional)
    assert found.runs["body"] == found.runs["other"] == found.runs["product"] == 0.5
    assert found.unknown_loops == [] and found.runs["main"] == 1


@pytest.mark.parametrize("kind", typed.choices(CollectiveKind))
def test_collectives_are_known_by_their_opcodes(kind):
    """Each kind is an opcode, and with -start the opcode that begins it. Its end is not counted again."""
    assert collective_kind(kind) == collective_kind(f"{kind}-start") == kind
    assert collective_kind(f"{kind}-done") is None


def test_instructions_are_counted_once(program, program_text):
    """The number of instructions in the text does not depend on how often they run."""
    assert program.num_instructions == program_text.count(" = ")

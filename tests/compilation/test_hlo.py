"""Reading a compiled program's text: counts and bytes of a program small enough to do by hand."""

import pytest

from armd_jax.compilation.hlo import Collective, Program, arrays, kernel_name

# Four devices. A loop of 12 rounds: gather 4 x [8, 128] bf16, multiply with a [128, 128] slice of stacked weights,
# call a kernel; then one asynchronous gather over three fusions, a fused reduce-scatter, and an all-reduce.
TEXT = """
HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%product (p0: bf16[32,128], p1: bf16[12,128,128], p2: s32[]) -> bf16[32,128] {
  %p0 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[12,128,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %layer = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,128,128}
  %weights = bf16[128,128]{1,0:T(8,128)(2,1)} bitcast(%layer)
  ROOT %dot.1 = bf16[32,128]{1,0:T(8,128)(2,1)} convolution(%p0, %weights), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[8,128], bf16[12,128,128])) -> (s32[], bf16[8,128], bf16[12,128,128]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[12,128,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %h = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %w = bf16[12,128,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %all = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%h), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %out = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%all, %w, %i), kind=kOutput, calls=%product
  %kernel.3 = (f32[2,512,128], bf16[8,128]{:S(1)}) custom-call(%out), custom_call_target="tpu_custom_call", about={m={
"xprof_metadata": "{}"
}}, metadata={op_name="jit(step)/while/body/splash_mha_fwd_residuals/pallas_call"}
  %next = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%kernel.3), index=1
  ROOT %carry = (s32[], bf16[8,128], bf16[12,128,128]) tuple(%i, %next, %w)
}

%condition (state.1: (s32[], bf16[8,128], bf16[12,128,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[12,128,128]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %layers = s32[]{:T(128)} constant(12)
  ROOT %more = pred[]{:T(512)} compare(%i.1, %layers), direction=LT
}

%start (q0: f32[16]) -> (f32[16], f32[64]) {
  %q0 = f32[16]{0:T(128)} parameter(0)
  %gather.1 = f32[64]{0} all-gather(%q0), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
  ROOT %begin = (f32[16]{0:T(128)}, f32[64]{0:T(128)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%end (r0: f32[16], r1: f32[64]) -> f32[64] {
  %r0 = f32[16]{0:T(128)} parameter(0)
  %r1 = f32[64]{0:T(128)} parameter(1)
  %gather.2 = f32[64]{0} all-gather(%r0), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
  ROOT %done = f32[64]{0:T(128)} custom-call(%r0, %r1, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%scatter (s0: f32[64], s1: s32[]) -> f32[32] {
  %s0 = f32[64]{0:T(128)} parameter(0)
  %s1 = s32[]{:T(128)} parameter(1)
  %all-reduce.1 = f32[64]{0:T(128)} all-reduce(%s0), channel_id=8, replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %mine = f32[32]{0:T(128)} dynamic-slice(%all-reduce.1, %s1), dynamic_slice_sizes={32}
}

ENTRY %main (a: (s32[], bf16[8,128], bf16[12,128,128]), b: f32[16], c: s32[]) -> f32[32] {
  %a = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[12,128,128]{2,1,0}) parameter(0)
  %b = f32[16]{0:T(128)} parameter(1)
  %c = s32[]{:T(128)} parameter(2)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[12,128,128]{2,1,0}) while(%a), condition=%condition, body=%body
  %first = (f32[16]{0:T(128)}, f32[64]{0:T(128)}) fusion(%b), kind=kCustom, calls=%start
  %left = f32[16]{0:T(128)} get-tuple-element(%first), index=0
  %right = f32[64]{0:T(128)} get-tuple-element(%first), index=1
  %whole = f32[64]{0:T(128)} fusion(%left, %right), kind=kCustom, calls=%end
  %total = f32[64]{0:T(128)} all-reduce(%whole), channel_id=9, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %part = f32[32]{0:T(128)} fusion(%total, %c), kind=kCustom, calls=%scatter
}
"""
# The same loop, from 1 on.
MOVED = """
  %one = s32[]{:T(128)} constant(1)
  %begin.1 = s32[]{:T(128)} copy(%one)
  %from1 = (s32[]{:T(128)}, bf16[8,128]{1,0}, bf16[12,128,128]{2,1,0}) tuple(%begin.1, %c, %c)
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(TEXT)


def test_types():
    """Shapes, bytes and memory spaces of a type, tuples flattened."""
    found = arrays("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:T(256)S(1)}, pred[], s8[5,1]{1,0})")
    assert [a.shape for a in found] == [(2, 3), (4,), (), (5, 1)]
    assert [a.bytes for a in found] == [24, 8, 1, 5]
    assert [a.in_hbm for a in found] == [True, False, True, True]


def test_loops_count_their_rounds(program):
    """The body runs as often as its condition says, and what it calls with it."""
    assert program.entry == "main" and program.times["main"] == 1
    assert program.times["body"] == program.times["product"] == 12
    later = TEXT.replace("while(%a)", "while(%from1)").replace("  %loop =", MOVED + "  %loop =")
    assert Program(later).times["product"] == 11  # the first round stands in front of the loop
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Program(known).times["product"] == 5


def test_collectives(program):
    """Kind, bytes, group and rounds of each; an asynchronous one counts once, a fused sum-and-slice is a scatter."""
    found = {(c.kind, c.bytes, c.group, c.times) for c in program.collectives(4)}
    assert found == {
        ("all-gather", 32 * 128 * 2, 4, 12),
        ("all-gather", 64 * 4, 4, 1),
        ("all-reduce", 64 * 4, 2, 1),
        ("reduce-scatter", 64 * 4, 2, 1),
    }
    # Slices of two devices: groups {0, 2} reach over them, as do all four; with four a slice none does.
    assert all(c.crosses_slices for c in program.collectives(2))
    assert not any(c.crosses_slices for c in program.collectives(4))


@pytest.mark.parametrize(
    ("groups", "crosses"),
    [
        ("{{0,1},{2,3}}", False),
        ("[2,2]<=[4]", False),
        ("[2,2]<=[2,2]T(1,0)", True),
        ("mesh['a'=2,'b'=2] {'b'}", False),
        ("mesh['a'=2,'b'=2] {'a'}", True),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", False),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", True),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'}", False),
        ("mesh['a'=4] {'a':(1)2}", True),
        ("mesh['a'=4] {'a':(2)2}", False),
    ],
)
def test_groups_of_devices(groups, crosses):
    """Every way of writing that two devices of four work together, in one slice of two or across both."""
    found = Program(TEXT.replace("channel_id=9, replica_groups=[2,2]<=[2,2]T(1,0)", f"replica_groups={groups}"))
    total = next(c for c in found.collectives(2) if c.computation == "main")
    assert (total.group, total.crosses_slices) == (2, crosses)


def test_sent_bytes():
    """Ring algorithms: a gather sends all parts but its own, an all-reduce twice that, a permutation everything."""
    assert Collective("all-gather", 400, 4, False, 3).sent_bytes == 3 * 300
    assert Collective("reduce-scatter", 400, 4, False, 1).sent_bytes == 300
    assert Collective("all-reduce", 400, 4, False, 1).sent_bytes == 600
    assert Collective("collective-permute", 400, 4, False, 2).sent_bytes == 800


def test_kernels_and_products(program):
    """Kernels by name, and the FLOPs of matrix products, each as often as it runs."""
    assert program.kernels() == {"splash_mha_fwd_residuals": 12}
    assert program.product_flops() == 12 * 2 * 32 * 128 * 128
    instruction = next(i for _, i, _ in program.running() if i.opcode == "custom-call" and "kernel" in i.name)
    assert kernel_name(instruction) == "splash_mha_fwd_residuals"


def test_convolutions_count_real_products():
    """A batched product written as a convolution costs what the batched product costs, padding taps nothing."""
    text = """
ENTRY %main (a: bf16[2,64,256,1], b: bf16[2,32,256,1]) -> bf16[2,64,2,32] {
  %a = bf16[2,64,256,1]{2,1,3,0} parameter(0)
  %b = bf16[2,32,256,1]{2,1,0,3} parameter(1)
  ROOT %c = bf16[2,64,2,32]{3,1,2,0} convolution(%a, %b), window={size=1x2 pad=0_0x1_1}, LABELS
}
"""
    text = text.replace("LABELS", "dim_labels=0bf1_1oi0->0b1f")
    assert Program(text).product_flops() == 2 * (2 * 64 * 2 * 32) * 256
    dot = "\nENTRY %main (a: f32[8,4], b: f32[4,6]) -> f32[8,6] {\n  %a = f32[8,4]{1,0} parameter(0)\n"
    dot += "  %b = f32[4,6]{1,0} parameter(1)\n"
    dot += "  ROOT %c = f32[8,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    assert Program(dot).product_flops() == 2 * 8 * 6 * 4


def test_memory_traffic(program):
    """Of stacked weights a layer reads its slice; what stays on the core costs nothing."""
    h, rows, layer = 8 * 128 * 2, 32 * 128 * 2, 128 * 128 * 2
    gather = h  # its result stays on the core
    product = layer + rows
    kernel = rows + 2 * 512 * 128 * 4
    total = 2 * 64 * 4
    scatter = 32 * 4  # what collectives inside fusions read was written a moment before
    condition = 1 + 4 + 4
    expected = 12 * (gather + product + kernel + condition) + total + scatter
    assert program.hbm_traffic() == expected

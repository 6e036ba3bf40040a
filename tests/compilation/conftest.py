"""The text of a compiled program that is small enough to count by hand."""

import pytest

from armd_jax.compilation.hlo import Program

# The program of one of four devices. A loop of 12 iterations gathers 4 x [8, 128] bf16, multiplies the result with a
# [128, 128] slice of stacked weights, and calls a kernel. After the loop come one asynchronous gather over three
# fusions, an all-reduce, and a fused reduce-scatter.
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


@pytest.fixture(scope="session")
def program_text() -> str:
    """The HLO text."""
    return TEXT


@pytest.fixture(scope="session")
def program(program_text: str) -> Program:
    """The parsed text."""
    return Program(program_text)

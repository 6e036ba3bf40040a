"""Kernels, matrix products and memory traffic of programs that are small enough to count by hand."""

from armd_jax.compilation import costs
from armd_jax.compilation.hlo import Program


def test_kernels_and_products(program):
    """Kernels by name, and the FLOPs of matrix products, each as often as it runs."""
    assert costs.kernels(program) == {"splash_mha_fwd_residuals": 12}
    assert costs.product_flops(program) == 12 * 2 * 32 * 128 * 128
    instruction = next(i for _, i, _ in program.running() if i.opcode == "custom-call" and "kernel" in i.name)
    assert costs.kernel_name(instruction) == "splash_mha_fwd_residuals"


def test_convolutions_count_real_products():
    """A batched product that is written as a convolution costs what the product costs: padding adds nothing."""
    text = """
ENTRY %main (a: bf16[2,64,256,1], b: bf16[2,32,256,1]) -> bf16[2,64,2,32] {
  %a = bf16[2,64,256,1]{2,1,3,0} parameter(0)
  %b = bf16[2,32,256,1]{2,1,0,3} parameter(1)
  ROOT %c = bf16[2,64,2,32]{3,1,2,0} convolution(%a, %b), window={size=1x2 pad=0_0x1_1}, LABELS
}
"""
    text = text.replace("LABELS", "dim_labels=0bf1_1oi0->0b1f")
    assert costs.product_flops(Program(text)) == 2 * (2 * 64 * 2 * 32) * 256
    dot = "\nENTRY %main (a: f32[8,4], b: f32[4,6]) -> f32[8,6] {\n  %a = f32[8,4]{1,0} parameter(0)\n"
    dot += "  %b = f32[4,6]{1,0} parameter(1)\n"
    dot += "  ROOT %c = f32[8,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    assert costs.product_flops(Program(dot)) == 2 * 8 * 6 * 4


def test_memory_traffic(program):
    """Of stacked weights, a layer reads its slice. What stays on the core costs nothing."""
    h, rows, layer = 8 * 128 * 2, 32 * 128 * 2, 128 * 128 * 2
    gather = h  # its result stays on the core
    product = layer + rows
    kernel = rows + 2 * 512 * 128 * 4
    total = 2 * 64 * 4
    scatter = 32 * 4  # collectives inside fusions read nothing from HBM: their operands were just written on the core
    condition = 1 + 4 + 4
    expected = 12 * (gather + product + kernel + condition) + total + scatter
    assert costs.hbm_traffic(program) == expected

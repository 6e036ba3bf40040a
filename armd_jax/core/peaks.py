"""Peak rates of accelerators for dense bfloat16 products, by JAX's name of the device (`jax.Device.device_kind`).

The figures for TPUs are those of Google's Cloud TPU documentation (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, section
"System architecture") for one chip, which is one device. Those for GPUs are from NVIDIA's data sheets of A100, H100 and
H200 by form factor, without sparsity. This module needs no JAX.
"""

TPU_FLOPS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
# The first entry whose words all occur in the name counts. Cards for a PCIe slot run at lower clocks than those on
# a board.
_GPU_FLOPS = (
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("H100", "NVL"), 835e12),
    (("H100", "PCIe"), 756e12),
    (("H100",), 989e12),
    (("A100",), 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device; None if it is not known, as for every CPU."""
    if device_kind in _TPU_KINDS:
        return TPU_FLOPS[_TPU_KINDS[device_kind]]
    words = set(device_kind.replace("-", " ").split())
    return next((flops for needed, flops in _GPU_FLOPS if words.issuperset(needed)), None)

"""Peaks of devices by name, and the share of them that a training rate amounts to."""

import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import flops, peaks

MODEL = ModelConfig(vocab_size=50304, max_length=1024, num_layers=12, two_stream_layers=6, width=768, num_heads=12)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
    ],
)
def test_peaks_by_device(kind, tera):
    """The data sheet's dense bfloat16 figure of every device that is known."""
    assert peaks.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v9", "NVIDIA GeForce RTX 4090", "NVIDIA A1000"])
def test_no_peak_no_utilization(kind):
    """Where the peak is not known nothing is claimed."""
    assert peaks.peak_flops(kind) is None
    assert flops.utilization(MODEL, 1e6, kind, 8) is None


def test_utilization_is_the_share_of_the_peak():
    """At the rate at which every chip does nothing but the mathematics it is 1, and proportional below."""
    per_token = flops.training_flops_per_token(MODEL).total
    full = 16 * 197e12 / per_token
    assert flops.utilization(MODEL, full, "TPU v5 lite", 16) == pytest.approx(1)
    assert flops.utilization(MODEL, 0.41 * full, "TPU v5 lite", 16) == pytest.approx(0.41)
    assert flops.utilization(MODEL, full, "TPU v5 lite", 32) == pytest.approx(0.5)
    # By hand: 6 FLOPs a weight and token, about as many weights as GPT-2 small has and 5 x 5/6 layers on top.
    assert per_token == pytest.approx(6 * (124e6 + 5 * 5 / 6 * 7.08e6) * 1.1, rel=0.1)

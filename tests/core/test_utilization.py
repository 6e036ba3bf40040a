"""Peaks of devices by name, and the share of them that a training rate amounts to."""

import dataclasses

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
    share = lambda rate, chips: flops.utilization(MODEL, rate, "TPU v5 lite", chips).model  # noqa: E731
    assert share(full, 16) == pytest.approx(1)
    assert share(0.41 * full, 16) == pytest.approx(0.41)
    assert share(full, 32) == pytest.approx(0.5)
    # By hand: 6 FLOPs a weight and token, about as many weights as GPT-2 small has and 5 x 5/6 layers on top.
    assert per_token == pytest.approx(6 * (124e6 + 5 * 5 / 6 * 7.08e6) * 1.1, rel=0.1)


def test_a_model_that_does_more_work_does_not_look_faster():
    """Beside its own FLOPs stand those of an autoregressive model of the same size, which two streams do not add to."""
    # GPT-2 small by hand: 12 layers of 12 x 768^2 weights and the head of 50304 x 768; attention over all 1024 keys.
    weights = 12 * 12 * 768**2 + 50304 * 768
    by_hand = 6 * weights + 12 * 12 * 768 * 1024
    assert flops.ar_parameters(MODEL) == weights and flops.ar_training_flops_per_token(MODEL) == by_hand
    autoregressive = dataclasses.replace(MODEL, two_stream_layers=0, aggregator="shift")
    two, one = (flops.utilization(model, 1e5, "TPU v4", 1) for model in (MODEL, autoregressive))
    assert two.model > 1.2 * one.model and two.autoregressive == one.autoregressive
    # An autoregressive model counts the same both ways but for the keys that its mask hides.
    own = flops.training_flops_per_token(autoregressive)
    assert own.total == pytest.approx(by_hand - 12 * 12 * 768 * 1024 + own.attention)


def test_grouped_heads_and_gates_are_counted():
    """Fewer heads of keys, other head widths and three matrices in the MLP change the size as they change the model."""
    model = ModelConfig(vocab_size=1280, max_length=128, num_layers=2, width=256, num_heads=4, num_kv_heads=2)
    model = dataclasses.replace(model, head_dim=32, mlp="swiglu", mlp_width=512)
    layer = 256 * (2 * 4 * 32 + 2 * 2 * 32 + 3 * 512)
    assert flops.ar_parameters(model) == 2 * layer + 1280 * 256

"""Roofline arithmetic, by hand."""

import pytest

from armd_jax import typed
from armd_jax.compilation import roofline
from armd_jax.compilation.collectives import Collective
from armd_jax.compilation.roofline import Resource, RooflineSeconds, SplashKernel
from armd_jax.compilation.topology import CHIPS, Chip

CHIP = Chip(16, 100.0, 10.0, 4.0, 0.5, ("1x1",))


def test_the_slowest_resource_sets_the_step():
    """500 FLOPs at 100 per second, 40 bytes at 10, 6 bytes sent at 4, and 2 bytes to another slice at 0.5."""
    collectives = [Collective("all-gather", 8, 4, False, 1), Collective("all-reduce", 2, 2, True, 1)]
    seconds = roofline.seconds(CHIP, 500, 40, collectives)
    assert (seconds.compute, seconds.memory, seconds.interconnect, seconds.network) == (5.0, 4.0, 1.5, 4.0)
    assert seconds.step == 5.0 and seconds.limiting_term == "compute"
    assert seconds.mfu(250, CHIP) == 0.5
    assert roofline.seconds(CHIP, 100, 40, collectives).limiting_term == "memory"
    assert roofline.seconds(CHIP, 100, 4, collectives).limiting_term == "network"
    assert roofline.seconds(CHIP, 100, 4, collectives[:1]).limiting_term == "interconnect"


@pytest.mark.parametrize("resource", typed.choices(Resource))
def test_every_resource_can_limit(resource):
    """Each resource has a time, and limits the step if its time is the longest."""
    seconds = RooflineSeconds(**{name: 2.0 if name == resource else 1.0 for name in typed.choices(Resource)})
    assert seconds.of(resource) == seconds.step == 2.0 and seconds.limiting_term == resource


def test_kernel_flops():
    """Two products forward, three and four backward; a forward pass that is recomputed counts again."""
    kernels = {"splash_mha_fwd_residuals": 12, "splash_mha_dq_no_residuals": 12, "splash_mha_dkv_no_residuals": 12}
    assert all(any(kind in name for name in kernels) for kind in typed.choices(SplashKernel))
    assert roofline.kernel_flops(kernels, 2.0) == 9.0
    assert roofline.kernel_flops(kernels | {"splash_mha_fwd_residuals": 24}, 2.0) == 11.0
    assert roofline.kernel_flops({"splash_mha_fwd": 12}, 2.0) == 2.0
    assert roofline.kernel_flops({}, 2.0) == 0.0


@pytest.mark.parametrize("name", CHIPS)
def test_chip_figures_are_in_the_right_units(name):
    """Each chip is limited by compute from 100 to 700 FLOPs per byte on, and its links are slower than its memory."""
    chip = CHIPS[name]
    assert 100 < chip.flops / chip.hbm_bandwidth < 700
    assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
    assert chip.hbm_bytes % 2**30 == 0

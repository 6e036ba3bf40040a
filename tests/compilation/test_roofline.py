"""Roofline arithmetic, by hand."""

import pytest

from armd_jax.compilation import roofline
from armd_jax.compilation.hlo import Collective
from armd_jax.compilation.topology import CHIPS, Chip

CHIP = Chip(16, 100.0, 10.0, 4.0, 0.5, ("1x1",), "")


def test_the_slowest_resource_sets_the_step():
    """500 FLOPs at 100 a second, 40 bytes at 10, 6 sent at 4, 2 to another slice at 0.5."""
    collectives = [Collective("all-gather", 8, 4, False, 1), Collective("all-reduce", 2, 2, True, 1)]
    times = roofline.times(CHIP, 500, 40, collectives)
    assert (times.compute, times.memory, times.interconnect, times.network) == (5.0, 4.0, 1.5, 4.0)
    assert times.step == 5.0 and times.limiting_term == "compute"
    assert times.mfu(250, CHIP) == 0.5
    assert roofline.times(CHIP, 100, 40, collectives).limiting_term == "memory"
    assert roofline.times(CHIP, 100, 4, collectives).limiting_term == "network"
    assert roofline.times(CHIP, 100, 4, collectives[:1]).limiting_term == "interconnect"


def test_kernel_flops():
    """Two products forward, three and four backward; a recomputed forward pass counts again."""
    kernels = {"splash_mha_fwd_residuals": 12, "splash_mha_dq_no_residuals": 12, "splash_mha_dkv_no_residuals": 12}
    assert roofline.kernel_flops(kernels, 2.0) == 9.0
    assert roofline.kernel_flops(kernels | {"splash_mha_fwd_residuals": 24}, 2.0) == 11.0
    assert roofline.kernel_flops({"splash_mha_fwd": 12}, 2.0) == 2.0
    assert roofline.kernel_flops({}, 2.0) == 0.0


@pytest.mark.parametrize("name", CHIPS)
def test_chip_figures_are_in_the_right_units(name):
    """Each chip is compute-bound between 100 and 700 FLOPs a byte, and its links are slower than its memory."""
    chip = CHIPS[name]
    assert 100 < chip.flops / chip.hbm_bandwidth < 700
    assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
    assert chip.hbm_bytes % 2**30 == 0

"""The bill of a schedule, by hand."""

import dataclasses

import pytest

from armd_jax.compilation import bill
from armd_jax.compilation.topology import CHIPS
from armd_jax.config import Config, ModelConfig, TrainingConfig

CONFIG = Config(model=ModelConfig(max_length=1024), training=TrainingConfig(num_steps=7200, batch_size=100))


def test_the_whole_schedule():
    """7200 steps of at least half a second are an hour on the clock, on each of 16 chips."""
    made = bill.make(CONFIG, "v5e", 16, 16e9, 0.5, 2.0)
    assert (made.steps, made.tokens) == (7200, 7200 * 100 * 1024)
    share = made.efficiency
    assert made.step_seconds == (0.5, 0.5 / share) and made.hours == (1.0, pytest.approx(1 / share))
    assert made.chip_hours == (16.0, pytest.approx(16 / share)) and made.cost == (32.0, pytest.approx(32 / share))
    unpriced = bill.make(CONFIG, "v5e", 16, 16e9, 0.5, None)
    assert dataclasses.replace(made, price_per_chip_hour=None, cost=None) == unpriced


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_a_sourced_efficiency(chip):
    """Each has a figure of real runs with its source, and a small model never has a better one than a large one."""
    sizes = (1e8, 3.6e8, 1e9, 2e9, 7e9, 1e12)
    found = [bill.efficiency(chip, size) for size in sizes]
    assert all(
        0.3 < one.share < 0.6 and ("github.com" in one.source or "arXiv" in one.source or "readthedocs" in one.source)
        for one in found
    )
    assert [one.share for one in found] == sorted(one.share for one in found)
    assert "345M" not in found[-1].source and "0.345B" in found[0].source

"""What the whole schedule of a config costs on a slice: tokens, chip-hours and money, between two honest ends.

The lower end is the roofline's bound on a step, which no run can beat. The upper end is that bound divided by the
lowest efficiency that has been published for programs of this kind on this chip. Nothing of it was measured with this
package. Only training steps count: no evaluation, checkpoints, compilation, restarts or waiting for machines.
"""

import dataclasses

from armd_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """A published share of the peak. source: who reports it, for what, and where."""

    share: float
    source: str


_TABLES = "MaxText, github.com/AI-Hypercomputer/maxtext"
# The lowest figure of the sources for dense transformers on each chip; their ranges are in launch/PROOF.md. These are
# model FLOPs utilisations. What a run computes again in its backward pass does not count in them but does in the bound,
# and so the upper end is too high rather than too low.
_BY_CHIP = {
    "v4": Efficiency(0.462, "PaLM 540B on 6144 chips, arXiv:2204.02311, table 3"),
    "v5e": Efficiency(0.4625, f"128B on 32 x v5e-256, {_TABLES}, MaxText/configs/v5e/README.md"),
    "v5p": Efficiency(0.5155, f"1024B on 2 x v5p-2048, {_TABLES}, MaxText/configs/v5p/README.md"),
    "v6e": Efficiency(0.3855, "Llama 3.1 405B on 256 chips, maxtext.readthedocs.io, Optimized models tiering"),
}
# Those are models of 16B parameters and more. Small ones fill a chip less, as this table of one code and one slice
# shows: (parameters, share), largest first; from 6.7B on it is 44.6% to 54.4%. Its smallest model stands for all below.
_SMALL = ((1.4e9, 0.417), (7.5e8, 0.389), (3.45e8, 0.351))
_SMALL_SOURCE = "on TPU v3-256, github.com/stanford-crfm/levanter, docs/Levanter-1.0-Release.md"
_LARGE = 6.7e9


@dataclasses.dataclass(frozen=True)
class Bill:
    """The training of a config from its first step to its last, on all chips together.

    step_seconds, chip_hours, cost: (at the bound, at the published efficiency). cost: in the currency of
    price_per_chip_hour; None if there is no price. efficiency, efficiency_source: see `Efficiency`.
    """

    steps: int
    tokens: int
    step_seconds: tuple[float, float]
    chip_hours: tuple[float, float]
    efficiency: float
    efficiency_source: str
    price_per_chip_hour: float | None
    cost: tuple[float, float] | None

    @property
    def hours(self) -> tuple[float, float]:
        """Hours on the clock."""
        low, high = self.step_seconds
        return self.steps * low / 3600, self.steps * high / 3600


def efficiency(chip_name: str, parameters: float) -> Efficiency:
    """The lowest published share of the peak for dense transformers: on this chip, or below 6.7B of this size."""
    of_chip = _BY_CHIP[chip_name]
    if parameters >= _LARGE:
        return of_chip
    size, share = next((row for row in _SMALL if row[0] <= parameters), _SMALL[-1])
    of_size = Efficiency(share, f"GPT-2 of {size / 1e9:.3g}B {_SMALL_SOURCE}")
    return min(of_chip, of_size, key=lambda one: one.share)


def make(
    config: Config, chip_name: str, chips: int, parameters: float, step_seconds: float, price: float | None
) -> Bill:
    """The bill of a config's schedule.

    parameters: of the model. step_seconds: the bound on one step. price: per chip and hour; None: unknown.
    """
    published = efficiency(chip_name, parameters)
    steps, rows = config.training.num_steps, config.training.batch_size
    seconds = step_seconds, step_seconds / published.share
    low, high = (steps * chips * value / 3600 for value in seconds)
    return Bill(
        steps=steps,
        tokens=steps * rows * config.model.max_length,
        step_seconds=seconds,
        chip_hours=(low, high),
        efficiency=published.share,
        efficiency_source=published.source,
        price_per_chip_hour=price,
        cost=None if price is None else (low * price, high * price),
    )

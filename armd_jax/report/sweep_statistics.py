"""Statistics over the seeds of a sweep: means with standard errors, paired ratios, steps to equal likelihood."""

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence

from armd_jax.report.sweep_reading import Member, Sweep

HELD_OUT = "eval/nll"  # the curve that steps to equal likelihood are read from
Seed = int | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds. error: its standard error (ddof = 1), None from a single seed. seeds: how many there are."""

    mean: float
    error: float | None
    seeds: int


def estimate(values: Collection[float]) -> Estimate | None:
    """The mean and its standard error; None if there is no value."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def by_seed(sweep: Sweep, row: str, figure: str) -> dict[Seed, float]:
    """A figure of the finished members of a row, by seed. Members that lack it are left out."""
    return {one.seed: one.figures[figure] for one in sweep.finished(row) if figure in one.figures}


def paired_ratio(values: Mapping[Seed, float], base: Mapping[Seed, float]) -> Estimate | None:
    """The ratio to the values of the same seeds of another row, seed by seed; None if no seed has both.

    A ratio that is not finite, as to a value next to 0, is left out.
    """
    ratios = [values[seed] / base[seed] for seed in values if base.get(seed)]
    return estimate([ratio for ratio in ratios if math.isfinite(ratio)])


@dataclasses.dataclass(frozen=True)
class Reach:
    """When a member's held-out loss reaches the final one of the baseline's member with the same seed.

    target: that final loss, nats per token. steps: the first step at which the curve is as low, None if it never is.
    at_most: whether it is so at the first evaluation already. baseline_steps: at which the baseline has its final loss.
    step_flops: model FLOPs of a step, those of a step of the baseline being 1; None if they are not known.
    """

    seed: Seed
    target: float
    steps: float | None
    at_most: bool
    baseline_steps: int
    step_flops: float | None

    @property
    def speedup(self) -> float | None:
        """How many times fewer steps than the baseline's; None if never."""
        return self.baseline_steps / self.steps if self.steps else None

    @property
    def flops_saving(self) -> float | None:
        """How many times fewer model FLOPs than the baseline's; None if never, or if they are not known."""
        return self.speedup / self.step_flops if self.speedup and self.step_flops else None


def first_reached(curve: Sequence[tuple[int, float]], target: float) -> tuple[float, bool] | None:
    """The first step at which a curve is at most `target`, and whether that is its first point; None if it never is.

    Between two evaluations the loss is taken to be linear in the logarithm of the step.
    """
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if step > 0 and loss <= target:
            if before is None:
                return float(step), True
            part = (before[1] - target) / (before[1] - loss)
            return before[0] * (step / before[0]) ** part, False
        before = (step, loss) if step > 0 else before
    return None


def steps_to_equal(sweep: Sweep, row: str, baseline: str) -> list[Reach]:
    """One `Reach` for every seed of which both rows have a finished member with held-out losses."""
    ends = {one.seed: (*end, one.cost) for one in sweep.finished(baseline) if (end := _end(one)) is not None}
    found = []
    for member in sweep.finished(row):
        curve = member.curve(HELD_OUT)
        if curve and member.seed in ends:
            last, target, cost = ends[member.seed]
            steps, at_most = first_reached(curve, target) or (None, False)
            flops = member.cost.flops_per_step / cost.flops_per_step if member.cost and cost else None
            found.append(Reach(member.seed, target, steps, at_most, last, flops))
    return found


def _end(member: Member) -> tuple[int, float] | None:
    """The last evaluation of a member; None if there is none, or if its loss is not finite."""
    last = [row["step"] for row in member.metrics if HELD_OUT in row][-1:]
    return (
        (last[0], member.figures[f"metrics.{HELD_OUT}"]) if last and f"metrics.{HELD_OUT}" in member.figures else None
    )

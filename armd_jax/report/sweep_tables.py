"""The tables of a sweep: one row for all members that differ only in the seed, one column for each chosen figure."""

import dataclasses
from collections.abc import Sequence
from typing import Any, assert_never

from armd_jax.errors import UserError, nearest, shown
from armd_jax.report import sweep_figures as figures
from armd_jax.report import sweep_reading
from armd_jax.report import sweep_statistics as statistics
from armd_jax.report.sweep_figures import Bound
from armd_jax.report.sweep_reading import Member, Sweep
from armd_jax.report.sweep_statistics import Estimate, Reach

_OPPOSITE: dict[Bound, Bound] = {"≤": "≥", "≥": "≤", "": ""}  # of a figure that another one is divided by


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of one row.

    value: over the finished members that have it. ratio: to the baseline, over the seeds that both rows have.
    best: whether its mean, as it is printed, is the best of the column. bound, ratio_bound: whether value and
    ratio are upper bounds, lower bounds or neither.
    """

    value: Estimate | None
    ratio: Estimate | None
    best: bool
    bound: Bound
    ratio_bound: Bound


@dataclasses.dataclass(frozen=True)
class Row:
    """Members that differ only in the seed. finished: how many of them count. cells: by figure.

    bound: whether the held-out loss during training is an upper bound. reached: see `sweep_statistics.steps_to_equal`.
    """

    name: str
    values: dict[str, Any]
    bound: bool
    members: int
    finished: int
    cells: dict[str, Cell]
    reached: tuple[Reach, ...]


@dataclasses.dataclass(frozen=True)
class Tables:
    """Everything that the tables say.

    figures: the columns. baseline: the row that ratios are to. reach: the row whose final loss others have to reach.
    left_out: members whose figures do not count, with the reason. lacking: (finished member, figure that
    it lacks though another seed has it).
    """

    axes: tuple[str, ...]
    figures: tuple[str, ...]
    baseline: str
    reach: str
    rows: tuple[Row, ...]
    left_out: tuple[Member, ...]
    lacking: tuple[tuple[str, str], ...]

    def digits(self, figure: str) -> int | None:
        """Decimals of a column, five digits for its largest value; None: it is printed as 1.2345e+09."""
        values = [row.cells[figure].value for row in self.rows]
        return decimals(max((abs(value.mean) for value in values if value), default=0.0))


def make(sweep: Sweep, wanted: Sequence[str] = (), baseline: str | None = None, reach: str | None = None) -> Tables:
    """The tables of a sweep.

    wanted: the figures, see `sweep_figures.chosen`. baseline: the row that ratios are to; None: the first. reach: the
    row whose final held-out loss others have to reach; None: the baseline.
    Raises UserError if no member is finished, or if a figure or a row is not known.
    """
    if not any(member.finished for member in sweep.members):
        raise UserError(f"no member of the sweep is finished yet ({_counts(sweep)})")
    sweep = sweep_reading.select(sweep, wanted)
    chosen = figures.chosen(sweep, wanted)
    for flag, row in (("--baseline", baseline), ("--reach", reach)):
        if row is not None and row not in sweep.rows:
            raise UserError(f"{flag}={shown(row)}: the sweep has no such row{nearest(row, sweep.rows)}")
    baseline = sweep.rows[0] if baseline is None else baseline
    reach = baseline if reach is None else reach
    best = {figure: _best(sweep, figure) for figure in chosen}
    rows = tuple(
        Row(
            name=row,
            values=dict(sweep.values(row)),
            bound=any(member.bounds for member in sweep.finished(row)),
            members=len(sweep.of_row(row)),
            finished=len(sweep.finished(row)),
            cells={figure: _cell(sweep, row, figure, baseline, row in best[figure]) for figure in chosen},
            reached=tuple(statistics.steps_to_equal(sweep, row, reach)),
        )
        for row in sweep.rows
    )
    finished = [member for member in sweep.members if member.finished]
    lacking = tuple(
        (one.name, figure)
        for figure in chosen
        for one in finished
        if figure not in one.figures and statistics.by_seed(sweep, one.row, figure)
    )
    left_out = tuple(member for member in sweep.members if not member.finished)
    return Tables(sweep.axes, chosen, baseline, reach, rows, left_out, lacking)


def _counts(sweep: Sweep) -> str:
    statuses = dict.fromkeys(member.status for member in sweep.members)
    return ", ".join(f"{len(sweep.of_status(status))} {status}" for status in statuses) or "it has no members"


def _cell(sweep: Sweep, row: str, figure: str, baseline: str, best: bool) -> Cell:
    values = statistics.by_seed(sweep, row, figure)
    ratio = statistics.paired_ratio(values, statistics.by_seed(sweep, baseline, figure))
    bound, base_bound = figures.bound_of_row(sweep, row, figure), figures.bound_of_row(sweep, baseline, figure)
    ratio_bound = "" if bound == base_bound else bound or _OPPOSITE[base_bound]
    return Cell(statistics.estimate(values.values()), ratio, best, bound, ratio_bound)


def _best(sweep: Sweep, figure: str) -> set[str]:
    """The rows whose mean is printed like the best one; none if nobody knows what is better, or nothing is compared."""
    means = {row: found.mean for row in sweep.rows if (found := _estimate(sweep, row, figure))}
    if len(means) < 2:
        return set()
    match better := figures.better(figure):
        case "neither":
            return set()
        case "lower":
            best = min(means.values())
        case "higher":
            best = max(means.values())
        case _:
            assert_never(better)
    digits = decimals(max(map(abs, means.values())))
    return {row for row, mean in means.items() if printed(mean, digits) == printed(best, digits)}


def _estimate(sweep: Sweep, row: str, figure: str) -> Estimate | None:
    return statistics.estimate(statistics.by_seed(sweep, row, figure).values())


def decimals(largest: float) -> int | None:
    """How many decimals show five digits of a number; None: it is printed with an exponent."""
    if largest >= 1e6 or 0 < largest < 1e-3:
        return None
    return next((digits for digits, limit in ((4, 10), (3, 100), (2, 1e3), (1, 1e4)) if largest < limit), 0)


def printed(value: float, digits: int | None) -> str:
    """A number with as many decimals; None: with an exponent."""
    return f"{value:.4e}" if digits is None else f"{value:,.{digits}f}"

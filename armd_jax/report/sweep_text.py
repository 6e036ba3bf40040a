"""The tables of a sweep as Markdown, as CSV and as JSON.

Two sweeps whose members ended with the same bits give the same bytes: no time, no speed and no path is in a table,
unless a figure of speed is asked for by its name.
"""

import csv
import dataclasses
import io
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from armd_jax import typed
from armd_jax.report import sweep_figures as figures
from armd_jax.report import sweep_statistics as statistics
from armd_jax.report.sweep_figures import Bound
from armd_jax.report.sweep_reading import Sweep
from armd_jax.report.sweep_statistics import Estimate, Reach
from armd_jax.report.sweep_tables import Row, Tables, printed

_OF_WORDS = ("", "status", "reason")  # headers of columns that hold no numbers


def shown_estimate(found: Estimate | None, digits: int | None, bound: Bound = "") -> str:
    """`≤ 1.2345 ± 0.0012` for people; – if there is none."""
    if found is None:
        return "–"
    error = "" if found.error is None else f" ± {printed(found.error, digits)}"
    return f"{bound and bound + ' '}{printed(found.mean, digits)}{error}"


# --- for people -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shown:
    """A table for people. strong: (row, column) of the cells that are the best. note: how to read it."""

    title: str
    note: str
    header: list[str]
    cells: list[list[str]]
    strong: frozenset[tuple[int, int]] = frozenset()


def shown_tables(tables: Tables, names: dict[str, str] | None = None) -> list[Shown]:
    """All tables for people. names: what to write above a column in the place of the figure's path."""
    found: list[Shown] = []
    for part in typing.get_args(figures.Table):
        columns = [figure for figure in tables.figures if figures.table_of(figure) == part]
        rows = [row for row in tables.rows if any(row.cells[figure].value for figure in columns)]
        if rows:
            heads = [(names or {}).get(figure, figure) for figure in columns]
            # A row without any figure is in the first table, where it says how many of its members are finished.
            first = not found
            found.append(_values(tables, tables.rows if first else rows, columns, heads, part))
            if len(tables.rows) > 1 and (first or tables.baseline in [row.name for row in rows]):
                found.append(_ratios(tables, rows, columns, heads, part))
    if len(tables.rows) > 1 and any(row.reached for row in tables.rows):
        found.append(_reached(tables))
    if tables.left_out or tables.lacking:
        found.append(_left_out(tables))
    return found


def _values(
    tables: Tables, rows: Sequence[Row], columns: Sequence[str], heads: Sequence[str], part: figures.Table
) -> Shown:
    cells = [[row.name, _seeds(row), *(_value(tables, row, figure) for figure in columns)] for row in rows]
    strong = frozenset(
        (place, column + 2)
        for place, row in enumerate(rows)
        for column, figure in enumerate(columns)
        if row.cells[figure].best
    )
    note = (
        "Mean over the finished seeds ± standard error, which one seed does not have. The best of a column is marked."
    )
    if any(row.cells[figure].bound for row in rows for figure in columns):
        note += " ≤, ≥: a bound; the true figure is at most, or at least, that high."
    return Shown(f"Figures: {part}", note, ["row", "seeds", *heads], cells, strong)


def _value(tables: Tables, row: Row, figure: str) -> str:
    cell = row.cells[figure]
    return _with_seeds(shown_estimate(cell.value, tables.digits(figure), cell.bound), cell.value, row)


def _ratio(row: Row, figure: str) -> str:
    cell = row.cells[figure]
    return _with_seeds(shown_estimate(cell.ratio, 4, cell.ratio_bound), cell.ratio, row)


def _with_seeds(text: str, found: Estimate | None, row: Row) -> str:
    """The text, with the number of seeds if not all finished members of the row are in it."""
    if found is None or found.seeds == row.finished:
        return text
    return f"{text} ({found.seeds} seed{'s' if found.seeds > 1 else ''})"


def _seeds(row: Row) -> str:
    return str(row.members) if row.finished == row.members else f"{row.finished} of {row.members}"


def _ratios(
    tables: Tables, rows: Sequence[Row], columns: Sequence[str], heads: Sequence[str], part: figures.Table
) -> Shown:
    cells = [[row.name, *(_ratio(row, figure) for figure in columns)] for row in rows if row.name != tables.baseline]
    note = "Each seed is divided by the same seed of that row; then the mean ± standard error over these seeds."
    if tables.baseline not in [row.name for row in rows]:
        note = "That row has none of these figures, so there are no ratios; --baseline takes another row."
        cells = []
    return Shown(f"Ratios to {tables.baseline}: {part}", note, ["row", *heads], cells)


def _reached(tables: Tables) -> Shown:
    cells = [[row.name, str(len(row.reached)), *_steps(row.reached)] for row in tables.rows if row.finished]
    note = (
        "The first step at which the held-out loss is as low as the final one of that row with the same seed, linear in"
        " the logarithm of the step between two evaluations; how many times fewer steps that is than the row took, and"
        " how many times fewer model FLOPs. ≤: already at the first evaluation."
    )
    if bounds := [row.name for row in tables.rows if row.bound]:
        note += f" The loss of {', '.join(bounds)} is an upper bound of the true one."
    header = ["row", "seeds", "steps", "times fewer", "times fewer FLOPs"]
    return Shown(f"Steps to the final held-out loss of {tables.reach}", note, header, cells)


def _steps(reached: Sequence[Reach]) -> list[str]:
    """Steps, times fewer steps, times fewer FLOPs. A mean without the seeds that never get there would be too good."""
    steps = [one.steps for one in reached if one.steps is not None]
    if len(steps) < len(reached):
        return [f"never in {len(reached) - len(steps)} of {len(reached)}" if steps else "never", "–", "–"]
    speedups = [one.speedup for one in reached if one.speedup is not None]
    savings = [one.flops_saving for one in reached if one.flops_saving is not None]
    at_most: Bound = "≤" if any(one.at_most for one in reached) else ""
    at_least: Bound = "≥" if at_most else ""
    return [
        shown_estimate(statistics.estimate(steps), 0, at_most),
        shown_estimate(statistics.estimate(speedups), 2, at_least),
        shown_estimate(statistics.estimate(savings), 2, at_least),
    ]


def _left_out(tables: Tables) -> Shown:
    cells = [[member.name, member.status, member.reason] for member in tables.left_out]
    cells += [[name, "finished", f"lacks {figure}"] for name, figure in tables.lacking]
    return Shown("Members that are not in these figures", "", ["member", "status", "reason"], cells)


def markdown(tables: Tables) -> str:
    """All tables as Markdown, the best of each column in bold."""
    parts = []
    for table in shown_tables(tables):
        parts += [text for text in (f"## {table.title}", table.note, _markdown(table)) if text]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Shown) -> str:
    cells = [
        [f"**{text}**" if (place, column) in table.strong else text for column, text in enumerate(row)]
        for place, row in enumerate(table.cells)
    ]
    return markdown_table(table.header, cells) if cells else ""


def markdown_table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A Markdown table, for other programs too; numbers stand at the right.

    Columns of numbers are all but the first one and those without a name or with one in `_OF_WORDS`.
    """
    numbers = [head not in _OF_WORDS for head in header[1:]]
    return "\n".join(map(_line, [header, ["---", *("---:" if one else "---" for one in numbers)], *cells]))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


# --- for programs ---------------------------------------------------------------------------------------------------


def members_csv(sweep: Sweep, speed: bool = False) -> str:
    """One line per member: axes, seed, status, and every figure that some member has.

    speed: only figures of speed, which differ between equal runs; otherwise all others.
    """
    names = [name for name in figures.known(sweep.members) if figures.of_speed(name) == speed]
    header = ["member", "row", *sweep.axes, "seed", "status", "reason", *names]
    lines = [
        [one.name, one.row, *(one.values[axis] for axis in sweep.axes), one.seed, one.status, one.reason]
        + [one.figures.get(name) for name in names]
        for one in sweep.members
    ]
    return _csv([header, *lines])


def rows_csv(tables: Tables) -> str:
    """One line per row and figure: mean, standard error, seeds, and the ratio to the baseline."""
    header = ["row", *tables.axes, "members", "finished", "figure", "mean", "standard_error", "seeds", "bound", "best"]
    header += ["baseline", "ratio", "ratio_standard_error", "ratio_seeds", "ratio_bound"]
    lines = [
        [row.name, *(row.values[axis] for axis in tables.axes), row.members, row.finished, figure]
        + [*_fields(cell.value), cell.bound, int(cell.best), tables.baseline, *_fields(cell.ratio), cell.ratio_bound]
        for row in tables.rows
        for figure, cell in row.cells.items()
    ]
    return _csv([header, *lines])


def steps_csv(tables: Tables) -> str:
    """One line per row and seed: when its held-out loss reaches the final one of the row that others have to reach."""
    header = ["row", "seed", "reach", "target", "steps", "at_first_evaluation", "baseline_steps", "times_fewer"]
    header += ["times_fewer_flops"]
    lines = [
        [row.name, one.seed, tables.reach, one.target, "never" if one.steps is None else one.steps]
        + [int(one.at_most), one.baseline_steps, one.speedup, one.flops_saving]
        for row in tables.rows
        for one in row.reached
    ]
    return _csv([header, *lines])


def _fields(found: Estimate | None) -> list[Any]:
    return [None, None, 0] if found is None else [found.mean, found.error, found.seeds]


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    """Numbers are written so that reading them gives the same bits."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def as_dict(tables: Tables) -> dict[str, Any]:
    """Everything that the tables say, for JSON."""
    plain: dict[str, Any] = typed.as_plain(dataclasses.replace(tables, left_out=()))
    keys = ("name", "row", "seed", "status", "reason")
    plain["left_out"] = [{key: getattr(member, key) for key in keys} for member in tables.left_out]
    for row, one in zip(plain["rows"], tables.rows, strict=True):
        for values, reached in zip(row["reached"], one.reached, strict=True):
            values |= {"speedup": reached.speedup, "flops_saving": reached.flops_saving}
    return plain

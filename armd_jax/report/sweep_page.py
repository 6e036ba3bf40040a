"""`armd report --sweep=DIR`: tables and pictures of a sweep, and one self-contained page that has them all."""

import dataclasses
import pathlib
import typing
from collections.abc import Sequence
from typing import Any

from armd_jax import files
from armd_jax.errors import UserError
from armd_jax.report import markup, sweep_pictures, sweep_reading, sweep_tables, sweep_text
from armd_jax.report import sweep_figures as figures
from armd_jax.report.sweep_curves import Against
from armd_jax.report.sweep_reading import Status, Sweep
from armd_jax.report.sweep_tables import Tables

PAGE = "sweep.html"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written. page: its path. markdown: the tables, the content of sweep.md. tables: the same for JSON."""

    page: pathlib.Path
    markdown: str
    tables: dict[str, Any]


def write(
    folder: pathlib.Path,
    out: pathlib.Path | None = None,
    wanted: Sequence[str] = (),
    baseline: str | None = None,
    reach: str | None = None,
    rows: Sequence[str] = (),
) -> Report:
    """Writes the report of the sweep in `folder` into `out`, by default the sweep's folder.

    sweep.md, sweep.csv, rows.csv, steps.csv: tables, the same bytes for members of the same bits. speed.csv, sweep.html
    and its PNG files: with speeds, which differ between equal runs.
    wanted, baseline, reach: see `sweep_tables.make`. rows: patterns as those of file names; only rows that fit one, and
    those that they are compared with, are reported. Empty: all.
    Everything is made before the first file is written, and every file is written whole or not at all.
    Raises UserError if the folder is no sweep, if nothing of it is finished, or if it cannot be written.
    """
    out = folder if out is None else out
    sweep = sweep_reading.load(folder)
    if rows:
        base = sweep.rows[:1] if baseline is None else (baseline,)  # ratios stay those to the first row of the sweep
        sweep = sweep_reading.only(sweep, rows, [*base, *(() if reach is None else (reach,))])
    tables = sweep_tables.make(sweep, wanted, baseline, reach)
    markdown = sweep_text.markdown(tables)
    pictures = _pictures(sweep, tables)
    found: dict[str, str | bytes] = {
        "sweep.md": markdown,
        "sweep.csv": sweep_text.members_csv(sweep),
        "rows.csv": sweep_text.rows_csv(tables),
        "steps.csv": sweep_text.steps_csv(tables),
        "speed.csv": sweep_text.members_csv(sweep, speed=True),
        **{name: png for name, (png, _) in pictures.items()},
        PAGE: _page(sweep, tables, pictures),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in found.items():
            content = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
            files.write(out / name, content)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out}: the report cannot be written there: {reason}; --out=FOLDER takes another") from error
    return Report(out / PAGE, markdown, sweep_text.as_dict(tables))


def _pictures(sweep: Sweep, tables: Tables) -> dict[str, tuple[bytes, str]]:
    """The PNG files with their captions, by the name of the file."""
    thin = "Of several seeds, the thick line is the mean and a thin line each of them."
    what: dict[Against, str] = {
        "steps": f"Losses against training steps. {thin}",
        "tokens": f"Losses against training tokens. {thin}",
        "flops": f"Losses against model FLOPs: both streams of an ARMD, without attention that a mask hides. {thin}",
        "seconds": f"Losses against seconds of training, without compilation, evaluation and saving. {thin}",
    }
    found = {f"curves_{one}.png": (sweep_pictures.curves(sweep, one), caption) for one, caption in what.items()}
    first = tables.figures[0]
    caption = (
        f"{figures.words(first)} against each axis of the sweep. A point is a row with its standard error over seeds,"
        " and points that differ in this axis alone are joined. A triangle is a bound: the true figure lies on the side"
        " that it points to."
    )
    found = {"axes.png": (sweep_pictures.against_axes(sweep, first), caption), **found}
    return {name: (png, caption) for name, (png, caption) in found.items() if png is not None}


def _page(sweep: Sweep, tables: Tables, pictures: dict[str, tuple[bytes, str]]) -> str:
    statuses = [(status, len(sweep.of_status(status))) for status in typing.get_args(Status)]
    counts = ", ".join(f"{count} {status}" for status, count in statuses if count)
    facts = [
        f"{len(sweep.members)} members in {len(sweep.rows)} rows: {counts}",
        f"axes: {', '.join(sweep.axes) or 'none'}",
    ]
    body = []
    for table in sweep_text.shown_tables(tables, {figure: figures.words(figure) for figure in tables.figures}):
        body += [markup.heading(table.title), *([markup.note(table.note)] if table.note else [])]
        body += [markup.table(table.header, table.cells, table.strong)] if table.cells else []
    if pictures:
        body.append(markup.heading("Pictures"))
    body += [markup.figure(png, caption) for png, caption in pictures.values()]
    names = "\n".join(f"{figures.words(figure)}: {figure}" for figure in tables.figures)
    body.append(markup.details("which figures these are, for --metric", names))
    return markup.page(f"{sweep.name}: sweep", f"{sweep.name}: a sweep", facts, body)

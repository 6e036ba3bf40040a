"""The pictures of a sweep: losses against steps, tokens, FLOPs and seconds, and a figure against the axes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from armd_jax.report import sweep_curves
from armd_jax.report import sweep_figures as figures
from armd_jax.report import sweep_statistics as statistics
from armd_jax.report.style import BLUE, INK, ORANGE, SKY, VERMILLION, new_figure, png, styled
from armd_jax.report.sweep_curves import Against, Line
from armd_jax.report.sweep_reading import Sweep
from armd_jax.report.sweep_statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (BLUE, VERMILLION, "#009e73", ORANGE, "#cc79a7", SKY, INK)
_STYLES = ("-", (0, (5, 1.5)))
MOST_TOGETHER = 12  # rows that one legend can tell apart
_LABELS: dict[Against, str] = {
    "steps": "training steps",
    "tokens": "training tokens",
    "flops": "model FLOPs of training",
    "seconds": "seconds of training",
}
_GREY = "#cccccc"
_MARKS: dict[figures.Bound, str] = {"≤": "<", "≥": ">", "": "o"}  # a triangle points to where the true figure is
_POINTS = 100  # to which a training loss is thinned out

_METRICS = {name: figures.words(f"metrics.{name}") for name in (statistics.HELD_OUT, "train/nll")}


def curves(sweep: Sweep, against: Against) -> bytes | None:
    """Held-out and training loss of every row: the mean over its seeds, and a thin line for each of several seeds.

    Of more than a dozen rows, each has a panel of its own. None if no finished member has such a curve.
    """
    of_rows = [(row, _of_row(sweep, row, against)) for row in sweep.rows]
    bounds = {row for row in sweep.rows if any(member.bounds for member in sweep.finished(row))}
    lines = {row + " (bound)" * (row in bounds): found for row, found in of_rows if any(found.values())}
    if not lines:
        return None
    return _together(lines, against) if len(lines) <= MOST_TOGETHER else _apart(lines, against)


def _of_row(sweep: Sweep, row: str, against: Against) -> dict[str, list[Line]]:
    """The lines of a row by their metric."""
    found = {name: sweep_curves.lines(sweep, row, name, against) for name in _METRICS}
    return found | {"train/nll": [sweep_curves.thinned(line, _POINTS) for line in found["train/nll"]]}


@styled
def _together(lines: dict[str, dict[str, list[Line]]], against: Against) -> bytes:
    columns = 1 if max(map(len, lines)) > 45 else 2 if max(map(len, lines)) > 22 else 3
    rows = math.ceil(len(lines) / columns)
    figure = new_figure(8.6, 3.9 + 0.24 * rows)
    panels = figure.subplots(1, 2)
    for panel, (metric, label) in zip(panels, _METRICS.items(), strict=True):
        for number, (row, found) in enumerate(lines.items()):
            color, style = _COLORS[number % len(_COLORS)], _STYLES[number // len(_COLORS) % len(_STYLES)]
            _draw(panel, found[metric], row, color, style)
        panel.set(title=label)
        _finish(panel, against, [line for found in lines.values() for line in found[metric]])
    handles, labels = panels[0].get_legend_handles_labels()
    if not handles:
        handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return png(figure)


def _draw(panel: "Axes", lines: Sequence[Line], label: str, color: str, style: Any) -> None:
    if not lines:
        return
    if len(lines) > 1:
        for xs, ys in lines:
            panel.plot(xs, ys, color=color, linewidth=0.6, alpha=0.4)
    xs, ys = sweep_curves.mean(lines)
    marker = "o" if len(xs) < 25 else None
    panel.plot(xs, ys, color=color, linestyle=style, linewidth=1.8, marker=marker, markersize=3, label=label)


def _finish(panel: "Axes", against: Against, lines: Sequence[Line]) -> None:
    """Axis labels, and a range in which the end of training can be told apart."""
    panel.set(xlabel=_LABELS[against])
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    values = sorted(value for _, ys in lines for value in ys)
    if not values:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes)
        panel.set(xticks=[], yticks=[])
        return
    ends = [ys[-1] for _, ys in lines]
    low, high = values[0], values[-1]
    late = max(ys[len(ys) // 8] for _, ys in lines)  # the very first steps would squeeze all others
    top = min(high, max(late, low + 1.5 * (max(ends) - low)))
    margin = 0.05 * (top - low) or 0.05 * abs(top) or 0.1
    panel.set(ylim=(low - margin, top + margin), xlim=(0, None))


@styled
def _apart(lines: dict[str, dict[str, list[Line]]], against: Against) -> bytes:
    columns = 4
    rows = math.ceil(len(lines) / columns)
    figure = new_figure(8.6, 0.5 + 1.9 * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    metric = next(name for name in _METRICS if any(found[name] for found in lines.values()))
    everything = [line for found in lines.values() for line in found[metric]]
    means = {row: sweep_curves.mean(found[metric]) for row, found in lines.items() if found[metric]}
    for panel, (row, found) in zip(panels, lines.items(), strict=False):
        for xs, ys in means.values():
            panel.plot(xs, ys, color=_GREY, linewidth=0.7)
        _draw(panel, found[metric], row, BLUE, "-")
        _finish(panel, against, everything)
        panel.set_title(_wrapped(row, 26), fontsize=8)
        panel.tick_params(labelsize=8)
        panel.set(xlabel="")
    for panel in panels[len(lines) :]:
        panel.set_visible(False)
    for panel in panels[max(len(lines) - columns, 0) : len(lines)]:  # the last of every column
        panel.tick_params(labelbottom=True)
    figure.supxlabel(_LABELS[against], fontsize=10)
    figure.supylabel(_METRICS[metric], fontsize=10)
    return png(figure)


def _wrapped(text: str, width: int) -> str:
    """A row's name in lines, broken after its commas and wherever else it is too long."""
    lines = [""]
    for word in text.replace(",", ",\n").splitlines():
        lines = [*lines, word] if len(lines[-1]) + len(word) > width and lines[-1] else [*lines[:-1], lines[-1] + word]
    return "\n".join(line[at : at + width] for line in lines for at in range(0, max(len(line), 1), width))


def against_axes(sweep: Sweep, figure: str) -> bytes | None:
    """A panel for each axis of several values: the figure of every row, with its standard error.

    Rows that differ in this axis alone are joined, unless it is the only one and has labels. None if there is no such
    axis, or no finished member that has the figure.
    """
    found = {row: statistics.estimate(statistics.by_seed(sweep, row, figure).values()) for row in sweep.rows}
    known = {row: estimate for row, estimate in found.items() if estimate is not None}
    places = {axis: _places_of(sweep, list(known), axis) for axis in sweep.axes}
    axes = [axis for axis in sweep.axes if len(set(places[axis].values())) > 1]
    return _dots(figure, known, sweep, axes) if axes else None


def _places_of(sweep: Sweep, rows: Sequence[str], axis: str) -> dict[str, str]:
    """The label of each row on an axis, numbers by size and others as they come; without rows that have no value."""
    values = {row: sweep.values(row)[axis] for row in rows if sweep.values(row)[axis] is not None}
    numbers = {row: value for row, value in values.items() if isinstance(value, int | float)}
    by_size = sorted(numbers, key=lambda row: numbers[row])
    return {row: str(values[row]) for row in [*by_size, *(row for row in values if row not in numbers)]}


@styled
def _dots(figure: str, known: Mapping[str, Estimate], sweep: Sweep, axes: Sequence[str]) -> bytes:
    """known: the figure of the rows that are drawn. axes: the panels."""
    labels = {axis: _places_of(sweep, list(known), axis) for axis in axes}
    columns = min(len(axes), 2)
    count = math.ceil(len(axes) / columns)
    tallest = max(len(set(found.values())) for found in labels.values())
    drawn = new_figure(8.6 if columns > 1 else 7.5, 0.6 + count * max(2.2, 0.9 + 0.32 * tallest))
    panels = list(drawn.subplots(count, columns, squeeze=False).flat)
    for panel, axis in zip(panels, axes, strict=False):
        places = {label: place for place, label in enumerate(dict.fromkeys(labels[axis].values()))}
        joined: dict[str, list[tuple[float, int]]] = {}
        for row, label in labels[axis].items():
            mean, error, place = known[row].mean, known[row].error, places[label]
            mark = _MARKS[figures.bound_of_row(sweep, row, figure)]
            panel.errorbar(mean, place, xerr=error, fmt=mark, color=BLUE, markersize=6, capsize=3)
            others = [sweep.values(row)[other] for other in sweep.axes if other != axis]
            joined.setdefault(str(others), []).append((mean, place))
        in_order = all(isinstance(sweep.values(row)[axis], int | float) for row in labels[axis])
        for points in joined.values() if in_order or len(axes) > 1 else ():
            panel.plot(*zip(*points, strict=True), color=SKY, linewidth=0.9, zorder=0)
        panel.set(title=axis, yticks=range(len(places)), ylim=(len(places) - 0.5, -0.5))
        panel.set_yticklabels([_wrapped(label, 28) for label in places], fontsize=9)
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.locator_params(axis="x", nbins=5)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    drawn.supxlabel(figures.words(figure), fontsize=11)
    return png(drawn)

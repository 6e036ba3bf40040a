"""The picture of a model's texts: every token on the colour of the network call that made it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from armd_jax.evaluation.results import Sample
from armd_jax.report.style import MONOSPACE, call_color, ink_on, new_figure, png, styled

if TYPE_CHECKING:
    from matplotlib.patches import Rectangle

_COLUMNS = 92  # characters per line
_MAX_LINES = 12  # per sample
_LINE = 0.205  # inches


@styled
def picture(drawn: Sequence[Sample]) -> bytes:
    """The beginning of each sample's text, and a strip with the colours of all of its tokens."""
    from matplotlib.colors import to_rgb

    laid_out = [_layout(sample) for sample in drawn]
    heights = [_LINE * min(max(len(lines), 1), _MAX_LINES) + 0.85 for lines in laid_out]
    total = sum(heights) + 0.4
    figure = new_figure(9, total)
    figure.set_layout_engine("none")
    note = "Dark tokens were made by early network calls, light ones by late calls. The strip shows the whole text,"
    figure.text(0.015, (total - 0.3) / total, f"{note} the lines its beginning.", fontsize=10)
    top = total - 0.4
    for sample, lines, height in zip(drawn, laid_out, heights, strict=True):
        shown, num_calls = lines[:_MAX_LINES], max(sample.num_calls, 1)
        title = f"{sample.label}: {len(sample.calls):,} tokens in {sample.num_calls:,} network calls"
        figure.text(0.015, (top - 0.3) / total, title, fontweight="bold")
        strip = figure.add_axes((0.015, (top - 0.55) / total, 0.97, 0.16 / total))
        strip.imshow(np.array([[to_rgb(call_color(call, num_calls)) for call in sample.calls]]), aspect="auto")
        strip.set_axis_off()
        depth = _LINE * max(len(shown), 1)
        axes = figure.add_axes((0.015, (top - 0.62 - depth) / total, 0.97, depth / total))
        axes.set(xlim=(0, _COLUMNS), ylim=(max(len(shown), 1), 0))
        axes.set_axis_off()
        for row, line in enumerate(shown):
            for column, (character, call) in enumerate(line):
                color = call_color(call, num_calls)
                axes.add_patch(_rectangle(column, row, color))
                axes.text(
                    column + 0.5, row + 0.52, character, color=ink_on(color), ha="center", va="center",
                    family=MONOSPACE, fontsize=10,
                )  # fmt: skip
        top -= height
    return png(figure)


def _rectangle(column: int, row: int, color: str) -> "Rectangle":
    from matplotlib.patches import Rectangle

    return Rectangle((column, row + 0.04), 1, 0.92, facecolor=color, edgecolor=color, linewidth=0.3)


def _layout(sample: Sample) -> list[list[tuple[str, int]]]:
    """(character, call) cells line by line: broken at line ends, which show as an arrow, and at the width."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family=MONOSPACE))).get_charmap()
    lines: list[list[tuple[str, int]]] = [[]]
    for piece, call in zip(sample.pieces, sample.calls, strict=True):
        for character in piece.replace("\r\n", "\n").replace("\t", "    "):
            printable = "↵" if character == "\n" else character if ord(character) in known else "□"
            lines[-1].append((printable, call))
            if character == "\n" or len(lines[-1]) >= _COLUMNS:
                lines.append([])
    return [line for line in lines if line]

"""The phases of the order schedule as coloured bands behind a curve over the training steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from armd_jax.core.curriculum import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"identity": "#ffffff", "rising": "#dbeaf5", "constant": "#fbeed2", "SBP": "#d8eee6"}


def shade(axes: "Axes", phases: Sequence[Phase], last: float, labels: bool = True) -> None:
    """Draws the bands up to step `last`, their names above them."""
    for phase in phases:
        if phase.first >= last:
            continue
        end = min(phase.end, last)
        axes.axvspan(phase.first, end, color=COLORS.get(phase.name, "#ffffff"), zorder=0, linewidth=0)
        if phase.first:
            axes.axvline(phase.first, color="#bbbbbb", linewidth=0.8, zorder=1)
        if labels and end - phase.first > 0.06 * last:
            middle = (phase.first + end) / 2
            axes.text(middle, 1.01, phase.name, transform=axes.get_xaxis_transform(), ha="center", va="bottom")

"""Where the wall-clock of a run went: one bar, whose parts are labelled below it, and the rows of a table."""

from typing import assert_never

from armd_jax import typed
from armd_jax.report.style import BLUE, FAINT, GIVEN, INK, ORANGE, SKY, VERMILLION, ink_on, new_figure, png, styled
from armd_jax.training.goodput import Category, Goodput

_GREEN, _PURPLE, _YELLOW = "#009e73", "#cc79a7", "#f0e442"
_WIDE_ENOUGH = 0.06  # a part of the bar narrower than this fraction has no room for its percentage


def label(category: Category) -> str:
    """A category in words."""
    match category:
        case "training":
            return "training"
        case "waiting":
            return "waiting for data"
        case "evaluating":
            return "evaluating"
        case "saving":
            return "saving (while training waited)"
        case "compiling":
            return "compiling, with the first step"
        case "restoring":
            return "restoring a checkpoint"
        case "preparing":
            return "preparing or finding the data"
        case "profiling":
            return "beginning and writing profiles"
        case "starting":
            return "starting: Python, imports, the state"
        case "lost":
            return "lost: steps that were trained again"
        case "not_running":
            return "not running, or killed unnoticed"
        case _:
            assert_never(category)


def _color(category: Category) -> str:
    match category:
        case "training":
            return BLUE
        case "waiting":
            return ORANGE
        case "evaluating":
            return SKY
        case "saving":
            return _GREEN
        case "compiling":
            return _PURPLE
        case "restoring":
            return _YELLOW
        case "preparing":
            return "#8c6d31"
        case "profiling":
            return INK
        case "starting":
            return "#888888"
        case "lost":
            return VERMILLION
        case "not_running":
            return GIVEN
        case _:
            assert_never(category)


def spent(goodput: Goodput) -> list[tuple[Category, float, float]]:
    """(category, seconds, fraction of the wall-clock) of all that took any time, in a fixed order."""
    categories: tuple[Category, ...] = typed.choices(Category)  # type: ignore[assignment]  # they are its names
    return [(one, goodput.seconds[one], goodput.share(one)) for one in categories if goodput.seconds[one] > 0]


@styled
def picture(goodput: Goodput) -> bytes:
    """The wall-clock as one bar."""
    from matplotlib.artist import Artist
    from matplotlib.patches import Patch

    parts = spent(goodput)
    figure = new_figure(8, 1.5 + 0.16 * len(parts))
    axes = figure.subplots()
    left = 0.0
    for category, seconds, share in parts:
        color = _color(category)
        axes.barh([0], [seconds], left=left, color=color, height=0.7, edgecolor=FAINT, linewidth=0.6)
        if share >= _WIDE_ENOUGH:
            middle = left + seconds / 2
            axes.text(middle, 0, f"{share:.0%}", ha="center", va="center", color=ink_on(color), fontweight="bold")
        left += seconds
    axes.set(xlim=(0, left), ylim=(-0.5, 0.5), yticks=[], xlabel="seconds of wall-clock")
    axes.spines["left"].set_visible(False)
    handles: list[Artist] = [Patch(color=_color(category)) for category, _, _ in parts]
    names = [f"{label(category)}, {share:.1%}" for category, _, share in parts]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return png(figure)

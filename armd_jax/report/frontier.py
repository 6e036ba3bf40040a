"""The picture of generation metrics: generative perplexity against entropy, and against speed."""

from collections.abc import Sequence

from armd_jax.evaluation.generative_results import Entry
from armd_jax.report.style import BLUE, INK, ORANGE, SKY, VERMILLION, new_figure, png, styled

_COLORS = (BLUE, ORANGE, VERMILLION, SKY, "#009e73", "#cc79a7", "#8a8a00")
_MARKERS = "osD^vPX"


@styled
def picture(group: Sequence[Entry]) -> bytes:
    """Entries of one table: a line through the temperatures of each way of writing, and a star for real text.

    Left, every point is labelled with its temperature. Right, the same points over tokens per second, if they have a
    speed.
    """
    from matplotlib.ticker import FuncFormatter

    known = [entry for entry in group if entry.generative_perplexity is not None and entry.entropy_nats is not None]
    ways: dict[str, list[Entry]] = {}
    for entry in known:
        if not entry.text:
            ways.setdefault(entry.label, []).append(entry)
    figure = new_figure(10, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (label, entries) in enumerate(ways.items()):
        look = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number // len(_COLORS) % len(_MARKERS)]}
        perplexities = [entry.generative_perplexity for entry in entries]
        errors = [entry.standard_error or 0.0 for entry in entries]
        entropies = [entry.entropy_nats for entry in entries]
        left.errorbar(entropies, perplexities, yerr=errors, label=label, capsize=2, **look)
        right.errorbar([entry.tokens_per_second for entry in entries], perplexities, yerr=errors, capsize=2, **look)
        for entry, x, y in zip(entries, entropies, perplexities, strict=True):
            left.annotate(f"{entry.temperature:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    for entry in known:
        if entry.text:
            y = entry.generative_perplexity
            left.plot(entry.entropy_nats, y, marker="*", markersize=14, color=INK, linestyle="none", label=entry.label)
            right.axhline(y, color=INK, linestyle=":", linewidth=1)
    left.set(xlabel="entropy within a text (nats)", ylabel="generative perplexity", yscale="log")
    right.set(xlabel="tokens per second")
    # By default, a logarithmic axis has its numbers as powers, which are formulas.
    left.yaxis.set_major_formatter(FuncFormatter(_number))
    left.yaxis.set_minor_formatter(FuncFormatter(_number))
    left.legend(fontsize=8)
    return png(figure)


def _number(value: float, place: int) -> str:
    """A tick's label."""
    del place
    return f"{value:g}"

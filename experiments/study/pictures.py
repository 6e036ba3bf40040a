"""The pictures on the study's page."""

from typing import Any

import figures
import numpy as np

from armd_jax.report import style
from armd_jax.report.sweep_reading import Sweep

COLOURS = dict(
    zip(figures.MAIN, (style.INK, style.SKY, style.BLUE, style.VERMILLION, style.ORANGE, style.ORANGE), strict=True)
)
STYLES = {figures.LONG: "--"}


def all_of(sweep: Sweep) -> dict[str, bytes]:
    """The PNG files by their names: that of sizes only if the sweep has models of several sizes."""
    found = {"curves.png": curves(sweep), "frontier.png": frontier(sweep)}
    return found | {"sizes.png": sizes(sweep)} if figures.widths(sweep, "AR") else found


@style.styled
def curves(sweep: Sweep) -> bytes:
    """Held-out loss of the main rows against steps and against FLOPs, one thin line per seed."""
    figure = style.new_figure(11, 5.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, name in figures.MAIN.items():
        for place, member in enumerate(sweep.finished(row)):
            assert member.cost is not None
            steps, losses = np.array(member.curve("eval/nll")).reshape(-1, 2).T
            per_step = member.cost.flops_per_token * member.cost.tokens_per_step / 1e12
            for axes, x in ((left, steps), (right, steps * per_step)):
                axes.plot(
                    x, losses, STYLES.get(row, "-"), color=COLOURS[row], linewidth=1.2, label="" if place else name
                )
    left.set(xlabel="steps", ylabel="held-out nats per token", xscale="log")
    right.set(xlabel="training TFLOPs", xscale="log")
    _number(left.xaxis)
    _number(right.xaxis)
    if left.get_legend_handles_labels()[0]:
        figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    return style.png(figure)


@style.styled
def frontier(sweep: Sweep) -> bytes:
    """Generative perplexity against entropy over temperatures, and against tokens per second at temperature 1."""
    figure = style.new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    shades = (style.INK, style.BLUE, style.VERMILLION, style.ORANGE)
    import study

    for streams, colour in zip((1, 2, 4, 8), shades, strict=True):
        points = []
        for temperature in study.TEMPERATURES:
            found = [
                figures.figure(
                    sweep, figures.CURRICULUM, figures.generated(what, streams, temperature=temperature)
                ).get(0)
                for what in ("entropy_nats", "generative_perplexity", "tokens_per_second")
            ]
            if None not in found:
                points.append((temperature, *found))
        if points:
            at, entropy, perplexity, speed = np.array(points, float).T
            left.plot(entropy, perplexity, "o-", color=colour, label=f"S = {streams}", markersize=4)
            right.plot(speed[at == 1], perplexity[at == 1], "o", color=colour, label=f"S = {streams}")
            if streams == 1:
                for temperature, x, y in zip(at, entropy, perplexity, strict=True):
                    left.annotate(f"{temperature:g}", (x, y), textcoords="offset points", xytext=(-4, 7), fontsize=9)
    real, entropy_of_real = (figures.of_real_text(sweep, what) for what in ("generative_perplexity", "entropy_nats"))
    if real is not None and entropy_of_real is not None:
        left.plot(entropy_of_real, real, "*", color=style.SKY, markersize=12, label="real text")
    left.set(xlabel="entropy of a text's tokens, nats", ylabel="generative perplexity", yscale="log")
    right.set(xlabel="tokens per second, temperature 1", ylabel="generative perplexity")
    _number(left.yaxis)
    _legend(left)
    return style.png(figure)


@style.styled
def sizes(sweep: Sweep) -> bytes:
    """Held-out loss against the parameters, with a power law through each kind of model."""
    figure = style.new_figure(6.5, 4.2)
    axes = figure.subplots()
    kinds = {"AR": ("AR", style.INK), "ARMD-identity": ("ARMD, identity order", style.BLUE)}
    for kind, (name, colour) in kinds.items():
        found = np.array(figures.widths(sweep, kind))
        if len(found):
            axes.plot(found[:, 0], found[:, 2], "o", color=colour, label=name)
        if len(found) > 2:
            factor, exponent = figures.power_law(found[:, 0], found[:, 2])
            several = np.geomspace(found[0, 0], found[-1, 0], 50)
            axes.plot(several, factor * several**-exponent, color=colour, linewidth=1)
    ticks = sorted({one[0] for kind in kinds for one in figures.widths(sweep, kind)})
    axes.set(xscale="log", xlabel="parameters", ylabel="test nats per token")
    axes.set_xticks(ticks, [f"{tick / 1e6:.1f}M" for tick in ticks])
    axes.minorticks_off()
    _legend(axes)
    return style.png(figure)


def _number(axis: Any) -> None:
    """Plain numbers on a logarithmic axis: its own are formulas, which the common style does not set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _legend(axes: Any) -> None:
    """A legend, if there is anything to name: a short form of the study lacks some rows."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)

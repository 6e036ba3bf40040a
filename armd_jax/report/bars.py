"""The pictures that compare figures: likelihoods under different orders, speeds with different numbers of streams."""

from collections.abc import Sequence
from typing import assert_never

from armd_jax.evaluation.results import Row, Sample
from armd_jax.report.style import BLUE, ORANGE, SKY, VERMILLION, ink_on, new_figure, png, styled


@styled
def likelihoods(rows: Sequence[tuple[Row, float]], unit: str) -> bytes:
    """One bar for each order, and a dashed line for the compressor.

    rows: rows of the table, each with the number that is drawn, in `unit`.
    """
    bars: list[tuple[str, float, str]] = []
    compressed = None
    for row, value in rows:
        match row.kind:
            case "exact":
                bars.append((row.name, value, BLUE))
            case "order":
                bars.append((row.name, value, SKY))
            case "bound":
                bars.append((row.name, value, ORANGE))
            case "compressor":
                compressed = value
            case "baseline":
                pass  # it is no order of the model, and its long bar would squeeze the others
            case _:
                assert_never(row.kind)
    figure = new_figure(8, 0.9 + 0.48 * len(bars))
    axes = figure.subplots()
    names, values, colors = zip(*bars, strict=True)
    axes.barh(names, values, color=colors, height=0.65)
    top = max([*values, compressed or 0.0])
    for number, (_, value, color) in enumerate(bars):
        axes.text(0.015 * top, number, f"{value:.3f}", va="center", color=ink_on(color), fontweight="bold")
    if compressed is not None:
        axes.axvline(compressed, color=VERMILLION, linestyle="--", linewidth=2)
        axes.text(compressed, -0.62, f" xz: {compressed:.3f}", color=VERMILLION, va="bottom", fontweight="bold")
    axes.set(xlabel=f"{unit} (shorter is better)", xlim=(0, 1.15 * top), ylim=(len(bars) - 0.5, -1.1))
    return png(figure)


@styled
def speed(drawn: Sequence[Sample]) -> bytes:
    """Tokens per second and network calls for each way of writing."""
    names = [sample.label.replace(", ", ",\n") for sample in drawn]
    figure = new_figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    base = next((sample.tokens_per_second for sample in drawn if sample.streams == 1), None)
    rates, calls = [sample.tokens_per_second for sample in drawn], [sample.num_calls for sample in drawn]
    speedups = [f"\n×{rate / base:.2f}" if base else "" for rate in rates]
    labels = [f"{rate:,.0f}{times}" for rate, times in zip(rates, speedups, strict=True)]
    left.bar_label(left.bar(names, rates, color=BLUE, width=0.65), labels=labels, padding=2)
    left.set(title="tokens per second", ylim=(0, 1.28 * max(rates)))
    right.bar_label(right.bar(names, calls, color=ORANGE, width=0.65), padding=2)
    right.set(title="network calls (NFE) for one text", ylim=(0, 1.15 * max(calls)))
    return png(figure)

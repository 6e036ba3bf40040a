"""The picture of how training went: losses and learning rate over the steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from armd_jax.core.curriculum import Phase
from armd_jax.report import phases as bands
from armd_jax.report.style import BLUE, INK, SKY, VERMILLION, new_figure, png, styled

_LARGEST = 1e30  # a number beyond this is no loss and no step, and axes cannot be divided so far


@styled
def picture(rows: Sequence[Mapping[str, Any]], phases: Sequence[Phase]) -> bytes:
    """Training and held-out loss over the steps, the learning rate below, and bands for the phases.

    rows: the rows of `metrics.jsonl`.
    """
    steps, nll = _series(rows, "train/nll")
    eval_steps, eval_nll = _series(rows, "eval/nll")
    rate_steps, rate = _series(rows, "train/learning_rate")
    last = max([1.0, *steps, *eval_steps])
    figure = new_figure(8, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bands.shade(top, phases, last)
    bands.shade(bottom, phases, last, labels=False)
    if len(steps):
        top.plot(steps, nll, color=SKY, linewidth=0.8, alpha=0.7, label="training, every logged step")
        top.plot(steps, _smooth(nll), color=BLUE, linewidth=2, label="training, smoothed")
    if len(eval_steps):
        bounds, _ = _series(rows, "eval/nll_upper_bound")
        label = "held-out text, bound (negative ELBO)" if len(bounds) else "held-out text, left to right"
        top.plot(eval_steps, eval_nll, "o-", color=VERMILLION, linewidth=1.5, markersize=5, label=label)
        top.annotate(
            f"{eval_nll[-1]:.3f}",
            (eval_steps[-1], eval_nll[-1]),
            xytext=(-4, 10),
            textcoords="offset points",
            ha="right",
            color=VERMILLION,
            fontweight="bold",
        )
    top.set(ylabel="loss (nats per token)", xlim=(0, last))
    if top.get_legend_handles_labels()[0]:
        top.legend(frameon=True, framealpha=0.85, edgecolor="none")
    top.grid(axis="y", color="#dddddd", linewidth=0.6)
    bottom.plot(rate_steps, rate, color=INK, linewidth=1.5)
    bottom.set(ylabel="learning\nrate", xlabel="training step", ylim=(0, None))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return png(figure)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, without rows that lack it and without values that are not finite."""
    pairs = [(row.get("step"), row.get(name)) for row in rows]
    found = [(step, value) for step, value in pairs if _is_number(step) and _is_number(value)]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def _is_number(value: Any) -> bool:
    # Numbers that JSON holds may be NaN, infinite, or whole numbers that no float holds.
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a thirtieth of the curve, with narrower windows at the ends."""
    half = min(len(values) // 60 + 1, len(values) - 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), half)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)

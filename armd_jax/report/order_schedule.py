"""The picture of the order schedule: its phases over the steps, and orders that training draws in each of them."""

import dataclasses
import math
import string
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import Config
from armd_jax.core import curriculum
from armd_jax.core.curriculum import Phase
from armd_jax.core.order import Order
from armd_jax.order_config import mixture
from armd_jax.report import phases as bands
from armd_jax.report.style import BLUE, VERMILLION, new_figure, png, styled
from armd_jax.training import step as training_step

_COLUMNS = 3  # panels side by side
_PANEL_HEIGHT = 3.0  # inches
_MOMENTS = {
    "identity": (0.5,),
    "rising": (0.33, 0.95),
    "constant": (0.5,),
}  # fractions of a phase that are worth seeing


@dataclasses.dataclass(frozen=True)
class _Example:
    """An order that training draws at a step; positions and blocks [N], in generation order."""

    phase: str
    step: int
    positions: np.ndarray
    blocks: np.ndarray

    @property
    def num_blocks(self) -> int:
        return int(self.blocks[-1])

    @property
    def title(self) -> str:
        largest = int(np.bincount(self.blocks).max())
        together = f"\nup to {largest} tokens per network call" if largest > 1 else ""
        return f"step {self.step:,}, {self.phase}{together}"


@styled
def picture(config: Config) -> bytes:
    """The phases, the number of shuffled tokens k if the schedule has one, and below them orders at a few steps."""
    length, total = config.model.max_length, config.training.num_steps
    phases = curriculum.phases(config.order, total)
    examples = _examples(config, phases)
    rows = math.ceil(len(examples) / _COLUMNS)
    steps = np.unique(np.concatenate([np.linspace(0, total - 1, 400).astype(int), [e.step for e in examples]]))
    shuffled = curriculum.shuffled_tokens(config.order, jnp.asarray(steps))
    height = 1.5 if shuffled is None else 3.2
    figure = new_figure(9, height + 0.2 + _PANEL_HEIGHT * rows)
    heights = [height, _PANEL_HEIGHT * rows]
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights, hspace=0.04).ravel()
    axes = upper.subplots()
    bands.shade(axes, phases, total)
    sbp = next((phase for phase in phases if phase.name == "SBP"), None)
    if shuffled is None:
        axes.set(yticks=[], ylim=(0, 1))
    else:
        before = steps < (sbp.first if sbp else total)
        axes.plot(steps[before], np.asarray(shuffled)[before], color=BLUE, linewidth=2.5, drawstyle="steps-post")
        axes.set(ylabel="shuffled tokens k", ylim=(0, 1.25 * max(config.order.max_permuted, 1)))
    for letter, example in zip(string.ascii_uppercase, examples, strict=False):
        axes.axvline(example.step, color=VERMILLION, linewidth=1, linestyle=":")
        axes.text(
            example.step, 0.93, letter, transform=axes.get_xaxis_transform(), ha="center", va="top",
            color="white", fontweight="bold", bbox={"boxstyle": "circle,pad=0.2", "fc": VERMILLION, "ec": "none"},
        )  # fmt: skip
    if sbp:
        streams = ", ".join(map(str, config.order.streams))
        axes.text(
            (sbp.first + sbp.end) / 2, 0.06, f"S from {streams}", transform=axes.get_xaxis_transform(),
            ha="center", rotation=90 if sbp.end - sbp.first < 0.12 * total else 0, color="#00664b",
            bbox={"fc": bands.COLORS[sbp.name], "ec": "none", "pad": 1},
        )  # fmt: skip
    axes.set(xlabel="training step", xlim=(0, total))
    panels = lower.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[len(examples) :]:
        panel.set_axis_off()
    for number, (panel, example) in enumerate(zip(panels, examples, strict=False)):
        size = float(np.clip(3000 / length, 3, 40))
        panel.scatter(np.arange(length), example.positions, c=example.blocks, cmap="viridis", s=size, linewidths=0)
        panel.set_title(f"{string.ascii_uppercase[number]}: {example.title}", fontsize=11)
        if number % _COLUMNS == 0:
            panel.set_ylabel("position in the text")
        if number + _COLUMNS >= len(examples):
            panel.set_xlabel("n-th token generated")
            panel.tick_params(labelbottom=True)
    return png(figure)


def _examples(config: Config, phases: tuple[Phase, ...]) -> list[_Example]:
    """Orders worth seeing, as training draws them, by step: some of every phase, and one of each kind that is mixed in.

    A phase has none if it is so short that all its steps draw kinds that are mixed in.
    """
    draw = jax.jit(lambda step: training_step.draw_task(config, step, config.model.max_length))
    total, mixed = config.training.num_steps, mixture(config.order)
    part = lambda step: curriculum.part_of_step(config.order, training_step.task_key(config, step))  # noqa: E731
    parts = np.asarray(jax.jit(jax.vmap(part))(jnp.arange(total))) if mixed else np.zeros(total, np.int32)

    def example(name: str, steps: np.ndarray, wanted: int) -> _Example:
        step = int(steps[np.argmin(np.abs(steps - wanted))])
        drawn = draw(step)
        assert isinstance(drawn, Order)  # a model without orders has no such picture
        return _Example(name, step, np.asarray(drawn.positions_BN[0]), np.asarray(drawn.block_BN[0]))

    examples: list[_Example] = []
    for phase in phases:
        steps = phase.first + np.flatnonzero(parts[phase.first : phase.end] == 0)
        if not len(steps):
            continue
        drawn = [example(phase.name, steps, step) for step in _steps_at(phase, np.linspace(0.1, 0.9, 9))]
        by_blocks = {one.num_blocks: one for one in reversed(drawn)}
        if len(by_blocks) > 1:  # blocks change from step to step, as the number of streams does: show some that differ
            examples += [by_blocks[number] for number in sorted(by_blocks)[: 2 if len(phases) > 1 else 3]]
        else:
            fractions = _MOMENTS.get(phase.name, (0.1, 0.4, 0.7))
            moments = [example(phase.name, steps, step) for step in _steps_at(phase, fractions)]
            examples += {one.positions.tobytes(): one for one in reversed(moments)}.values()  # no order twice
    for number, (kind, _) in enumerate(mixed, start=1):
        steps = np.flatnonzero(parts == number)
        if len(steps):
            examples.append(example(kind.replace("_", " "), steps, number * total // (len(mixed) + 1)))
    return sorted(examples, key=lambda one: one.step)


def _steps_at(phase: Phase, fractions: Iterable[float]) -> list[int]:
    return [phase.first + int(fraction * (phase.end - phase.first)) for fraction in fractions]

"""Draws decoding.png, a picture of armd_jax/README.md: what every network call of the sampler reads and writes.

    python experiments/pictures/decoding.py

A prompt of two words is continued by six more in two streams. The blocks are those that the package's own schedule has.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from armd_jax.inference import schedule

BLUE, ORANGE, PALE, GREY, INK = "#0072b2", "#e69f00", "#a8cfe8", "#ececec", "#222222"
WORDS = ("the", "old", "fox", "runs", "and", "a", "bird", "sings")
PROMPT = 2
WIDTH = 9.6  # of a call's column, in words
LANES = {
    "X rows:\nwords read now": 6.2,
    "cache of X:\nkeys and values of the\ntwo-stream layers": 4.7,
    "G rows:\nwords predicted": 2.7,
    "cache of G:\nkeys and values of the\ncausal layers": 1.2,
    "text so far": -0.4,
}


def chips(axes: plt.Axes, x: float, y: float, words: list[str], colors: list[str]) -> None:
    """Words in coloured boxes, from left to right."""
    for place, (word, color) in enumerate(zip(words, colors, strict=True)):
        axes.add_patch(plt.Rectangle((x + place * 1.05, y), 1.0, 0.75, color=color, lw=0))
        ink = "white" if color == BLUE else INK
        axes.text(x + place * 1.05 + 0.5, y + 0.36, word, ha="center", va="center", fontsize=9, color=ink)


def main() -> None:
    """Writes the picture beside this file."""
    known_1N = np.where(np.arange(len(WORDS)) < PROMPT, 0, schedule.FREE)[None]
    order, call_1N = schedule.order_of(known_1N, 2)
    positions = np.asarray(order.positions_BN[0])
    in_order = [WORDS[position] for position in positions]
    _, starts, counts = np.unique(call_1N[0, positions[PROMPT:]], return_index=True, return_counts=True)
    starts += PROMPT
    x_lane, x_cache, g_lane, g_cache, text_lane = LANES.values()

    figure, axes = plt.subplots(figsize=(18.5, 5.6))
    for label, y in LANES.items():
        axes.text(-0.4, y + 0.36, label, ha="right", va="center", fontsize=10.5, color=INK)
    context = ["start", *in_order]
    # (title, where the rows of X begin and end in the context, where those of G begin and end in the order)
    columns = [("reading the prompt", 0, PROMPT, 0, PROMPT)]
    for call, (start, count) in enumerate(zip(starts, counts, strict=True)):
        columns.append((f"call {call + 1}", columns[-1][2], start + 1, start, start + count))
    for number, (title, x_start, x_end, g_start, g_end) in enumerate(columns):
        left = number * WIDTH
        read, kept, before, new = context[x_start:x_end], context[:x_start], in_order[:g_start], in_order[g_start:g_end]
        # What the prompt's rows of G predict is known already: it is scored, and nothing is drawn.
        color = ORANGE if number else PALE
        axes.text(left, 7.5, title, fontsize=13, fontweight="bold", color=INK)
        chips(axes, left, x_lane, read, [BLUE] * len(read))
        chips(axes, left, x_cache, kept + read, [PALE] * len(kept) + [BLUE] * len(read))
        chips(axes, left, g_lane, new, [color] * len(new))
        chips(axes, left, g_cache, before + new, [PALE] * len(before) + [color] * len(new))
        known = set(in_order[:g_end])
        colors = [color if word in new else PALE if word in known else GREY for word in WORDS]
        chips(axes, left, text_lane, [word if word in known else "" for word in WORDS], colors)
        if number + 1 < len(columns):
            arrow = {"arrowstyle": "-|>", "color": ORANGE, "lw": 1.6, "connectionstyle": "arc3,rad=0.12"}
            tail = left + len(new) * 1.05 + 0.05
            axes.annotate("", xy=(left + WIDTH - 0.1, x_lane + 0.36), xytext=(tail, g_lane + 0.36), arrowprops=arrow)
    axes.set(xlim=(-5.6, len(columns) * WIDTH - 0.9), ylim=(-0.7, 8.2))
    axes.axis("off")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.99, bottom=0.01)
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()

"""Draws overview.png, the picture of the front page: how three kinds of model write a text of eight words.

    python experiments/pictures/overview.py

The order of the ARMD is the one that the package draws for two streams; that of the masked diffusion is one draw with
four time steps.
"""

import pathlib

import jax
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

import armd_jax as armd

BLUE, ORANGE, GREY, INK = "#0072b2", "#e69f00", "#ececec", "#222222"
WORDS = ("the", "old", "fox", "runs", "and", "a", "bird", "sings")
COLUMNS = {
    "Autoregressive": (
        armd.order.left_to_right(1, 8),
        (
            "8 network calls, each reads 1 new word",
            "exact likelihood, in one order",
            "a training pass covers all 8 calls",
        ),
    ),
    "Masked diffusion": (
        armd.order.masked_diffusion(jax.random.key(5), 1, 8, 4),
        (
            "4 network calls, each reads the whole text",
            "a bound on the likelihood",
            "a training pass covers 1 of the 4 calls",
        ),
    ),
    "ARMD, 2 streams": (
        armd.order.strided(1, 8, streams=2),
        (
            "5 network calls, each reads 1 or 2 new words",
            "exact likelihood, in any order",
            "a training pass covers all 5 calls",
        ),
    ),
}


def draw_steps(axes: plt.Axes, order: armd.Order) -> None:
    """One line per network call: what was known before it, what it predicts, what is still unknown."""
    positions, blocks = np.asarray(order.positions_BN[0]), np.asarray(order.block_BN[0])
    block_of = blocks[np.argsort(positions)]
    for call in range(1, blocks[-1] + 1):
        for place, word in enumerate(WORDS):
            known, now = block_of[place] < call, block_of[place] == call
            color = BLUE if known else ORANGE if now else GREY
            box = FancyBboxPatch(
                (place + 0.06, -call + 0.1), 0.88, 0.8, boxstyle="round,pad=0,rounding_size=0.12", color=color, lw=0
            )
            axes.add_patch(box)
            if known or now:
                ink = "white" if known else INK
                axes.text(place + 0.5, -call + 0.5, word, ha="center", va="center", fontsize=10, color=ink)
    axes.set(xlim=(0, 8), ylim=(-8.05, 0.1))
    axes.axis("off")


def main() -> None:
    """Writes the picture beside this file."""
    figure, columns = plt.subplots(1, 3, figsize=(15, 5.1))
    for axes, (title, (order, notes)) in zip(columns, COLUMNS.items(), strict=True):
        draw_steps(axes, order)
        axes.set_title(title, fontsize=16, fontweight="bold", color=INK, loc="left", pad=12)
        axes.text(0.06, -8.3, "\n".join(notes), fontsize=12.5, color=INK, va="top", linespacing=1.6)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.89, bottom=0.29, wspace=0.06)
    labels = {"known": BLUE, "predicted by this call": ORANGE, "not known yet": GREY}
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in labels.values()]
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=12.5, bbox_to_anchor=(0.5, 0.0))
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()

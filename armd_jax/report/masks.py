"""The picture of the block masks: which tokens may look at which, under a small order of every kind."""

import math
from typing import TYPE_CHECKING

import jax
import numpy as np

from armd_jax import typed
from armd_jax.core import block_mask, curriculum
from armd_jax.core import order as orders
from armd_jax.core.order import Order
from armd_jax.names import OrderKind
from armd_jax.order_config import OrderConfig
from armd_jax.report.style import BLUE, FAINT, ORANGE, new_figure, png, styled

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_LENGTH = 8
_SEED = 16  # chosen so that all four shuffled tokens move, and blocks that are drawn differ in size
# Drawn at step 1 of 2, where the curriculum is at its end.
_SMALL = {"ar_steps": 0, "permute_steps": 1, "max_permuted": 4, "streams": (2,), "diffusion_steps": 4, "max_block": 3}
_EVIDENCE = (2, 5)


def examples() -> list[tuple[str, Order]]:
    """A title and a small order of every kind that training can draw, and one that begins with evidence."""
    found = []
    for kind in typed.choices(OrderKind):
        config = typed.build(OrderConfig, {"kind": kind, **_SMALL})
        drawn = curriculum.draw(config, jax.random.key(_SEED), jax.numpy.int32(1), num_steps=2, batch=1, length=_LENGTH)
        found.append((curriculum.describe(config), drawn))
    evidence = np.zeros(_LENGTH, bool)
    evidence[list(_EVIDENCE)] = True
    title = f"evidence {' and '.join(map(str, _EVIDENCE))} first, then strided, S = 2"
    return [*found, (title, orders.strided(1, _LENGTH, 2, evidence=evidence))]


@styled
def picture() -> bytes:
    """Both block masks of every example: rows are tokens to predict, columns are the tokens that they may see."""
    from matplotlib.patches import Patch

    shown = examples()
    rows = math.ceil(len(shown) / 2)
    figure = new_figure(13, 0.6 + 3.53 * rows)
    cells = figure.subfigures(rows, 2, squeeze=False, wspace=0.02, hspace=0.02).ravel()
    for (title, order), cell in zip(shown, cells, strict=False):  # of an odd number, the last cell stays empty
        cell.suptitle(title, fontweight="bold", fontsize=13)
        _pair(cell, order)
    names = ("seen: an earlier block", "seen: its own block (causal mask only)", "hidden")
    handles = [Patch(color=color, label=name) for color, name in zip((BLUE, ORANGE, FAINT), names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    return png(figure)


def _pair(cell: "SubFigure", order: Order) -> None:
    """The strictly causal and the causal mask of an order side by side."""
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([FAINT, BLUE, ORANGE])
    mask = block_mask.build(order)
    positions, blocks = np.asarray(order.positions_BN[0]), np.asarray(order.block_BN[0])
    keys = len(positions) + 1
    strict = np.asarray(block_mask.dense(mask.strict_len_BN, keys)[0])
    causal = np.asarray(block_mask.dense(mask.causal_len_BN, keys)[0])
    pairs = (("strictly causal (stream G)", strict), ("causal (all other attention)", causal))
    for axes, (name, seen) in zip(cell.subplots(1, 2), pairs, strict=True):
        axes.imshow(seen.astype(int) + (seen & ~strict), cmap=colors, vmin=0, vmax=2, aspect="equal")
        axes.set_anchor("N")
        axes.set_title(name, fontsize=11)
        axes.set_xticks(range(keys), ["start", *map(str, positions)], fontsize=9)
        axes.get_xticklabels()[0].set_rotation(90)
        labels = [f"{p}  (block {b})" for p, b in zip(positions, blocks, strict=True)]
        axes.set_yticks(range(len(positions)), labels if seen is strict else list(map(str, positions)), fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        # White lines part the tokens, and thick ones the blocks.
        lines = np.arange(keys)
        widths = np.where(np.diff(blocks, prepend=0, append=blocks[-1] + 1) > 0, 2.0, 0.4)
        axes.hlines(lines - 0.5, -0.5, keys - 0.5, colors="#ffffff", linewidths=widths)
        axes.vlines(lines + 0.5, -0.5, keys - 1.5, colors="#ffffff", linewidths=widths)
        axes.set_xlabel("token that is seen (position)", fontsize=10)
        if seen is strict:
            axes.set_ylabel("token to predict (position)", fontsize=10)

"""Weights laid out for the products of decoding on CPU, which have a few rows each.

XLA's own product of a few rows with a weight [D, F] walks down columns that lie F numbers apart, at a third of the
speed at which a core reads memory. Cut into panels of a few dozen columns, each of which lies in one piece, and written
as a sum of products, the same weight is read once from end to end: twice as fast at 2 and 4 rows, equal at 16. A single
row is better off with the ordinary product, and so is an accelerator.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

_WIDTHS = (64, 32)  # columns a panel, the first that fits
_PANEL = 64 * 512  # numbers a panel has at most, by which D bounds its width: every row reads it again, out of a cache


@flax.struct.dataclass
class Panels:
    """A weight [D, ...] in panels of W columns.

    panels_PDW: column w of panel p is column p W + w of the weight, its axes after the first taken as one.
    outer: the shape of those axes.
    """

    panels_PDW: jax.Array
    outer: tuple[int, ...] = flax.struct.field(pytree_node=False)


def few_rows(rows: int) -> bool:
    """Whether panels are the better layout for a product of so many rows."""
    return 2 <= rows <= 16


def cut(weight: jax.Array) -> Panels | jax.Array:
    """The weight [D, ...] in panels; as it is where its columns do not fill whole panels."""
    columns = math.prod(weight.shape[1:])
    fitting = [width for width in _WIDTHS if columns % width == 0]
    if not fitting:
        return weight
    width = next((width for width in fitting if width * weight.shape[0] <= _PANEL), fitting[-1])
    panels_DPW = weight.reshape(weight.shape[0], columns // width, width)
    return Panels(jnp.moveaxis(panels_DPW, 1, 0), weight.shape[1:])


def product(rows_BRD: jax.Array, weight: Panels) -> jax.Array:
    """rows [B, R, D] times the weight [D, ...]: [B, R, ...] float32.

    The rows must be data, not a broadcast of one row that XLA sees through: such a sum of products its CPU library of
    jaxlib 0.10 gets wrong (and one row it computes twenty times slower than the ordinary product).
    """
    batch, rows, width = rows_BRD.shape
    # The barrier keeps XLA from sharing one broadcast copy of the rows between products: as large as the weight.
    rows_MD, panels_PDW = jax.lax.optimization_barrier((rows_BRD.reshape(-1, width), weight.panels_PDW))
    out_PMW = jnp.sum(panels_PDW[:, None] * rows_MD[None, :, :, None], axis=2)
    return jnp.moveaxis(out_PMW, 0, 1).reshape(batch, rows, *weight.outer)

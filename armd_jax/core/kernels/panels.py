"""A layout of weights for decoding on CPU, whose matrix products have only a few rows.

If XLA multiplies a few rows with a weight [D, F], it walks down columns whose numbers are F apart in memory, at a
third of the speed at which a core can read. Here the weight is cut into panels of a few dozen columns, each of them
contiguous in memory, and the product is written as a sum of products. The weight is then read once from end to end,
which is twice as fast at 2 and 4 rows and equally fast at 16. For a single row, and on accelerators, the ordinary
product is faster.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

_WIDTHS = (64, 32)  # columns per panel; the first of these that fits is taken
_FEW = 16  # rows; with more, the ordinary product is as fast
# A panel has at most this many numbers, so that it stays in the cache while row after row reads it.
_PANEL = 64 * 512


@flax.struct.dataclass
class Panels:
    """A weight [D, ...] in panels of W columns.

    panels_PDW: column w of panel p is column p W + w of the weight, whose axes after the first count as one.
    outer: the shape of those axes.
    """

    panels_PDW: jax.Array
    outer: tuple[int, ...] = flax.struct.field(pytree_node=False)


def few_rows(rows: int) -> bool:
    """Whether panels are the faster layout for a product with this many rows."""
    return 2 <= rows <= _FEW


def cut(weight: jax.Array) -> Panels | jax.Array:
    """The weight [D, ...] in panels, or unchanged if its columns do not fill at least two panels."""
    columns = math.prod(weight.shape[1:])
    # Of a weight that is a single panel, the CPU library of jaxlib 0.10 computes SwiGLU's two products wrongly.
    fitting = [width for width in _WIDTHS if columns % width == 0 and columns > width]
    if not fitting:
        return weight
    width = next((width for width in fitting if width * weight.shape[0] <= _PANEL), fitting[-1])
    panels_DPW = weight.reshape(weight.shape[0], columns // width, width)
    return Panels(jnp.moveaxis(panels_DPW, 1, 0), weight.shape[1:])


def product(rows_BRD: jax.Array, weight: Panels) -> jax.Array:
    """Multiplies rows [B, R, D] with a weight [D, ...] over D. Returns [B, R, ...] float32.

    The rows must be real data. If XLA can see that they are copies of one row, the CPU library of jaxlib 0.10 computes
    this sum of products wrongly. With a single row it is right, but twenty times slower than the ordinary product.
    """
    batch, rows, width = rows_BRD.shape
    if batch * rows > _FEW:
        out_PMW = jnp.einsum("MD,PDW->PMW", rows_BRD.reshape(-1, width), weight.panels_PDW)
        return jnp.moveaxis(out_PMW, 0, 1).reshape(batch, rows, *weight.outer)
    # Without the barrier XLA makes one broadcast copy of the rows, as large as the weight, to share between products.
    rows_MD, panels_PDW = jax.lax.optimization_barrier((rows_BRD.reshape(-1, width), weight.panels_PDW))
    out_PMW = jnp.sum(panels_PDW[:, None] * rows_MD[None, :, :, None], axis=2)
    return jnp.moveaxis(out_PMW, 0, 1).reshape(batch, rows, *weight.outer)

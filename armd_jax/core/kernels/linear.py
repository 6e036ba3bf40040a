"""A matrix product of rows with a weight. Its gradient is arranged so that the wider operand is never transposed."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from armd_jax.core.kernels import panels
from armd_jax.core.kernels.panels import Panels


def linear(rows_BRD: jax.Array, weight: jax.Array | Panels, dtype: jnp.dtype | None = None) -> jax.Array:
    """Multiplies rows [B, R, D] with a weight [D, ...] over D. Returns [B, R, ...].

    dtype: of the sums and the result; None: that of the rows. A weight in panels serves decoding only: its result is
    float32, and there is no gradient rule.
    """
    return panels.product(rows_BRD, weight) if isinstance(weight, Panels) else _linear(rows_BRD, weight, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """The ordinary product, with a gradient rule of its own.

    The rule exists for speed on CPU. Autodiff computes the weight's gradient as (d out)^T rows, which needs a
    transposed copy of d out. If the output is wider than the input, XLA fills that copy column by column and computes
    the derivative of the operation after the product (GELU, say) a second time for it, which took two fifths of the
    time of a whole layer. `_backward` therefore orders the factors so that the narrower one is transposed.
    """
    return _product(rows_BRD, weight, dtype)


def _product(rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    return lax.dot_general(rows_BRD, weight, (((2,), (0,)), ((), ())), preferred_element_type=dtype)


def _forward(
    rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # This calls the plain product, because a rematerialisation policy that keeps products does not see into `_linear`.
    return _product(rows_BRD, weight, dtype), (rows_BRD, weight)


def _backward(
    dtype: jnp.dtype | None, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dtype
    rows_BRD, weight = saved
    outs = (tuple(range(2, d_out.ndim)), tuple(range(1, weight.ndim)))
    d_rows_BRD = lax.dot_general(d_out, weight, (outs, ((), ())), preferred_element_type=rows_BRD.dtype)
    over_rows = functools.partial(
        lax.dot_general, dimension_numbers=(((0, 1), (0, 1)), ((), ())), preferred_element_type=weight.dtype
    )
    if math.prod(weight.shape[1:]) >= weight.shape[0]:
        return d_rows_BRD, over_rows(rows_BRD, d_out)
    # The small transpose at the end must stay there: XLA on CPU would move it to the wide rows.
    d_weight = lax.platform_dependent(over_rows(d_out, rows_BRD), cpu=lax.optimization_barrier, default=lambda a: a)
    return d_rows_BRD, jnp.moveaxis(d_weight, -1, 0)


_linear.defvjp(_forward, _backward)

"""A matrix product with a weight, whose gradient is laid out so that the wide operand is never transposed."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from armd_jax.core.kernels import panels
from armd_jax.core.kernels.panels import Panels


def linear(rows_BRD: jax.Array, weight: jax.Array | Panels, dtype: jnp.dtype | None = None) -> jax.Array:
    """rows [B, R, D] times weight [D, ...] over D; [B, R, ...], summed and put out in `dtype` (the rows' by default).

    A weight in panels is for decoding: no gradient rule, float32.
    """
    return panels.product(rows_BRD, weight) if isinstance(weight, Panels) else _linear(rows_BRD, weight, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """The ordinary product, with a gradient rule of its own for the order of the weight's gradient: autodiff
    writes it as (d out)^T rows, and where the output is wider than the input XLA on CPU then computes the derivative
    of what follows a second time, column by column, for the transposed copy: two fifths of the time of a whole layer.
    """
    return _product(rows_BRD, weight, dtype)


def _product(rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    return lax.dot_general(rows_BRD, weight, (((2,), (0,)), ((), ())), preferred_element_type=dtype)


def _forward(
    rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `_linear` itself: a rematerialisation policy that keeps products does not look into it.
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
    # XLA would turn the small transpose at the end into one of the wide rows; on CPU it must not.
    d_weight = lax.platform_dependent(over_rows(d_out, rows_BRD), cpu=lax.optimization_barrier, default=lambda a: a)
    return d_rows_BRD, jnp.moveaxis(d_weight, -1, 0)


_linear.defvjp(_forward, _backward)

"""A matrix product of rows with a weight. Its gradient is arranged so that the wider operand is never transposed."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from armd_jax.core.kernels import panels
from armd_jax.core.kernels.panels import Panels

AtUse = Callable[[jax.Array], jax.Array]  # tells an array of a weight's shape how to lie on the mesh


def as_it_is(array: jax.Array) -> jax.Array:
    """The `AtUse` of a weight that needs no constraint, or has had it already."""
    return array


def linear(
    rows_BRD: jax.Array, weight: jax.Array | Panels, dtype: jnp.dtype | None = None, at_use: AtUse = as_it_is
) -> jax.Array:
    """Multiplies rows [B, R, D] with a weight [D, ...] over D. Returns [B, R, ...]. D may be several axes of both.

    The product is one of arrays in the dtype of the rows. The gradient of the weight is summed in the weight's own
    dtype, over the rows of a device and over devices.

    dtype: of the sums and the result; None: that of the rows. at_use: how weight and gradient lie on the mesh. A weight
    in panels serves decoding only: its result is float32, and there is no gradient rule.
    """
    return panels.product(rows_BRD, weight) if isinstance(weight, Panels) else _linear(rows_BRD, weight, dtype, at_use)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None, at_use: AtUse) -> jax.Array:
    """The ordinary product, with a gradient rule of its own.

    The rule exists for speed on CPU. Autodiff computes the weight's gradient as (d out)^T rows, which needs a
    transposed copy of d out. If the output is wider than the input, XLA fills that copy column by column and computes
    the derivative of the operation after the product (GELU, say) a second time for it, which took two fifths of the
    time of a whole layer. `_backward` therefore orders the factors so that the narrower one is transposed.

    It also keeps the cast of the weight inside. Outside, the gradient would be a sum over devices in the dtype of the
    rows, and in bfloat16 the sum of many devices loses what each of them adds.
    """
    return _product(rows_BRD, at_use(weight.astype(rows_BRD.dtype)), dtype)


def _product(rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    summed = rows_BRD.ndim - 2
    axes = tuple(range(2, 2 + summed)), tuple(range(summed))
    return lax.dot_general(rows_BRD, weight, (axes, ((), ())), preferred_element_type=dtype)


def _forward(
    rows_BRD: jax.Array, weight: jax.Array, dtype: jnp.dtype | None, at_use: AtUse
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # This calls the plain product, because a rematerialisation policy that keeps products does not see into `_linear`.
    return _product(rows_BRD, at_use(weight.astype(rows_BRD.dtype)), dtype), (rows_BRD, weight)


def _backward(
    dtype: jnp.dtype | None, at_use: AtUse, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dtype
    rows_BRD, weight = saved
    summed = rows_BRD.ndim - 2
    outs = (tuple(range(2, d_out.ndim)), tuple(range(summed, weight.ndim)))
    used = at_use(weight.astype(rows_BRD.dtype))
    d_rows_BRD = lax.dot_general(d_out, used, (outs, ((), ())), preferred_element_type=rows_BRD.dtype)
    over_rows = functools.partial(
        lax.dot_general, dimension_numbers=(((0, 1), (0, 1)), ((), ())), preferred_element_type=weight.dtype
    )
    if math.prod(weight.shape[summed:]) >= math.prod(weight.shape[:summed]):
        return d_rows_BRD, at_use(over_rows(rows_BRD, d_out))
    # The small transpose at the end must stay there: XLA on CPU would move it to the wide rows.
    d_weight = lax.platform_dependent(over_rows(d_out, rows_BRD), cpu=lax.optimization_barrier, default=lambda a: a)
    behind = weight.ndim - summed
    return d_rows_BRD, at_use(jnp.moveaxis(d_weight, range(behind), range(-behind, 0)))


_linear.defvjp(_forward, _backward)

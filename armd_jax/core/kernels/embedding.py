"""The embedding lookup, whose gradient is summed in float32 whatever the dtype of the activations."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

ConstrainTable = Callable[[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(dtype: jnp.dtype, constrain: ConstrainTable, embedding_VD: jax.Array, tokens_BX: jax.Array) -> jax.Array:
    """Rows of the float32 table, in the dtype of the activations. Their gradients are summed in float32.

    A frequent token occurs tens of thousands of times in a batch, and a bfloat16 sum stops growing after a few hundred
    terms.

    dtype: of the activations. constrain: tells an array of the table's shape how to lie on the mesh.
    """
    # The constraint gathers the table along the width before the lookup. Otherwise every device would look up its share
    # of the width for the rows of all devices, and the activations of the whole batch would have to be exchanged.
    return constrain(embedding_VD.astype(dtype))[tokens_BX]


def _forward(
    dtype: jnp.dtype, constrain: ConstrainTable, embedding_VD: jax.Array, tokens_BX: jax.Array
) -> tuple[jax.Array, tuple[int, jax.Array]]:
    return look_up(dtype, constrain, embedding_VD, tokens_BX), (embedding_VD.shape[0], tokens_BX)


def _backward(
    dtype: jnp.dtype, constrain: ConstrainTable, saved: tuple[int, jax.Array], d_BXD: jax.Array
) -> tuple[jax.Array, None]:
    vocab, tokens_BX = saved
    sums_VD = jnp.zeros((vocab, d_BXD.shape[-1]), jnp.float32).at[tokens_BX].add(d_BXD.astype(jnp.float32))
    return constrain(sums_VD), None


look_up.defvjp(_forward, _backward)

"""Looking tokens up in the embedding table, with a gradient that loses nothing to the activations' dtype."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

ConstrainTable = Callable[[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(dtype: jnp.dtype, constrain: ConstrainTable, embedding_VD: jax.Array, tokens_BX: jax.Array) -> jax.Array:
    """Rows of the float32 table in the activations' dtype; their gradients are summed in float32.

    A frequent token has tens of thousands of them in a batch, and a bfloat16 sum stands still after a few hundred.
    constrain: tells a table how to lie on the mesh.
    """
    # Rows are looked up in a table put together along the width: of a sharded one every device would look up its share
    # of the width for the rows of all devices, and the whole batch's activations would travel.
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

"""What decoding keeps between network calls: the keys and values of every layer, and the aggregator's state."""

import flax.struct
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core import aggregation


@flax.struct.dataclass
class Cache:
    """The decoding state of the network. Every layer has buffers of its own, which XLA updates in place.

    x_kv: for every two-stream layer (k [B H, K, N], v [B H, N, K]). Batch and heads share an axis because the matrix
        products of decoding read this layout without a transposition.
    g_kv: the same for every causal layer.
    aggregate: the state of the aggregator (see `core.aggregation`); None if it keeps none.
    """

    x_kv: tuple[tuple[jax.Array, jax.Array], ...]
    g_kv: tuple[tuple[jax.Array, jax.Array], ...]
    aggregate: jax.Array | None


def empty(config: ModelConfig, dtype: jnp.dtype, batch: int, length: int) -> Cache:
    """A cache for `length` tokens with keys and values in `dtype`."""
    heads, head_width = config.num_heads, config.head_width
    k_BHKT = jnp.zeros((batch * heads, head_width, length), dtype)
    v_BHTK = jnp.zeros((batch * heads, length, head_width), dtype)
    return Cache(
        x_kv=((k_BHKT, v_BHTK),) * config.two_stream_layers,
        g_kv=((k_BHKT, v_BHTK),) * (config.num_layers - config.two_stream_layers),
        aggregate=aggregation.make(config).empty_state(batch),
    )


def write(
    buffer: jax.Array, rows_BRHK: jax.Array, start: jax.Array | int, valid_BR: jax.Array | None, axes: str
) -> jax.Array:
    """Writes rows at key index `start` of a buffer [B H, ...] whose axes are `axes`; padding rows change nothing.

    valid_BR: bool, False for padding rows; None: all rows are valid.
    """
    axis = axes.index("T") - 1

    def as_buffer(a_BTHK: jax.Array) -> jax.Array:
        a = jnp.einsum(f"BTHK->{axes}", a_BTHK)
        return a.reshape(-1, *a.shape[2:])

    rows = as_buffer(rows_BRHK).astype(buffer.dtype)
    if valid_BR is not None:
        old = jax.lax.dynamic_slice_in_dim(buffer, start, rows.shape[axis], axis)
        rows = jnp.where(as_buffer(jnp.broadcast_to(valid_BR[..., None, None], rows_BRHK.shape)), rows, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis)

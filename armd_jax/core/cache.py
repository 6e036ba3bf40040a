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
        products of decoding read this layout without a transposition. H counts the heads of keys and values.
    g_kv: the same for every causal layer.
    aggregate: the state of the aggregator (see `core.aggregation`); None if it keeps none.
    """

    x_kv: tuple[tuple[jax.Array, jax.Array], ...]
    g_kv: tuple[tuple[jax.Array, jax.Array], ...]
    aggregate: jax.Array | None


def empty(config: ModelConfig, dtype: jnp.dtype, batch: int, length: int) -> Cache:
    """A cache for `length` tokens with keys and values in `dtype`."""
    heads, head_width = config.kv_heads, config.head_width
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

    start: one number, or int32 [B]. valid_BR: bool, False for padding rows; None: all rows are valid.
    """
    axis = axes.index("T") - 1

    def as_buffer(a_BTHK: jax.Array) -> jax.Array:
        a = jnp.einsum(f"BTHK->{axes}", a_BTHK)
        return a.reshape(-1, *a.shape[2:])

    rows = as_buffer(rows_BRHK).astype(buffer.dtype)
    valid = None
    if valid_BR is not None:
        valid = as_buffer(jnp.broadcast_to(valid_BR[..., None, None], rows_BRHK.shape))
    if jnp.ndim(start):
        batch, heads = rows_BRHK.shape[0], rows_BRHK.shape[2]
        if batch > 1:
            put = jax.vmap(put_at, (0, 0, 0, None, None if valid is None else 0))
            return put(buffer, rows, jnp.repeat(jnp.asarray(start), heads), axis - 1, valid)
        start = jnp.reshape(start, ())
    return put_at(buffer, rows, start, axis, valid)


def put_at(
    buffer: jax.Array, values: jax.Array, start: jax.Array | int, axis: int, valid: jax.Array | None
) -> jax.Array:
    """The buffer with values from `start` on along an axis; what is not valid (None: all is) stays as it was."""
    if valid is not None:
        old = jax.lax.dynamic_slice_in_dim(buffer, start, values.shape[axis], axis)
        values = jnp.where(valid, values, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer, values, start, axis)

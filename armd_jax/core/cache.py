"""What decoding keeps between network calls: keys and values of every layer, and the aggregation's state."""

import flax.struct
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """Decoding state of the network. One buffer a layer: separate buffers are updated in place.

    x_kv: for every two-stream layer (k [B H, K, N], v [B H, N, K]), batch and heads on one axis: the layout that the
        matrix products of decoding read as it lies.
    g_kv: the same for every causal layer.
    aggregate: state of the aggregation: positional [B, P, D], mean [B, D], shift none; float32.
    """

    x_kv: tuple[tuple[jax.Array, jax.Array], ...]
    g_kv: tuple[tuple[jax.Array, jax.Array], ...]
    aggregate: jax.Array | None


def empty(config: ModelConfig, dtype: jnp.dtype, batch: int, length: int) -> Cache:
    """A cache for `length` tokens with keys and values in `dtype`."""
    heads, head_width = config.num_heads, config.width // config.num_heads
    k_BHKT = jnp.zeros((batch * heads, head_width, length), dtype)
    v_BHTK = jnp.zeros((batch * heads, length, head_width), dtype)
    pairs = lambda count: tuple((k_BHKT, v_BHTK) for _ in range(count))  # noqa: E731
    state = {
        "positional": (batch, config.positional_width, config.width),
        "mean": (batch, config.width),
    }.get(config.aggregator)
    return Cache(
        x_kv=pairs(config.two_stream_layers),
        g_kv=pairs(config.num_layers - config.two_stream_layers),
        aggregate=None if state is None else jnp.zeros(state, jnp.float32),
    )


def write(
    buffer: jax.Array, rows_BRHK: jax.Array, start: jax.Array | int, valid_BR: jax.Array | None, axes: str
) -> jax.Array:
    """Writes rows at key index `start` of a buffer [B H, ...] with these axes; padding rows leave what is there."""
    axis = axes.index("T") - 1

    def as_buffer(a_BTHK):
        a = jnp.einsum(f"BTHK->{axes}", a_BTHK)
        return a.reshape(-1, *a.shape[2:])

    rows = as_buffer(rows_BRHK).astype(buffer.dtype)
    if valid_BR is not None:
        old = jax.lax.dynamic_slice_in_dim(buffer, start, rows.shape[axis], axis)
        rows = jnp.where(as_buffer(jnp.broadcast_to(valid_BR[..., None, None], rows_BRHK.shape)), rows, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis)

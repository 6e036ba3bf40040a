"""Prefix aggregation: the first strictly causal vector of every target (paper section 4)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core.attention import chunk_size
from armd_jax.core.rows import Rows


def sinusoidal(positions: jax.Array, width: int) -> jax.Array:
    """PE [..., P] float32 (Vaswani et al. 2017), scaled so that PE(a) . PE(a) = 1."""
    half = width // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1) * half**-0.5


def _weighted_prefix(
    x_BXD: jax.Array,
    x_code_BXP: jax.Array | None,
    g_code_BGP: jax.Array | None,
    low_BG: jax.Array,
    high_BG: jax.Array,
    first: jax.Array | int,
    chunk: int,
) -> jax.Array:
    """sum over context tokens low <= i < high of <g_code, x_code_i> x_i (weight 1 without codes) [B, G, D] float32.

    x row 0 is context token `first`. A scan over chunks of rows; sums of what may be seen, never a difference of sums.
    """
    batch, num_x, _ = x_BXD.shape
    num_chunks = -(-num_x // chunk)
    size = min(chunk, num_x)

    def split(a):
        padded = jnp.pad(a, ((0, 0), (0, num_chunks * size - num_x), (0, 0)))
        return jnp.moveaxis(padded.reshape(batch, num_chunks, size, a.shape[-1]), 1, 0)

    @jax.checkpoint
    def step(sum_BGD, inputs):
        number, x, code = inputs
        index = first + number * size + jnp.arange(size)
        seen_BGX = (index >= low_BG[..., None]) & (index < high_BG[..., None])
        weight_BGX = seen_BGX.astype(jnp.float32)
        if code is not None:
            weight_BGX = weight_BGX * jnp.einsum("BGP,BXP->BGX", g_code_BGP, code)
        return sum_BGD + jnp.einsum("BGX,BXD->BGD", weight_BGX, x.astype(jnp.float32)), None

    start = jnp.zeros((batch, low_BG.shape[1], x_BXD.shape[-1]), jnp.float32)
    inputs = (jnp.arange(num_chunks), split(x_BXD), None if x_code_BXP is None else split(x_code_BXP))
    if num_chunks == 1:
        return step(start, jax.tree.map(lambda a: a[0], inputs))[0]
    return jax.lax.scan(step, start, inputs)[0]


class Aggregator(nn.Module):
    """The first strictly causal vector of every target, from its position and earlier tokens only (paper section 4).

    positional: sum over earlier tokens of <PE(pos_n), PE(pos_i)> x_i, RMS-normalised and scaled, plus W PE(pos_n) + b.
    mean: their mean, likewise. shift: the mean of the immediately preceding block, nothing else.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, rows: Rows, x_BXD: jax.Array, state: jax.Array | None, decoding: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """G's first vectors [B, G, D] in x's dtype, and the state after all rows of X (None unless decoding)."""
        config, dtype = self.config, x_BXD.dtype
        chunk = chunk_size(config)
        strict_BG = rows.g_strict_len_BG
        if config.aggregator == "shift":
            return self._preceding_block(rows, x_BXD, decoding).astype(dtype), None

        positional = config.aggregator == "positional"
        g_code_BGP = sinusoidal(rows.g_positions_BG, config.positional_width)
        x_code_BXP = sinusoidal(rows.x_positions_BX, config.positional_width) if positional else None
        codes = (x_code_BXP, g_code_BGP if positional else None)
        sum_BGD = _weighted_prefix(x_BXD, *codes, jnp.zeros_like(strict_BG), strict_BG, rows.x_start, chunk)
        if decoding:
            seen_BXD = x_BXD.astype(jnp.float32)
            if rows.x_valid_BX is not None:
                seen_BXD = jnp.where(rows.x_valid_BX[..., None], seen_BXD, 0.0)
            if positional:
                sum_BGD = sum_BGD + jnp.einsum("BGP,BPD->BGD", g_code_BGP, state)
                state = state + jnp.einsum("BXP,BXD->BPD", x_code_BXP, seen_BXD)
            else:
                sum_BGD = sum_BGD + state[:, None]
                state = state + seen_BXD.sum(axis=1)
        if not positional:
            sum_BGD = sum_BGD / strict_BG[..., None]
        scaled_BGD = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(sum_BGD)
        position_BGD = nn.Dense(
            config.width, kernel_init=nn.initializers.normal(0.02), dtype=jnp.float32, name="position"
        )(g_code_BGP)
        return (scaled_BGD + position_BGD).astype(dtype), state

    def _preceding_block(self, rows: Rows, x_BXD: jax.Array, decoding: bool) -> jax.Array:
        low_BG, high_BG = rows.g_previous_len_BG, rows.g_strict_len_BG

        def mean() -> jax.Array:
            chunk = chunk_size(self.config)
            sum_BGD = _weighted_prefix(x_BXD, None, None, low_BG, high_BG, rows.x_start, chunk)
            return sum_BGD / (high_BG - low_BG)[..., None]

        def gather() -> jax.Array:
            return jnp.take_along_axis(x_BXD, high_BG[..., None] - 1, axis=1).astype(jnp.float32)

        # With one-token blocks, as in an AR model, the mean is one token: skip the masked sum.
        return mean() if decoding else jax.lax.cond(jnp.all(high_BG - low_BG == 1), gather, mean)

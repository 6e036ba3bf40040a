"""Prefix aggregation: the first strictly causal vector of every target (paper section 4).

An aggregator is a Flax module that is called with the rows of a network call, the rows of stream X, and the embeddings
of the neighbours that it asks for, and returns G's first vectors. Its other methods say which neighbours it wants, what
state decoding keeps for it, what a neighbour alone adds to a first vector, and what it costs. To add one, write such a
module, name it in `names.AggregatorKind` and give `make` its case.
"""

from collections.abc import Mapping
from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core.kernels.attention import attention_chunk
from armd_jax.core.kernels.linear import linear
from armd_jax.core.rows import UNSEEN, Rows
from armd_jax.core.sizes import embedding_rms

Params = Mapping[str, Any]  # those of the aggregator
Vectors = tuple[jax.Array, ...]  # one [B, G, D] for each of the neighbours that an aggregator wants


def make(config: ModelConfig) -> "PrefixSum | PrecedingBlock | NeighbourTokens":
    """The aggregator that the config names."""
    match config.aggregator:
        case "positional":
            return PrefixSum(config, positional=True)
        case "mean":
            return PrefixSum(config, positional=False)
        case "shift":
            return PrecedingBlock(config)
        case "neighbours":
            return NeighbourTokens(config)
        case _:
            assert_never(config.aggregator)


class PrefixSum(nn.Module):
    """A sum over all earlier tokens, RMS-normalised and scaled, plus W PE(pos_n) + b.

    positional: the sum of <PE(pos_n), PE(pos_i)> x_i, as in the paper. Otherwise the mean of x_i.
    gain: at which the learned scale of the norm starts.
    """

    config: ModelConfig
    positional: bool
    gain: float = 1.0

    @nn.compact
    def __call__(
        self, rows: Rows, x_BXD: jax.Array, near: Vectors, state: jax.Array | None, decoding: bool
    ) -> jax.Array:
        """G's first vectors [B, G, D] in x's dtype. state: before this call (None unless decoding)."""
        del near
        config, dtype, strict_BG = self.config, x_BXD.dtype, rows.g_strict_len_BG
        g_code_BGP = sinusoidal(rows.g_positions_BG, config.positional_width)
        x_code_BXP = sinusoidal(rows.x_positions_BX, config.positional_width) if self.positional else None
        codes = (x_code_BXP, g_code_BGP if self.positional else None)
        first_BG = jnp.broadcast_to(0 if rows.first_B is None else rows.first_B[:, None], strict_BG.shape)
        first_BG = first_BG if rows.document_BN is None else rows.document_BN
        x_BXD = _valid(rows, x_BXD)
        sum_BGD = _weighted_prefix(x_BXD, *codes, first_BG, strict_BG, rows.x_start, attention_chunk(config))
        if decoding:
            assert state is not None
            if self.positional:
                sum_BGD = sum_BGD + jnp.einsum("BGP,BPD->BGD", g_code_BGP, state)
            else:
                sum_BGD = sum_BGD + state[:, None]
        if not self.positional:
            sum_BGD = sum_BGD / jnp.maximum(strict_BG - first_BG, 1)[..., None]  # padding sees nothing
        start = nn.initializers.constant(self.gain)
        scaled_BGD = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, scale_init=start, name="norm")(sum_BGD)
        return (scaled_BGD + _position(config)(g_code_BGP)).astype(dtype)

    def state_after(self, rows: Rows, x_BXD: jax.Array, state: jax.Array) -> jax.Array:
        """The state after the valid rows of X."""
        seen_BXD = _valid(rows, x_BXD).astype(jnp.float32)
        if not self.positional:
            return state + seen_BXD.sum(axis=1)
        x_code_BXP = sinusoidal(rows.x_positions_BX, self.config.positional_width)
        return state + jnp.einsum("BXP,BXD->BPD", x_code_BXP, seen_BXD)

    def of_left_neighbour(self, params: Params, vectors_BGD: jax.Array) -> float:
        """Nothing: a neighbour is one among all tokens of the sum."""
        del params, vectors_BGD
        return 0.0

    def wanted(self, rows: Rows) -> tuple[jax.Array, ...]:
        """No neighbours."""
        del rows
        return ()

    def empty_state(self, batch: int) -> jax.Array | None:
        """The state before any token: positional [B, P, D], mean [B, D], float32."""
        width = self.config.width
        shape = (batch, self.config.positional_width, width) if self.positional else (batch, width)
        return jnp.zeros(shape, jnp.float32)

    def forward_flops(self, visible: float) -> float:
        """FLOPs per token of a parallel forward pass in which a token sees `visible` others: the sum, and W PE."""
        code, width = self.config.positional_width, self.config.width
        return (2 * (code + width) if self.positional else 2 * width) * visible + 2 * code * width

    def decoding_flops(self) -> float:
        """FLOPs per decoded token: W PE, and the state A [P, D] read and updated once. The mean's state is small."""
        product = 2 * self.config.positional_width * self.config.width
        return (3 if self.positional else 1) * product


class PrecedingBlock(nn.Module):
    """The mean of the embeddings of the immediately preceding block, and nothing else: no norm, scale or bias.

    With one-token blocks this is the embedding of the previous token, as in an autoregressive transformer.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, rows: Rows, x_BXD: jax.Array, near: Vectors, state: jax.Array | None, decoding: bool
    ) -> jax.Array:
        """G's first vectors [B, G, D] in x's dtype."""
        del near, state
        low_BG, high_BG = rows.g_previous_len_BG, rows.g_strict_len_BG

        def mean() -> jax.Array:
            chunk = attention_chunk(self.config)
            sum_BGD = _weighted_prefix(x_BXD, None, None, low_BG, high_BG, rows.x_start, chunk)
            return sum_BGD / (high_BG - low_BG)[..., None]

        def gather() -> jax.Array:
            return jnp.take_along_axis(x_BXD, high_BG[..., None] - 1, axis=1).astype(jnp.float32)

        # With one-token blocks, as in an AR model, the mean is one token, and the masked sum can be left out.
        mean_BGD = mean() if decoding else jax.lax.cond(jnp.all(high_BG - low_BG == 1), gather, mean)
        return mean_BGD.astype(x_BXD.dtype)

    def wanted(self, rows: Rows) -> tuple[jax.Array, ...]:
        """No neighbours: the preceding block is among the rows of X."""
        del rows
        return ()

    def empty_state(self, batch: int) -> None:
        """No state: the preceding block is among the rows of every call."""
        del batch

    def state_after(self, rows: Rows, x_BXD: jax.Array, state: jax.Array) -> jax.Array:
        """The state, as there is none to change."""
        del rows, x_BXD
        return state

    def of_left_neighbour(self, params: Params, vectors_BGD: jax.Array) -> float:
        """Nothing: a first vector is that of the block before, whatever is beside the target."""
        del params, vectors_BGD
        return 0.0

    def forward_flops(self, visible: float) -> float:
        """Nothing worth counting."""
        del visible
        return 0.0

    def decoding_flops(self) -> float:
        """Nothing worth counting."""
        return 0.0


class NeighbourTokens(nn.Module):
    """The token at natural position j - 1, if an earlier block holds it, through a learned map; beyond the paper.

    The neighbour's embedding is multiplied with a learned D x D matrix. Added to it are W PE(pos_n) + b and the
    positional sum of `PrefixSum`, which is RMS-normalised and starts with a gain of `model.positional_gain` (0: there
    is no sum). A learned vector takes the place of a neighbour that no earlier block holds. In the natural order the
    neighbour is the previous token, as in an autoregressive transformer; in a strided order it is the last token of the
    same stream. With `model.neighbours="both"`, the token at j + 1 comes in likewise, through a map of its own.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, rows: Rows, x_BXD: jax.Array, near: Vectors, state: jax.Array | None, decoding: bool
    ) -> jax.Array:
        """G's first vectors [B, G, D] in x's dtype."""
        config, dtype = self.config, x_BXD.dtype
        if config.positional_gain:
            prefix_sum = PrefixSum(config, positional=True, gain=config.positional_gain, name="sum")
            first_BGD = prefix_sum(rows, x_BXD, (), state, decoding)
        else:
            first_BGD = _position(config)(sinusoidal(rows.g_positions_BG, config.positional_width)).astype(dtype)
        as_tokens = nn.initializers.normal(embedding_rms(config))  # as long as the vectors of tokens
        as_layers = nn.initializers.normal(config.width**-0.5)
        for side, ids_BG, vectors_BGD in zip(("left", "right"), self.wanted(rows), near, strict=False):
            unseen_D = self.param(f"unseen_{side}", as_tokens, (config.width,)).astype(dtype)
            map_DD = self.param(side, as_layers, (config.width, config.width))
            seen_BGD = jnp.where(ids_BG[..., None] == UNSEEN, unseen_D, vectors_BGD)
            first_BGD = first_BGD + linear(seen_BGD, map_DD)  # the gradient of the float32 map is a float32 sum
        return first_BGD

    def state_after(self, rows: Rows, x_BXD: jax.Array, state: jax.Array) -> jax.Array:
        """The state of the sum after the valid rows of X."""
        return state if self._sum is None else self._sum.state_after(rows, x_BXD, state)

    def of_left_neighbour(self, params: Params, vectors_BGD: jax.Array) -> jax.Array:
        """What the left neighbour adds, through its map, in place of the vector that stands for an unseen one."""
        dtype = vectors_BGD.dtype
        return (vectors_BGD - params["unseen_left"].astype(dtype)) @ params["left"].astype(dtype)

    def wanted(self, rows: Rows) -> tuple[jax.Array, ...]:
        """Ids [B, G] of the left neighbour, and of the right one if the config wants it."""
        match self.config.neighbours:
            case "left":
                return (rows.g_left_BG,)
            case "both":
                return (rows.g_left_BG, rows.g_right_BG)
            case _:
                assert_never(self.config.neighbours)

    @property
    def _sum(self) -> PrefixSum | None:
        """The sum, for its sizes; None if there is none."""
        # Without a parent, because it is asked outside of a call too.
        return PrefixSum(self.config, positional=True, parent=None) if self.config.positional_gain else None

    def empty_state(self, batch: int) -> jax.Array | None:
        """The state of the sum before any token [B, P, D]; None if there is no sum."""
        return None if self._sum is None else self._sum.empty_state(batch)

    def forward_flops(self, visible: float) -> float:
        """FLOPs per token of a parallel forward pass: the sum, W PE, and the maps of the neighbours."""
        code = 2 * self.config.positional_width * self.config.width
        return (code if self._sum is None else self._sum.forward_flops(visible)) + self._map_flops

    def decoding_flops(self) -> float:
        """FLOPs per decoded token, likewise."""
        code = 2 * self.config.positional_width * self.config.width
        return (code if self._sum is None else self._sum.decoding_flops()) + self._map_flops

    @property
    def _map_flops(self) -> float:
        product = 2 * self.config.width**2
        match self.config.neighbours:
            case "left":
                return product
            case "both":
                return 2 * product
            case _:
                assert_never(self.config.neighbours)


def _valid(rows: Rows, x_BXD: jax.Array) -> jax.Array:
    """The rows of X, with zeros for those that are padding, or in the state already."""
    return x_BXD if rows.x_valid_BX is None else jnp.where(rows.x_valid_BX[..., None], x_BXD, 0)


def _position(config: ModelConfig) -> nn.Dense:
    """W PE + b, in float32."""
    init = nn.initializers.normal(0.02)
    return nn.Dense(config.width, kernel_init=init, dtype=jnp.float32, name="position")


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
    """The sum over context tokens low <= i < high of <g_code, x_code_i> x_i, [B, G, D] float32. No codes: weight 1.

    Row 0 of x is context token `first`, one number or int32 [B]. The sum is a scan over chunks of rows. It adds up what
    may be seen and never subtracts from a larger sum, because rounding would then let a hidden token leak.
    """
    batch, num_x, _ = x_BXD.shape
    num_chunks = -(-num_x // chunk)
    size = min(chunk, num_x)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, 0), (0, num_chunks * size - num_x), (0, 0)))
        return jnp.moveaxis(padded.reshape(batch, num_chunks, size, a.shape[-1]), 1, 0)

    @jax.checkpoint
    def step(sum_BGD: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
        number, x, code = inputs
        index_BX = jnp.reshape(first, (-1, 1)) + number * size + jnp.arange(size)
        seen_BGX = (index_BX[:, None] >= low_BG[..., None]) & (index_BX[:, None] < high_BG[..., None])
        weight_BGX = seen_BGX.astype(jnp.float32)
        if code is not None:
            weight_BGX = weight_BGX * jnp.einsum("BGP,BXP->BGX", g_code_BGP, code)
        return sum_BGD + jnp.einsum("BGX,BXD->BGD", weight_BGX, x.astype(jnp.float32)), None

    start = jnp.zeros((batch, low_BG.shape[1], x_BXD.shape[-1]), jnp.float32)
    inputs = (jnp.arange(num_chunks), split(x_BXD), None if x_code_BXP is None else split(x_code_BXP))
    if num_chunks == 1:
        return step(start, jax.tree.map(lambda a: a[0], inputs))[0]
    return jax.lax.scan(step, start, inputs)[0]

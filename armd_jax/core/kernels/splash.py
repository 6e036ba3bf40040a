"""Splash attention: JAX's flash kernel for TPU, which skips what a mask hides, with masks made of prefix lengths.

The kernel has to know its mask when the program is traced, but orders are drawn on the device. This works because only
the position of each token is drawn. The block structure, and with it every prefix length, is that of one of a few
strided orders (`config.block_patterns`). Each of them is a table of N numbers and has a kernel of its own, and if there
are several, the data decide which kernel runs.

The kernel is called per device: on a mesh, call it inside `jax.shard_map` over batch and heads.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from armd_jax.core import block_mask, order
from armd_jax.core.context import LayerGroup
from armd_jax.core.kernels.attention import KERNEL_OUTPUT

_BLOCKS = (512, 256, 128)


class PrefixMask(masks._ComputableMask):
    """Row i sees the keys before prefix_Q[i], which must be at least 1. No N x N array is ever built.

    The library has no public class for a mask that is computed from a formula, so this derives from a private one. The
    kernel uses its shape, its slices, `q_sequence` (of the rows in a tile) and `mask_function(q_sequence, key)`.
    """

    def __init__(self, prefix_Q: np.ndarray, num_keys: int) -> None:
        super().__init__((len(prefix_Q), num_keys), lambda prefix, key: key < prefix)
        self.q_sequence = np.asarray(prefix_Q, np.int32)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrefixMask):
            return NotImplemented
        return self.shape == other.shape and bool(np.array_equal(self.q_sequence, other.q_sequence))

    def __hash__(self) -> int:
        return hash((self.shape, self.q_sequence.tobytes()))


@functools.lru_cache
def prefix_tables(length: int, streams: int) -> Mapping[LayerGroup, np.ndarray]:
    """Prefix lengths of the query rows of each layer group in training, for the strided order of `streams` streams.

    two_stream [2 N]: the rows of X, then those of G. last_two_stream [N]: the rows of G over the keys of X. causal [N]:
    the rows of G over the keys of G. bidirectional [N]: all keys, whatever the order; rows then must have no padding.
    """
    with jax.ensure_compile_time_eval():
        mask = block_mask.build(order.strided(1, length, streams))
        x_N, strict_N, g_N = (np.asarray(lens[0]) for lens in (mask.x_len_BN, mask.strict_len_BN, mask.g_len_BN))
    return {
        "two_stream": np.concatenate([x_N, strict_N]),
        "last_two_stream": strict_N,
        "causal": g_N,
        "bidirectional": np.full_like(g_N, length),
    }


def computed_pairs(length: int, streams: int) -> Mapping[LayerGroup, int]:
    """Pairs of query and key in the tiles that one call computes, by layer group, per row of the batch and head.

    A tile of which any pair is visible is computed whole, and the others are skipped.
    """
    keys = _block(length)

    def pairs(prefix_Q: np.ndarray) -> int:
        queries = _block(len(prefix_Q))
        tiles = -(-prefix_Q.reshape(-1, queries).max(axis=1) // keys)
        return int(tiles.sum()) * queries * keys

    return {group: pairs(prefix_Q) for group, prefix_Q in prefix_tables(length, streams).items()}


def _block(rows: int) -> int:
    """The largest tile that divides the rows."""
    return next(size for size in _BLOCKS if rows % size == 0)


def _kernel(prefix_Q: np.ndarray, num_keys: int, heads: int, interpret: bool) -> kernels.SplashAttentionKernel:
    q, kv = _block(len(prefix_Q)), _block(num_keys)
    # The fused backward kernel is not used: it keeps a query gradient per block of keys, which is quadratic in N.
    sizes = kernels.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    mask = masks.MultiHeadMask([PrefixMask(prefix_Q, num_keys)] * heads)
    return kernels.make_splash_mha(
        mask=mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        residual_checkpoint_name=KERNEL_OUTPUT,
        interpret=interpret,
    )


def attention(
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
    group: LayerGroup,
    *,
    patterns: tuple[int, ...],
    interpret: bool = False,
) -> jax.Array:
    """Computes what `core.kernels.attention.attention` does, for training rows with one of these block patterns.

    All rows of the batch share one pattern, and len_BQ is read only to find out which of several it is. T is the
    sequence length and a multiple of 128.

    patterns: numbers of streams, as `config.block_patterns` gives them.
    interpret: run the kernel in Python, for tests without a TPU.
    """
    num_keys, heads = k_BTHK.shape[1], k_BTHK.shape[2]
    tables = [prefix_tables(num_keys, streams)[group] for streams in patterns]
    q_BHQK, k_BHTK, v_BHTK = (jnp.swapaxes(a, 1, 2) for a in (q_BQHK * q_BQHK.shape[-1] ** -0.5, k_BTHK, v_BTHK))
    run = [jax.vmap(_kernel(table, num_keys, heads, interpret)) for table in tables]
    out_BHQK: Any  # the kernel's type allows for residuals, which it is not asked for
    if len(run) == 1:
        out_BHQK = run[0](q_BHQK, k_BHTK, v_BHTK)
    else:
        fits = jnp.stack([jnp.all(len_BQ[0] == table) for table in tables])
        out_BHQK = jax.lax.switch(jnp.argmax(fits), run, q_BHQK, k_BHTK, v_BHTK)
    return jnp.swapaxes(out_BHQK, 1, 2).astype(q_BQHK.dtype)

"""Flash attention for NVIDIA GPUs over key prefixes: Pallas kernels for Triton that skip what a tile cannot see.

Prefix lengths are data here, so one kernel serves every order, including those whose blocks are drawn. The project has
a kernel of its own because this one can be interpreted and checked on any machine with nothing but JAX. The
alternatives cannot: tokamax accepts one length per row only in a private interface and its kernels need a GPU, and of
our masks cuDNN knows only the triangle.

The algorithm is FlashAttention-2 (Dao 2023). The forward pass is an online softmax over tiles of keys. The backward
pass is one kernel for the gradient of the queries and one for those of keys and values, both from the log-sum-exp.
Nothing is added atomically, so the same inputs give the same bits. Exponentials are powers of two, because that is what
the hardware computes. Tiles of keys that every query of a tile sees completely are not masked.

The kernels are called per device: on a mesh, call them inside `jax.shard_map` over batch and heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from armd_jax.core.kernels.attention import KERNEL_OUTPUT
from armd_jax.errors import UserError
from armd_jax.names import FLASH_WIDEST

_MASKED = -1e30  # finite, as in `core.attention`
_NARROWEST = 16  # head width: Triton's matrix products sum over no fewer
_LOG2_E = math.log2(math.e)

Ref = Any  # what a Pallas kernel reads and writes; the library has no public type for it
Kernel = Callable[..., None]
Arrays = tuple[jax.Array, ...]
Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one kernel instance.

    rows: rows that the instance keeps. step: rows that it reads per step of its loop. Both are powers of two from 16.
    warps: warps of threads per instance. stages: how many steps are read ahead.
    """

    rows: int
    step: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels. `forward` and `dq` keep queries and step over keys; `dkv` does the reverse."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def queries(self) -> int:
        """Every kernel can be used if the number of queries is a multiple of this."""
        return max(self.forward.rows, self.dq.rows, self.dkv.step)

    @property
    def keys(self) -> int:
        """Every kernel can be used if the number of keys is a multiple of this."""
        return max(self.forward.step, self.dq.step, self.dkv.rows)


# The key is the number of bytes in a row of a head. Compiled for compute capabilities 8.0, 8.6, 8.9, 9.0, 10.0 and
# 12.0, these tiles fit into the shared memory of each, and up to 9.0 no register is spilled in bfloat16 up to width
# 128. They are not tuned: no GPU has been measured.
_TILES = {
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    256: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
    512: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    1024: Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
}


def attention(
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes what `core.kernels.attention.attention` does, on an NVIDIA GPU of compute capability 8.0 or newer.

    Rows are padded to whole tiles, and heads to a width that is a power of two. Products of float32 arrays are TF32, as
    XLA's are, unless `jax.default_matmul_precision` says otherwise.

    len_BQ: int32, 1 .. T.
    tiles: None takes those that suit the width of the heads.
    interpret: run the kernels in Python, for tests without a GPU.
    Raises UserError if heads are wider than 256.
    """
    queries, head_width = q_BQHK.shape[1], q_BQHK.shape[3]
    if head_width > FLASH_WIDEST:
        raise UserError(f"model.attention='flash': heads of {head_width} are wider than {FLASH_WIDEST}; use chunked")
    width = max(pl.next_power_of_2(head_width), _NARROWEST)
    tiles = tiles or next(found for size, found in _TILES.items() if width * q_BQHK.dtype.itemsize <= size)

    def pad(a_BNHK: jax.Array, multiple: int) -> jax.Array:
        return jnp.pad(a_BNHK, ((0, 0), (0, -a_BNHK.shape[1] % multiple), (0, 0), (0, width - head_width)))

    # A padding row sees one key, so that it has a softmax, and contributes no gradient.
    lens = jnp.pad(len_BQ, ((0, 0), (0, -queries % tiles.queries)), constant_values=1)
    q, k, v = pad(q_BQHK, tiles.queries), pad(k_BTHK, tiles.keys), pad(v_BTHK, tiles.keys)
    return _flash(tiles, head_width**-0.5, interpret, q, k, v, lens)[:, :queries, :, :head_width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _flash(
    tiles: Tiles,
    scale: float,
    interpret: bool,
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
) -> jax.Array:
    return _forward(tiles, scale, interpret, q_BQHK, k_BTHK, v_BTHK, len_BQ)[0]


def _forward(
    tiles: Tiles,
    scale: float,
    interpret: bool,
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, queries, heads, _ = q_BQHK.shape
    out_BQHK, log_sum_BHQ = _call(
        functools.partial(_flash_forward, tiles.forward.step, scale),
        tiles.forward,
        interpret,
        tiled=(q_BQHK, len_BQ),
        whole=(k_BTHK, v_BTHK),
        out=(q_BQHK, jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)),
    )
    # If a rematerialised layer keeps these two, its backward pass has all that it needs of the softmax.
    out_BQHK, log_sum_BHQ = (checkpoint_name(a, KERNEL_OUTPUT) for a in (out_BQHK, log_sum_BHQ))
    return out_BQHK, (q_BQHK, k_BTHK, v_BTHK, len_BQ, out_BQHK, log_sum_BHQ)


def _backward(
    tiles: Tiles, scale: float, interpret: bool, saved: tuple[jax.Array, ...], d_out_BQHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BQHK, k_BTHK, v_BTHK, len_BQ, out_BQHK, log_sum_BHQ = saved
    dot_BHQ = jnp.swapaxes(jnp.sum(d_out_BQHK.astype(jnp.float32) * out_BQHK, axis=3), 1, 2)
    rows = (q_BQHK, len_BQ, d_out_BQHK, log_sum_BHQ, dot_BHQ)
    (dq_BQHK,) = _call(
        functools.partial(_flash_dq, tiles.dq.step, scale),
        tiles.dq,
        interpret,
        tiled=rows,
        whole=(k_BTHK, v_BTHK),
        out=(q_BQHK,),
    )
    dk_BTHK, dv_BTHK = _call(
        functools.partial(_flash_dkv, tiles.dkv.step, scale),
        tiles.dkv,
        interpret,
        tiled=(k_BTHK, v_BTHK),
        whole=(*rows, *_seen_by(len_BQ, tiles.dkv, k_BTHK.shape[1])),
        out=(k_BTHK, v_BTHK),
    )
    return dq_BQHK, dk_BTHK, dv_BTHK, None


_flash.defvjp(_forward, _backward)


def _call(
    kernel: Kernel, tile: Tile, interpret: bool, tiled: Arrays, whole: Arrays, out: tuple[Any, ...]
) -> tuple[jax.Array, ...]:
    """Runs the kernel for every tile, head and row of the batch, as kernel(*tiled, *whole, *out).

    Arrays are [B, N, H, K], [B, H, N] or [B, N]. An instance receives its tile's rows of the arrays in `tiled` and all
    rows of those in `whole`, and writes its tile's rows of arrays that look like those in `out`.
    """

    def block(array: jax.Array | jax.ShapeDtypeStruct, tiled: bool) -> pl.BlockSpec:
        rows = (lambda size: tile.rows) if tiled else (lambda size: size)
        at = (lambda i: i) if tiled else (lambda i: 0)
        match array.shape:
            case _, size, _, width:
                return pl.BlockSpec((None, rows(size), None, width), lambda i, h, b: (b, at(i), h, 0))
            case _, _, size:
                return pl.BlockSpec((None, None, rows(size)), lambda i, h, b: (b, h, at(i)))
            case _, size:
                return pl.BlockSpec((None, rows(size)), lambda i, h, b: (b, at(i)))
            case _:
                raise AssertionError(f"no rule for an array of shape {array.shape}")

    batch, num_rows, heads, _ = out[0].shape
    return pl.pallas_call(
        kernel,
        grid=(num_rows // tile.rows, heads, batch),
        in_specs=[*(block(array, True) for array in tiled), *(block(array, False) for array in whole)],
        out_specs=[block(array, True) for array in out],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in out],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(*tiled, *whole)


def _seen_by(len_BQ: jax.Array, tile: Tile, num_keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which tiles I of queries see which tiles J of keys, as int32 arrays and without an I x J array.

    Returns an order of the tiles of queries [B, I] with the longest prefix first; for each tile of keys, how many of
    them, counted from the first in that order, see anything of it [B, J]; and how many, counted likewise, see all of
    it [B, J].
    """
    len_BIQ = len_BQ.reshape(len_BQ.shape[0], -1, tile.step)
    longest_BI, shortest_BI = len_BIQ.max(axis=2), len_BIQ.min(axis=2)
    order_BI = jnp.argsort(-longest_BI, axis=1).astype(jnp.int32)
    # With the minimum up to each place of the order, the tiles that see all of a tile of keys also come first.
    shortest_BI = jax.lax.cummin(jnp.take_along_axis(shortest_BI, order_BI, axis=1), axis=1)
    first_J = jnp.arange(0, num_keys, tile.rows)[:, None]
    seen_BJ = jnp.sum(longest_BI[:, None] > first_J, axis=2, dtype=jnp.int32)
    entire_BJ = jnp.sum(shortest_BI[:, None] >= first_J + tile.rows, axis=2, dtype=jnp.int32)
    return order_BI, seen_BJ, entire_BJ


# --- the kernels: Q and T are the queries and keys of one tile or step; a log-sum-exp is in units of log 2 ------------


def _dot(a: jax.Array, b: jax.Array, sum_over: tuple[int, int]) -> jax.Array:
    """The float32 matrix product that sums over one axis of each."""
    dimensions = (((sum_over[0],), (sum_over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _walk(step: Callable[..., Carry], entire: jax.Array, seen: jax.Array, carry: Carry) -> Carry:
    """Applies carry = step(number, carry, masked) to the numbers below `seen`. Those below `entire` need no mask."""
    carry = jax.lax.fori_loop(0, entire, functools.partial(step, masked=False), carry)
    return jax.lax.fori_loop(entire, seen, functools.partial(step, masked=True), carry)


def _walk_keys(step: Callable[..., Carry], size: int, len_Q: jax.Array, carry: Carry) -> Carry:
    """Applies carry = step(keys, carry, visible_QT) to the tiles of `size` keys that any query sees.

    visible_QT is None if every query sees all keys of the tile.
    """

    def at(number: jax.Array, carry: Carry, masked: bool) -> Carry:
        key_T = number * size + jnp.arange(size)
        return step(pl.ds(number * size, size), carry, key_T[None, :] < len_Q[:, None] if masked else None)

    return _walk(at, jnp.min(len_Q) // size, pl.cdiv(jnp.max(len_Q), size), carry)


def _flash_forward(
    size: int, scale: float, q_ref: Ref, len_ref: Ref, k_ref: Ref, v_ref: Ref, out_ref: Ref, log_sum_ref: Ref
) -> None:
    q_QK, len_Q = q_ref[...], len_ref[...]

    def step(
        keys: Any, carry: tuple[jax.Array, jax.Array, jax.Array], visible_QT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        out_QK, max_Q, sum_Q = carry
        v_TK = v_ref[keys, :]
        s_QT = _dot(q_QK, k_ref[keys, :], (1, 1)) * (scale * _LOG2_E)
        s_QT = s_QT if visible_QT is None else jnp.where(visible_QT, s_QT, _MASKED)
        new_max_Q = jnp.maximum(max_Q, jnp.max(s_QT, axis=1))
        p_QT = jnp.exp2(s_QT - new_max_Q[:, None])
        shrink_Q = jnp.exp2(max_Q - new_max_Q)
        out_QK = out_QK * shrink_Q[:, None] + _dot(p_QT.astype(v_TK.dtype), v_TK, (1, 0))
        return out_QK, new_max_Q, sum_Q * shrink_Q + jnp.sum(p_QT, axis=1)

    zeros_Q = jnp.zeros(len_Q.shape, jnp.float32)
    start = jnp.zeros(q_QK.shape, jnp.float32), zeros_Q + _MASKED, zeros_Q
    out_QK, max_Q, sum_Q = _walk_keys(step, size, len_Q, start)
    out_ref[...] = (out_QK / sum_Q[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = max_Q + jnp.log2(sum_Q)


def _flash_dq(
    size: int,
    scale: float,
    q_ref: Ref,
    len_ref: Ref,
    d_out_ref: Ref,
    log_sum_ref: Ref,
    dot_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    dq_ref: Ref,
) -> None:
    q_QK, d_out_QK, log_sum_Q, dot_Q = q_ref[...], d_out_ref[...], log_sum_ref[...], dot_ref[...]

    def step(keys: Any, dq_QK: jax.Array, visible_QT: jax.Array | None) -> jax.Array:
        k_TK = k_ref[keys, :]
        p_QT = jnp.exp2(_dot(q_QK, k_TK, (1, 1)) * (scale * _LOG2_E) - log_sum_Q[:, None])
        p_QT = p_QT if visible_QT is None else jnp.where(visible_QT, p_QT, 0.0)
        ds_QT = p_QT * (_dot(d_out_QK, v_ref[keys, :], (1, 1)) - dot_Q[:, None])
        return dq_QK + _dot(ds_QT.astype(k_TK.dtype), k_TK, (1, 0))

    dq_QK = _walk_keys(step, size, len_ref[...], jnp.zeros(q_QK.shape, jnp.float32))
    dq_ref[...] = (dq_QK * scale).astype(dq_ref.dtype)


def _flash_dkv(size: int, scale: float, k_ref: Ref, v_ref: Ref, *refs: Ref) -> None:
    q_ref, len_ref, d_out_ref, log_sum_ref, dot_ref, order_ref, seen_ref, entire_ref, dk_ref, dv_ref = refs
    k_TK, v_TK, tile = k_ref[...], v_ref[...], pl.program_id(0)
    key_T = tile * k_TK.shape[0] + jnp.arange(k_TK.shape[0])

    def step(number: jax.Array, carry: tuple[jax.Array, jax.Array], masked: bool) -> tuple[jax.Array, jax.Array]:
        dk_TK, dv_TK = carry
        rows = pl.ds(order_ref[number] * size, size)
        q_QK, d_out_QK = q_ref[rows, :], d_out_ref[rows, :]
        p_TQ = jnp.exp2(_dot(k_TK, q_QK, (1, 1)) * (scale * _LOG2_E) - log_sum_ref[rows][None, :])
        if masked:
            p_TQ = jnp.where(key_T[:, None] < len_ref[rows][None, :], p_TQ, 0.0)
        dv_TK += _dot(p_TQ.astype(d_out_QK.dtype), d_out_QK, (1, 0))
        ds_TQ = p_TQ * (_dot(v_TK, d_out_QK, (1, 1)) - dot_ref[rows][None, :])
        return dk_TK + _dot(ds_TQ.astype(q_QK.dtype), q_QK, (1, 0)), dv_TK

    zeros_TK = jnp.zeros(k_TK.shape, jnp.float32)
    dk_TK, dv_TK = _walk(step, entire_ref[tile], seen_ref[tile], (zeros_TK, zeros_TK))
    dk_ref[...] = (dk_TK * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_TK.astype(dv_ref.dtype)

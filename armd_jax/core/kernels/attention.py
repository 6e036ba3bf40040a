"""Attention of every query over a prefix of the keys: one function, several ways to compute it.

Arrays are [B, N, H, K]. Every query row has its own prefix length of at least 1: an empty row would have no softmax,
and the start token exists so that there is none. `dense` builds the N x N scores and is the reference. `chunked` walks
over chunks of keys for one chunk of queries at a time, with an online softmax. It leaves out the keys that no query of
the chunk can see, and only one chunk x chunk block of scores exists at a time, in the backward pass too. If a row holds
several documents, each query also has the index of the first key that it sees.
"""

import functools
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from armd_jax.config import ModelConfig
from armd_jax.names import PlainAttention

KERNEL_OUTPUT = "attention"  # names the output of attention kernels, for rematerialisation policies
KEY_CHUNKS = "key_chunks_"  # with their number, names the loop over visible chunks of keys in compiled programs
_MASKED = -1e30  # finite, so that a fully masked chunk gives exp(-1e30 - m) = 0 exactly and never inf - inf


def attention_chunk(config: ModelConfig) -> int:
    """Queries and keys per step of the chunked computations: the config's, or what suits the backend that runs."""
    return config.attention_chunk or config.for_platform(jax.default_backend()).attention_chunk


def attention(
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
    implementation: PlainAttention = "auto",
    chunk: int = 128,
    first_BQ: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the first len_BQ keys of each query; [B, Q, H, K] in q's dtype.

    Scores and softmax are float32. `auto` takes `dense` while all keys fit in one chunk, else `chunked`.

    first_BQ: int32, below len_BQ: keys before this one are not seen either. None: 0.
    """
    match implementation:
        case "auto":
            dense = k_BTHK.shape[1] <= chunk
        case "dense":
            dense = True
        case "chunked":
            dense = False
        case _:
            assert_never(implementation)
    run = _dense if dense else functools.partial(_chunked, chunk)
    return run(q_BQHK, k_BTHK, v_BTHK, len_BQ, first_BQ)


def _dense(
    q_BQHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, len_BQ: jax.Array, first_BQ: jax.Array | None
) -> jax.Array:
    q_BHQK, k_BHTK = jnp.swapaxes(q_BQHK * q_BQHK.shape[-1] ** -0.5, 1, 2), jnp.swapaxes(k_BTHK, 1, 2)
    first_B1Q1 = None if first_BQ is None else first_BQ[:, None, :, None]
    p_BHQT = jax.nn.softmax(_scores(q_BHQK, k_BHTK, len_BQ[:, None, :, None], first_B1Q1, 0), axis=-1)
    out_BHQK = jnp.einsum("BHQT,BTHK->BHQK", p_BHQT.astype(v_BTHK.dtype), v_BTHK)
    return jnp.swapaxes(out_BHQK, 1, 2).astype(q_BQHK.dtype)


def _split(a_BTHK: jax.Array, chunk: int) -> jax.Array:
    """[C, B, H, chunk, K], rows padded with zeros to whole chunks."""
    batch, rows, heads, head_width = a_BTHK.shape
    num_chunks = -(-rows // chunk)
    padded = jnp.pad(a_BTHK, ((0, 0), (0, num_chunks * chunk - rows), (0, 0), (0, 0)))
    return padded.reshape(batch, num_chunks, chunk, heads, head_width).transpose(1, 0, 3, 2, 4)


def _join(a_CBHcK: jax.Array, rows: int) -> jax.Array:
    """`_split` undone: [B, rows, H, K]."""
    num_chunks, batch, heads, chunk, head_width = a_CBHcK.shape
    return a_CBHcK.transpose(1, 0, 3, 2, 4).reshape(batch, num_chunks * chunk, heads, head_width)[:, :rows]


def _split_lens(len_BQ: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Prefix lengths of chunks of queries [C, B, 1, chunk, 1], and how many chunks of keys each of them sees [C]."""
    batch, rows = len_BQ.shape
    padded = jnp.pad(len_BQ, ((0, 0), (0, -rows % chunk)), constant_values=1)  # so that a padding row has a softmax
    len_CBc = jnp.moveaxis(padded.reshape(batch, -1, chunk), 1, 0)
    return len_CBc[:, :, None, :, None], -(-len_CBc.max(axis=(1, 2)) // chunk)


def _split_first(first_BQ: jax.Array | None, chunk: int) -> tuple[jax.Array | None, jax.Array | None]:
    """The first keys of chunks of queries [C, B, 1, chunk, 1], and the first chunk of keys that each sees [C]."""
    if first_BQ is None:
        return None, None
    batch, rows = first_BQ.shape
    padded = jnp.pad(first_BQ, ((0, 0), (0, -rows % chunk)))  # a padding row sees key 0, as in `_split_lens`
    first_CBc = jnp.moveaxis(padded.reshape(batch, -1, chunk), 1, 0)
    return first_CBc[:, :, None, :, None], first_CBc.min(axis=(1, 2)) // chunk


def _scores(
    q_BHQK: jax.Array,
    k_BHTK: jax.Array,
    len_B1Q1: jax.Array,
    first_B1Q1: jax.Array | None,
    first_key: jax.Array | int,
) -> jax.Array:
    """Scores [B, H, Q, T] float32 of scaled queries, masked to what each query sees. Key 0 here is key `first_key`."""
    s_BHQT = jnp.einsum("BHQK,BHTK->BHQT", q_BHQK, k_BHTK, preferred_element_type=jnp.float32)
    index_T = first_key + jnp.arange(k_BHTK.shape[2])
    seen = index_T < len_B1Q1
    return jnp.where(seen if first_B1Q1 is None else seen & (index_T >= first_B1Q1), s_BHQT, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    chunk: int,
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
    first_BQ: jax.Array | None,
) -> jax.Array:
    return _chunked_forward(chunk, q_BQHK, k_BTHK, v_BTHK, len_BQ, first_BQ)[0]


def _chunked_forward(
    chunk: int,
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
    first_BQ: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """Takes chunks of queries one after another. Each walks over the chunks of keys that any of its rows can see."""
    k_chunks, v_chunks = _split(k_BTHK, chunk), _split(v_BTHK, chunk)
    queries, scale = q_BQHK.shape[1], q_BQHK.shape[-1] ** -0.5

    # A row whose visible keys come later has seen nothing yet: what is masked must then be below its maximum too.
    lowest = _MASKED if first_BQ is None else _MASKED / 2

    def attend(inputs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        q_BHQK, len_B1Q1, visible_chunks, first_B1Q1, first_chunk = inputs

        def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out_BHQK, max_BHQ, sum_BHQ = carry
            k, v = (jax.lax.dynamic_index_in_dim(chunks, number, keepdims=False) for chunks in (k_chunks, v_chunks))
            s_BHQT = _scores(q_BHQK, k, len_B1Q1, first_B1Q1, number * chunk)
            new_max_BHQ = jnp.maximum(max_BHQ, s_BHQT.max(axis=-1))
            p_BHQT = jnp.exp(s_BHQT - new_max_BHQ[..., None])
            shrink_BHQ = jnp.exp(max_BHQ - new_max_BHQ)
            new_BHQK = jnp.einsum("BHQT,BHTK->BHQK", p_BHQT.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return out_BHQK * shrink_BHQ[..., None] + new_BHQK, new_max_BHQ, sum_BHQ * shrink_BHQ + p_BHQT.sum(axis=-1)

        start = (
            jnp.zeros(q_BHQK.shape, jnp.float32),
            jnp.full(q_BHQK.shape[:-1], lowest, jnp.float32),
            jnp.zeros(q_BHQK.shape[:-1], jnp.float32),
        )
        with jax.named_scope(f"{KEY_CHUNKS}{len(k_chunks)}"):
            begin = 0 if first_chunk is None else first_chunk
            out_BHQK, max_BHQ, sum_BHQ = jax.lax.fori_loop(begin, visible_chunks, step, start)
        return (out_BHQK / sum_BHQ[..., None]).astype(q_BQHK.dtype), max_BHQ + jnp.log(sum_BHQ)

    rows = (_split(q_BQHK * scale, chunk), *_split_lens(len_BQ, chunk), *_split_first(first_BQ, chunk))
    out_chunks, log_sum_chunks = jax.lax.map(attend, rows)
    # If a rematerialised layer keeps these two, its backward pass has all that it needs of the softmax.
    out_BQHK = checkpoint_name(_join(out_chunks, queries), KERNEL_OUTPUT)
    log_sum_chunks = checkpoint_name(log_sum_chunks, KERNEL_OUTPUT)
    return out_BQHK, (q_BQHK, k_BTHK, v_BTHK, len_BQ, first_BQ, out_BQHK, log_sum_chunks)


def _chunked_backward(
    chunk: int, saved: tuple[Any, ...], d_out_BQHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    """Probabilities are recomputed chunk by chunk from the log-sum-exp, as in FlashAttention (Dao et al. 2022)."""
    q_BQHK, k_BTHK, v_BTHK, len_BQ, first_BQ, out_BQHK, log_sum_chunks = saved
    scale = q_BQHK.shape[-1] ** -0.5
    k_chunks, v_chunks = _split(k_BTHK, chunk), _split(v_BTHK, chunk)
    f32: Any = {"preferred_element_type": jnp.float32}

    def add(chunks: jax.Array, number: jax.Array, chunk: jax.Array) -> jax.Array:
        chunk += jax.lax.dynamic_index_in_dim(chunks, number, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(chunks, chunk, number, 0)

    def attend(
        carry: tuple[jax.Array, jax.Array], inputs: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q_BHQK, len_B1Q1, visible_chunks, first_B1Q1, first_chunk, out_BHQK, d_out_BHQK, log_sum_BHQ = inputs
        dot_BHQ = jnp.einsum("BHQK,BHQK->BHQ", d_out_BHQK, out_BHQK, **f32)
        # Written like this, p and ds are read in the layout they have, and only these two small arrays are transposed.
        q_BHKQ, d_out_BHKQ = jnp.swapaxes(q_BHQK, 2, 3), jnp.swapaxes(d_out_BHQK, 2, 3)

        def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq_BHQK, dk_chunks, dv_chunks = carry
            k, v = (jax.lax.dynamic_index_in_dim(chunks, number, keepdims=False) for chunks in (k_chunks, v_chunks))
            p_BHQT = jnp.exp(_scores(q_BHQK, k, len_B1Q1, first_B1Q1, number * chunk) - log_sum_BHQ[..., None])
            dv_BHKT = jnp.einsum("BHKQ,BHQT->BHKT", d_out_BHKQ, p_BHQT.astype(v.dtype), **f32)
            dp_BHQT = jnp.einsum("BHQK,BHTK->BHQT", d_out_BHQK, v, **f32)
            ds_BHQT = (p_BHQT * (dp_BHQT - dot_BHQ[..., None])).astype(k.dtype)
            dk_BHKT = jnp.einsum("BHKQ,BHQT->BHKT", q_BHKQ, ds_BHQT, **f32)
            return (
                dq_BHQK + jnp.einsum("BHQT,BHTK->BHQK", ds_BHQT, k, **f32),
                add(dk_chunks, number, dk_BHKT),
                add(dv_chunks, number, dv_BHKT),
            )

        start = (jnp.zeros(q_BHQK.shape, jnp.float32), *carry)
        with jax.named_scope(f"{KEY_CHUNKS}{len(k_chunks)}"):
            begin = 0 if first_chunk is None else first_chunk
            dq_BHQK, dk_chunks, dv_chunks = jax.lax.fori_loop(begin, visible_chunks, step, start)
        return (dk_chunks, dv_chunks), dq_BHQK

    rows = (_split(q_BQHK * scale, chunk), *_split_lens(len_BQ, chunk), *_split_first(first_BQ, chunk))
    zeros = jnp.zeros_like(jnp.swapaxes(k_chunks, 3, 4), jnp.float32)
    inputs = (*rows, _split(out_BQHK, chunk), _split(d_out_BQHK, chunk), log_sum_chunks)
    (dk_chunks, dv_chunks), dq_chunks = jax.lax.scan(attend, (zeros, zeros), inputs)
    queries, keys = q_BQHK.shape[1], k_BTHK.shape[1]
    return (
        (_join(dq_chunks, queries) * scale).astype(q_BQHK.dtype),
        _join(jnp.swapaxes(dk_chunks, 3, 4), keys).astype(k_BTHK.dtype),
        _join(jnp.swapaxes(dv_chunks, 3, 4), keys).astype(v_BTHK.dtype),
        None,
        None,
    )


_chunked.defvjp(_chunked_forward, _chunked_backward)


def cached_attention(
    q_BQHK: jax.Array,
    k_ZKT: jax.Array,
    v_ZTK: jax.Array,
    len_BQ: jax.Array,
    first_B: jax.Array | None = None,
    own_BQ: jax.Array | None = None,
) -> jax.Array:
    """The same for a few queries, over caches whose first axis is batch and heads of keys together.

    If there are fewer heads of keys than of queries, each serves as many neighbouring heads of queries, whose rows are
    then rows of one head.

    first_B: int32, keys before this one are padding, which no query sees; None: there is none.
    own_BQ: int32, the index of one more key that each query sees; None: there is none.
    """
    batch, queries, heads, head_width = q_BQHK.shape
    kv_heads = k_ZKT.shape[0] // batch
    sharing = heads // kv_heads
    q_BQHK = q_BQHK * head_width**-0.5
    if sharing > 1:
        q_BQHK = jnp.swapaxes(q_BQHK.reshape(batch, queries, kv_heads, sharing, head_width), 2, 3)
        q_BQHK = q_BQHK.reshape(batch, queries * sharing, kv_heads, head_width)
        len_BQ = jnp.repeat(len_BQ, sharing, axis=1)
        own_BQ = None if own_BQ is None else jnp.repeat(own_BQ, sharing, axis=1)
    q_ZQK = jnp.swapaxes(q_BQHK, 1, 2).reshape(batch * kv_heads, -1, head_width)
    s_ZQT = jnp.einsum("ZQK,ZKT->ZQT", q_ZQK, k_ZKT, preferred_element_type=jnp.float32)
    index_T = jnp.arange(k_ZKT.shape[2])
    seen_ZQT = index_T < jnp.repeat(len_BQ, kv_heads, axis=0)[..., None]
    if first_B is not None:
        seen_ZQT &= index_T >= jnp.repeat(first_B, kv_heads)[:, None, None]
    if own_BQ is not None:
        seen_ZQT |= index_T == jnp.repeat(own_BQ, kv_heads, axis=0)[..., None]
    p_ZQT = jax.nn.softmax(jnp.where(seen_ZQT, s_ZQT, _MASKED), axis=-1)
    out_ZQK = jnp.einsum("ZQT,ZTK->ZQK", p_ZQT.astype(v_ZTK.dtype), v_ZTK)
    out_BQHK = jnp.swapaxes(out_ZQK.reshape(batch, kv_heads, -1, head_width), 1, 2)
    if sharing > 1:
        out_BQHK = jnp.swapaxes(out_BQHK.reshape(batch, queries, sharing, kv_heads, head_width), 2, 3)
    return out_BQHK.reshape(batch, queries, heads, head_width).astype(q_BQHK.dtype)

"""Attention of every query over a prefix of the keys: one function, several ways to compute it.

Arrays are [B, N, H, K]. Every query row has its own prefix length, at least 1 (an empty row has no softmax; the start
token exists so that there is none). `dense` builds the N x N scores and is the reference; `chunked` scans over chunks
of keys with an online softmax and keeps one N x chunk block at a time, in the backward pass too.
"""

import functools

import jax
import jax.numpy as jnp

KERNEL_OUTPUT = "attention"  # names what an attention kernel puts out, for rematerialisation policies
_MASKED = -1e30  # finite, so that a fully masked chunk gives exp(-1e30 - m) = 0 exactly and never inf - inf


def attention(
    q_BQHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    len_BQ: jax.Array,
    implementation: str = "auto",
    chunk: int = 256,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the first len_BQ keys of each query; [B, Q, H, K] in q's dtype.

    Scores and softmax are float32. `auto` takes `dense` while the keys fit in one chunk or the scores of a head are no
    more than chunk x chunk numbers (a few decoding rows over a long cache), else `chunked`; so does `splash`, which
    comes in from outside (`core.splash`) where masks are known when tracing and leaves only other calls to this one.
    """
    if implementation in ("auto", "splash"):
        queries, keys = q_BQHK.shape[1], k_BTHK.shape[1]
        implementation = "dense" if keys <= chunk or queries * keys <= chunk * chunk else "chunked"
    if implementation == "dense":
        return _dense(q_BQHK, k_BTHK, v_BTHK, len_BQ)
    return _chunked(chunk, q_BQHK, k_BTHK, v_BTHK, len_BQ)


def _scores(q_BQHK: jax.Array, k_BTHK: jax.Array, len_BQ: jax.Array, first_key: jax.Array | int) -> jax.Array:
    """Scaled scores [B, H, Q, T] float32, masked to each query's prefix; key 0 here is key `first_key` of the row."""
    scale = q_BQHK.shape[-1] ** -0.5
    s_BHQT = jnp.einsum("BQHK,BTHK->BHQT", q_BQHK * scale, k_BTHK, preferred_element_type=jnp.float32)
    keys = first_key + jnp.arange(k_BTHK.shape[1])
    return jnp.where(keys < len_BQ[:, None, :, None], s_BHQT, _MASKED)


def _dense(q_BQHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, len_BQ: jax.Array) -> jax.Array:
    p_BHQT = jax.nn.softmax(_scores(q_BQHK, k_BTHK, len_BQ, 0), axis=-1)
    out_BHQK = jnp.einsum("BHQT,BTHK->BHQK", p_BHQT.astype(v_BTHK.dtype), v_BTHK)
    return jnp.swapaxes(out_BHQK, 1, 2).astype(q_BQHK.dtype)


def _split(a_BTHK: jax.Array, chunk: int) -> jax.Array:
    """[C, B, chunk, H, K], keys padded with zeros to whole chunks."""
    batch, keys, heads, head_width = a_BTHK.shape
    num_chunks = -(-keys // chunk)
    padded = jnp.pad(a_BTHK, ((0, 0), (0, num_chunks * chunk - keys), (0, 0), (0, 0)))
    return jnp.moveaxis(padded.reshape(batch, num_chunks, chunk, heads, head_width), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk: int, q_BQHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, len_BQ: jax.Array) -> jax.Array:
    return _chunked_forward(chunk, q_BQHK, k_BTHK, v_BTHK, len_BQ)[0]


def _chunked_forward(chunk, q_BQHK, k_BTHK, v_BTHK, len_BQ):
    k_chunks, v_chunks = _split(k_BTHK, chunk), _split(v_BTHK, chunk)
    batch, queries, heads, head_width = q_BQHK.shape

    def step(carry, inputs):
        out_BHQK, max_BHQ, sum_BHQ = carry
        number, k, v = inputs
        s_BHQT = _scores(q_BQHK, k, len_BQ, number * chunk)
        new_max_BHQ = jnp.maximum(max_BHQ, s_BHQT.max(axis=-1))
        p_BHQT = jnp.exp(s_BHQT - new_max_BHQ[..., None])
        shrink_BHQ = jnp.exp(max_BHQ - new_max_BHQ)
        new_BHQK = jnp.einsum("BHQT,BTHK->BHQK", p_BHQT.astype(v.dtype), v, preferred_element_type=jnp.float32)
        carry = (out_BHQK * shrink_BHQ[..., None] + new_BHQK, new_max_BHQ, sum_BHQ * shrink_BHQ + p_BHQT.sum(axis=-1))
        return carry, None

    start = (
        jnp.zeros((batch, heads, queries, head_width), jnp.float32),
        jnp.full((batch, heads, queries), _MASKED, jnp.float32),
        jnp.zeros((batch, heads, queries), jnp.float32),
    )
    numbers = jnp.arange(k_chunks.shape[0])
    (out_BHQK, max_BHQ, sum_BHQ), _ = jax.lax.scan(step, start, (numbers, k_chunks, v_chunks))
    out_BQHK = jnp.swapaxes(out_BHQK / sum_BHQ[..., None], 1, 2).astype(q_BQHK.dtype)
    log_sum_BHQ = max_BHQ + jnp.log(sum_BHQ)
    return out_BQHK, (q_BQHK, k_BTHK, v_BTHK, len_BQ, out_BQHK, log_sum_BHQ)


def _chunked_backward(chunk, saved, d_out_BQHK):
    """Probabilities are recomputed chunk by chunk from the log-sum-exp, as in FlashAttention (Dao et al. 2022)."""
    q_BQHK, k_BTHK, v_BTHK, len_BQ, out_BQHK, log_sum_BHQ = saved
    scale = q_BQHK.shape[-1] ** -0.5
    k_chunks, v_chunks = _split(k_BTHK, chunk), _split(v_BTHK, chunk)
    f32 = {"preferred_element_type": jnp.float32}
    dot_BHQ = jnp.einsum("BQHK,BQHK->BHQ", d_out_BQHK, out_BQHK, **f32)

    def step(dq_BQHK, inputs):
        number, k, v = inputs
        p_BHQT = jnp.exp(_scores(q_BQHK, k, len_BQ, number * chunk) - log_sum_BHQ[..., None])
        dv_BTHK = jnp.einsum("BHQT,BQHK->BTHK", p_BHQT.astype(v.dtype), d_out_BQHK, **f32)
        dp_BHQT = jnp.einsum("BQHK,BTHK->BHQT", d_out_BQHK, v, **f32)
        ds_BHQT = (p_BHQT * (dp_BHQT - dot_BHQ[..., None]) * scale).astype(k.dtype)
        dq_BQHK = dq_BQHK + jnp.einsum("BHQT,BTHK->BQHK", ds_BHQT, k, **f32)
        dk_BTHK = jnp.einsum("BHQT,BQHK->BTHK", ds_BHQT, q_BQHK, **f32)
        return dq_BQHK, (dk_BTHK.astype(k.dtype), dv_BTHK.astype(v.dtype))

    numbers = jnp.arange(k_chunks.shape[0])
    dq_BQHK, (dk, dv) = jax.lax.scan(step, jnp.zeros(q_BQHK.shape, jnp.float32), (numbers, k_chunks, v_chunks))

    def join(chunks):
        joined = jnp.moveaxis(chunks, 0, 1).reshape(k_BTHK.shape[0], -1, *k_BTHK.shape[2:])
        return joined[:, : k_BTHK.shape[1]]

    return dq_BQHK.astype(q_BQHK.dtype), join(dk), join(dv), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def cached_attention(q_BQHK: jax.Array, k_ZKT: jax.Array, v_ZTK: jax.Array, len_BQ: jax.Array) -> jax.Array:
    """The same over caches whose first axis is batch and heads together."""
    batch, queries, heads, head_width = q_BQHK.shape
    q_ZQK = jnp.swapaxes(q_BQHK * head_width**-0.5, 1, 2).reshape(-1, queries, head_width)
    s_ZQT = jnp.einsum("ZQK,ZKT->ZQT", q_ZQK, k_ZKT, preferred_element_type=jnp.float32)
    len_ZQ = jnp.repeat(len_BQ, heads, axis=0)
    p_ZQT = jax.nn.softmax(jnp.where(jnp.arange(k_ZKT.shape[2]) < len_ZQ[..., None], s_ZQT, _MASKED), axis=-1)
    out_ZQK = jnp.einsum("ZQT,ZTK->ZQK", p_ZQT.astype(v_ZTK.dtype), v_ZTK)
    return jnp.swapaxes(out_ZQK.reshape(batch, heads, queries, head_width), 1, 2).astype(q_BQHK.dtype)

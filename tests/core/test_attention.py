"""Attention over prefixes: the chunked path equals the dense one, and stays lean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import block_mask, objective, order, parameters
from armd_jax.core.kernels.attention import attention, cached_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, Q, T, H, K = 2, 7, 11, 2, 4


def _inputs(seed: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((B, rows, H, K)), dtype) for rows in (Q, T, T, Q))
    lens = rng.integers(1, T + 1, (B, Q))
    lens[0, :3] = 1, T, T - 1
    return q, k, v, jnp.asarray(lens, jnp.int32), d_out


def _slow(q, k, v, lens) -> np.ndarray:
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, h in np.ndindex(B, Q, H):
        visible = int(lens[b, n])
        weights = np.exp(k[b, :visible, h] @ q[b, n, h] / np.sqrt(K))
        out[b, n, h] = weights @ v[b, :visible, h] / weights.sum()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 16])
def test_chunked_equals_dense_in_value_and_gradients(chunk):
    """Random prefix lengths and chunks that do not divide: same output, same gradients of queries, keys and values."""

    def run(implementation):
        @jax.jit
        def out_and_gradients(q, k, v, lens, d_out):
            out, pull = jax.vjp(lambda *a: attention(*a, lens, implementation, chunk), q, k, v)
            return out, pull(d_out)

        return out_and_gradients

    dense, chunked = run("dense"), run("chunked")
    for seed in range(4):
        inputs = _inputs(seed)
        (a, a_grads), (b, b_grads) = dense(*inputs), chunked(*inputs)
        np.testing.assert_allclose(a, _slow(*inputs[:4]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
        for x, y in zip(a_grads, b_grads, strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_keys_beyond_the_prefix_have_no_influence(implementation):
    """Other keys and values at and beyond len change no bit of the output and get a gradient of exactly zero."""
    q, k, v, _, d_out = _inputs(0)
    for visible in (1, 3, 4, 10):
        lens = jnp.full((B, Q), visible, jnp.int32)
        run = lambda k, v, lens=lens: attention(q, k, v, lens, implementation, 4)  # noqa: E731
        out, pull = jax.vjp(run, k, v)
        far = jnp.arange(T)[:, None, None] >= visible
        other = run(jnp.where(far, 50.0, k), jnp.where(far, -7.0, v))
        np.testing.assert_array_equal(np.asarray(out).view(np.uint32), np.asarray(other).view(np.uint32))
        for gradient in pull(d_out):
            assert np.all(np.asarray(gradient)[:, visible:] == 0)
            assert np.any(np.asarray(gradient[:, :visible]) != 0, axis=(0, 2, 3)).all() or visible == 1
    # A prefix of one key is that key's value, whatever its score.
    one = attention(100 * q, 100 * k, v, jnp.ones((B, Q), jnp.int32), implementation, 4)
    np.testing.assert_allclose(one, jnp.broadcast_to(v[:, :1], one.shape), rtol=1e-6)


@pytest.mark.slow
def test_keys_before_the_first_have_no_influence():
    """With a first key for each query: the definition, the same gradients in chunks, and no bit of what is hidden."""
    q, k, v, lens, d_out = _inputs(3)
    lens = jnp.maximum(lens, 5)
    first = jnp.asarray(np.random.default_rng(6).integers(4, lens), jnp.int32)

    def run(implementation, k, v):
        def out_and_gradients(q, k, v):
            out, pull = jax.vjp(lambda *a: attention(*a, lens, implementation, 3, first), q, k, v)
            return out, *pull(d_out)

        return jax.jit(out_and_gradients)(q, k, v)

    expected = np.zeros(q.shape)
    for b, n in np.ndindex(B, Q):
        seen = slice(int(first[b, n]), int(lens[b, n]))
        weights = np.exp(np.einsum("HK,THK->HT", q[b, n], k[b, seen]) / K**0.5)
        expected[b, n] = np.einsum("HT,THK->HK", weights / weights.sum(axis=1, keepdims=True), v[b, seen])
    dense, chunked = run("dense", k, v), run("chunked", k, v)
    np.testing.assert_allclose(dense[0], expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(dense, chunked, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=2e-5)
    hidden = jnp.arange(T)[:, None, None] < first.min()
    for implementation, found in (("dense", dense), ("chunked", chunked)):
        other = run(implementation, *(jnp.where(hidden, value, a) for value, a in ((50.0, k), (-7.0, v))))
        for x, y in zip(found, other, strict=True):
            np.testing.assert_array_equal(x, y)
    # The last two queries fill up a chunk with padding, which sees key 0; others never meet the first three keys.
    nothing = run("chunked", *(jnp.where(jnp.arange(T)[:, None, None] < 3, jnp.nan, a) for a in (k, v)))
    np.testing.assert_array_equal(nothing[0][:, :6], chunked[0][:, :6])


@pytest.mark.slow
def test_chunked_never_touches_keys_that_no_query_of_a_chunk_can_see():
    """Chunks of keys beyond every prefix are skipped, forwards and backwards: numbers that are none do no harm there.

    Queries 0 to 3 see at most 5 keys, the others at most 9, and chunks are of 4: keys from 8 are for the second alone,
    and those from 12 for none.
    """
    keys, chunk = 16, 4
    rng = np.random.default_rng(5)
    q, d_out = (jnp.asarray(rng.standard_normal((B, 7, H, K)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((B, keys, H, K)), jnp.float32) for _ in range(2))
    lens = jnp.asarray([[1, 5, 2, 3, 9, 6, 1], [2, 2, 4, 5, 8, 9, 3]], jnp.int32)
    run = lambda *a: attention(*a, lens, "chunked", chunk)  # noqa: E731
    hidden = jnp.arange(keys)[:, None, None] >= 12
    out, pull = jax.vjp(run, q, k, v)
    other, other_pull = jax.vjp(run, q, *(jnp.where(hidden, jnp.nan, a) for a in (k, v)))
    np.testing.assert_array_equal(other, out)
    for a, b in zip(pull(d_out), other_pull(d_out), strict=True):
        np.testing.assert_array_equal(b, a)
    # Keys 8 to 11 are computed for the second chunk of queries and for no other.
    half = run(q, *(jnp.where(jnp.arange(keys)[:, None, None] >= 8, jnp.nan, a) for a in (k, v)))
    np.testing.assert_array_equal(half[:, :4], out[:, :4])
    assert np.isnan(half[:, 4:]).any()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_cached_attention_shares_heads_of_keys(kv_heads):
    """A head of keys serves neighbouring heads of queries, with prefixes, padding in front and a key of its own."""
    rng, heads = np.random.default_rng(6), 6
    q = rng.standard_normal((B, Q, heads, K)).astype(np.float32)
    k, v = (rng.standard_normal((B, T, kv_heads, K)).astype(np.float32) for _ in range(2))
    lens, own = rng.integers(3, T - 2, (B, Q)), rng.integers(T - 2, T, (B, Q))
    first = np.asarray([0, 2])
    k_ZKT = jnp.asarray(k.transpose(0, 2, 3, 1).reshape(B * kv_heads, K, T))
    v_ZTK = jnp.asarray(v.transpose(0, 2, 1, 3).reshape(B * kv_heads, T, K))
    found = cached_attention(jnp.asarray(q), k_ZKT, v_ZTK, *map(jnp.asarray, (lens, first, own)))
    for b, n, h in np.ndindex(B, Q, heads):
        seen = [*range(first[b], lens[b, n]), own[b, n]]
        shared = h // (heads // kv_heads)
        weights = np.exp(k[b, seen, shared] @ q[b, n, h] / np.sqrt(K))
        np.testing.assert_allclose(found[b, n, h], weights @ v[b, seen, shared] / weights.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_full_prefixes_equal_the_library():
    """With every key visible this is jax.nn.dot_product_attention; with the triangle's lengths it is `is_causal`."""
    q, k, v, _, _ = _inputs(1)
    full = jnp.full((B, Q), T, jnp.int32)
    expected = jax.nn.dot_product_attention(q, k, v)
    triangle = jnp.broadcast_to(jnp.arange(1, Q + 1), (B, Q))
    causal = jax.nn.dot_product_attention(q, k[:, :Q], v[:, :Q], is_causal=True)
    for implementation in ("dense", "chunked", "auto"):
        np.testing.assert_allclose(attention(q, k, v, full, implementation, 4), expected, rtol=1e-5, atol=1e-5)
        found = attention(q, k[:, :Q], v[:, :Q], triangle, implementation, 4)
        np.testing.assert_allclose(found, causal, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_large_scores_stay_finite():
    """The online softmax shifts by the running maximum: scores of several hundred give finite values and gradients."""
    q, k, v, lens, d_out = _inputs(2)
    for scale in (30.0, -30.0):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, lens, "chunked", 3), scale * q, k, v)
        np.testing.assert_allclose(out, attention(scale * q, k, v, lens, "dense"), rtol=1e-4, atol=1e-4)
        assert all(np.all(np.isfinite(gradient)) for gradient in pull(d_out))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_bfloat16_in_and_out(implementation):
    """bfloat16 queries, keys and values give a bfloat16 result and gradients near the float32 ones."""
    q, k, v, lens, d_out = _inputs(3, jnp.bfloat16)
    run = lambda *a: attention(*a, lens, implementation, 4)  # noqa: E731
    out, pull = jax.vjp(run, q, k, v)
    exact, exact_pull = jax.vjp(run, *(a.astype(jnp.float32) for a in (q, k, v)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
    for low, high in zip(pull(d_out), exact_pull(d_out.astype(jnp.float32)), strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.08)


def test_chunked_path_has_no_square_array(toy):
    """Forward and gradient at N = 512 in chunks of 64: no array anywhere has two axes of N or more."""
    length, chunk = 512, 64
    a = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
    lens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, lens):
        return jnp.sum(attention(q, k, v, lens, "chunked", chunk) ** 2)

    is_square = lambda shape: sum(axis >= length for axis in shape) > 1  # noqa: E731
    for function in (loss, jax.value_and_grad(loss, argnums=(0, 1, 2))):
        shapes = toy.shapes(jax.make_jaxpr(function)(a, a, a, lens))
        assert (1, 2, chunk, chunk) in shapes and not [shape for shape in shapes if is_square(shape)]
    dense = jax.make_jaxpr(lambda *inputs: attention(*inputs, "dense"))(a, a, a, lens)
    assert any(is_square(shape) for shape in toy.shapes(dense))  # the walk does find them


@pytest.mark.parametrize("aggregator", ["positional", "mean", "shift"])
def test_training_step_has_no_square_array(toy, aggregator):
    """The whole loss and its gradient, orders and block masks included, hold no N x N array at N = 512."""
    length = 512
    config = toy.config(
        max_length=length, num_layers=3, two_stream_layers=2, aggregator=aggregator, attention_chunk=64, remat="full"
    )
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))

    def loss(params, tokens, key):
        drawn = order.masked_diffusion(key, 1, length, 16)
        return objective.loss_sums(params, config, tokens, drawn).weighted_nll

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    shapes = toy.shapes(jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens, jax.random.key(0)))
    assert not [shape for shape in shapes if sum(axis >= length for axis in shape) > 1]


def test_auto_chooses_by_size(toy):
    """`auto` is dense where the keys are one chunk, and chunked where they are more."""

    def scans(queries: int, keys: int) -> bool:
        q = jax.ShapeDtypeStruct((1, queries, 1, 4), jnp.float32)
        k = jax.ShapeDtypeStruct((1, keys, 1, 4), jnp.float32)
        lens = jax.ShapeDtypeStruct((1, queries), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda *inputs: attention(*inputs, "auto", 64))(q, k, k, lens)
        return any(equation.primitive.name == "scan" for equation in toy.equations(jaxpr))

    assert not scans(128, 64)
    assert scans(512, 512) and scans(65, 65)


@pytest.mark.slow
def test_block_mask_lengths_are_valid_key_lengths(toy):
    """Every query of every mask sees at least one key and no more keys than there are: no softmax row is empty."""
    rng = np.random.default_rng(0)
    for length in (1, 2, 9):
        mask = block_mask.build(toy.stack(*(order.from_blocks(toy.blocks(rng, length)) for _ in range(5))))
        for lens in (mask.x_len_BN, mask.g_len_BN, mask.strict_len_BN):
            assert np.all(np.asarray(lens) >= 1) and np.all(np.asarray(lens) <= length)

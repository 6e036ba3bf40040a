"""The GPU kernels, interpreted: equal to dense attention in value and gradients over every order; lowered for CUDA.

On a machine with a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest tests/core/test_flash.py -k on_a_gpu
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import block_mask, order
from armd_jax.core.kernels import flash
from armd_jax.core.kernels.attention import KERNEL_OUTPUT, attention
from armd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, N, H, K = 2, 128, 2, 16
# So small that a sequence is many tiles, and all different.
SMALL = flash.Tiles(flash.Tile(32, 16, 4, 2), flash.Tile(16, 32, 4, 2), flash.Tile(32, 64, 4, 2))
KERNEL = functools.partial(flash.attention, tiles=SMALL, interpret=True)
DENSE = functools.partial(attention, implementation="dense")


def _orders() -> dict[str, order.Order]:
    return {
        "left_to_right": order.left_to_right(B, N),
        "strided 4": order.strided(B, N, 4),
        "strided 16": order.strided(B, N, 16),
        "uniform": order.uniform(jax.random.key(0), B, N),
        "masked_diffusion": order.masked_diffusion(jax.random.key(1), B, N, 8),
        "one block": order.from_blocks([range(N)], B),
    }


def _lens(kind: str) -> jax.Array:
    """Prefix lengths of X's and G's rows in one call [B, 2 N], then of G's in the causal stack [B, N]."""
    if kind == "not monotone":
        return jnp.asarray(np.random.default_rng(3).integers(1, N + 1, (B, 3 * N)), jnp.int32)
    mask = block_mask.build(_orders()[kind])
    return jnp.concatenate([mask.x_len_BN, mask.strict_len_BN, mask.g_len_BN], axis=1)


def _inputs(queries: int, keys: int, head_width: int = K, dtype=jnp.float32, heads: int = H) -> list[jax.Array]:
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, n, heads, head_width)), dtype) for n in (queries, keys, keys, queries)]


@functools.partial(jax.jit, static_argnums=0)
def _run(attend, q, k, v, d_out, lens) -> tuple[jax.Array, ...]:
    """The output and the gradients of q, k and v."""
    out, pull = jax.vjp(lambda *a: attend(*a, lens), q, k, v)
    return out, *pull(d_out)


def _compare(found, expected, atol=2e-5, rtol=2e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=atol, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*_orders(), "not monotone"])
@pytest.mark.parametrize("group", ["two_stream", "last_two_stream", "causal"])
def test_equals_dense_in_value_and_gradients(kind, group):
    """Both streams in one call, the strict one alone, the causal stack; drawn blocks; prefixes that rise and fall.

    Lengths are data: a program compiled for one of the orders serves all.
    """
    part = {"two_stream": slice(0, 2 * N), "last_two_stream": slice(N, 2 * N), "causal": slice(2 * N, 3 * N)}[group]
    lens = _lens(kind)[:, part]
    inputs = _inputs(lens.shape[1], N)
    _compare(_run(KERNEL, *inputs, lens), _run(DENSE, *inputs, lens))


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys", "head_width"), [(77, 45, 24), (1, 3, 2), (300, 150, 80)])
def test_rows_and_widths_that_are_no_tiles(queries, keys, head_width):
    """Rows that no tile divides and widths that are no power of two, on the tiles that are used: padded inside."""
    lens = jnp.asarray(np.random.default_rng(1).integers(1, keys + 1, (B, queries)), jnp.int32)
    inputs = _inputs(queries, keys, head_width)
    found = _run(functools.partial(flash.attention, interpret=True), *inputs, lens)
    _compare(found, _run(DENSE, *inputs, lens))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["strided 4", "masked_diffusion"])
def test_bfloat16_in_and_out(kind):
    """bfloat16 queries, keys and values give bfloat16 results near the float32 ones."""
    lens = _lens(kind)[:, : 2 * N]
    inputs = _inputs(2 * N, N, dtype=jnp.bfloat16)
    found = _run(KERNEL, *inputs, lens)
    assert {a.dtype for a in found} == {jnp.dtype(jnp.bfloat16)}
    exact = _run(DENSE, *(a.astype(jnp.float32) for a in inputs), lens)
    _compare(found[:1], exact[:1], atol=0.03)
    _compare(found[1:], exact[1:], atol=0.08)


def test_keys_beyond_the_prefix_have_no_influence():
    """Other keys and values at and beyond len change no bit of the output and get a gradient of exactly zero."""
    q, k, v, d_out = _inputs(N, N)
    for visible in (1, 31, 32, 33, N - 1):
        lens = jnp.full((B, N), visible, jnp.int32)
        hidden = jnp.arange(N)[:, None, None] >= visible
        out, dq, dk, dv = _run(KERNEL, q, k, v, d_out, lens)
        other = _run(KERNEL, q, jnp.where(hidden, 50.0, k), jnp.where(hidden, -7.0, v), d_out, lens)
        np.testing.assert_array_equal(other[0], out)
        np.testing.assert_array_equal(other[1], dq)
        for gradient in (dk, dv):
            assert np.all(np.asarray(gradient)[:, visible:] == 0)
            assert np.any(np.asarray(gradient[:, :visible]) != 0, axis=(0, 2, 3)).all() or visible == 1
    # A prefix of one key is that key's value, whatever its score.
    one = KERNEL(100 * q, 100 * k, v, jnp.ones((B, N), jnp.int32))
    np.testing.assert_allclose(one, jnp.broadcast_to(v[:, :1], one.shape), rtol=1e-6)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_tiles_that_are_not_seen_are_never_touched(poison):
    """Numbers that are none do no harm in tiles of keys that no query of a tile sees, nor in queries that see no key.

    Queries before 64 see at most 32 keys, the others at most 64; a tile is of at most 32 keys and 64 queries.
    """
    q, k, v, d_out = _inputs(N, N)
    lens = np.random.default_rng(2).integers(1, 33, (B, N))
    lens[:, 64:] += 32
    lens = jnp.asarray(lens, jnp.int32)
    row = jnp.arange(N)[:, None, None]
    clean = _run(KERNEL, q, k, v, d_out, lens)
    poisoned = lambda a, where: jnp.where(where, poison, a)  # noqa: E731
    for a, b in zip(_run(KERNEL, q, *(poisoned(a, row >= 64) for a in (k, v)), d_out, lens), clean, strict=True):
        np.testing.assert_array_equal(a, b)
    # Keys 32 to 63 are for the later queries alone.
    out, dq, _, _ = _run(KERNEL, q, *(poisoned(a, (row >= 32) & (row < 64)) for a in (k, v)), d_out, lens)
    np.testing.assert_array_equal(out[:, :64], clean[0][:, :64])
    np.testing.assert_array_equal(dq[:, :64], clean[1][:, :64])
    assert np.isnan(out[:, 64:]).any()
    # And their gradients know nothing of the earlier queries.
    _, _, dk, dv = _run(KERNEL, poisoned(q, row < 64), k, v, d_out, lens)
    np.testing.assert_array_equal(dk[:, 32:], clean[2][:, 32:])
    np.testing.assert_array_equal(dv[:, 32:], clean[3][:, 32:])
    assert np.isnan(dk[:, :32]).any()


def test_large_scores_stay_finite():
    """The online softmax shifts by the running maximum: scores of several hundred give finite values and gradients."""
    q, k, v, d_out = _inputs(N, N)
    lens = _lens("not monotone")[:, :N]
    for scale in (100.0, -100.0):
        found = _run(KERNEL, scale * q, k, v, d_out, lens)
        np.testing.assert_allclose(found[0], DENSE(scale * q, k, v, lens), rtol=1e-4, atol=1e-4)
        assert all(np.all(np.isfinite(a)) for a in found)


def test_no_square_array(toy):
    """Value and gradients at N = 512 hold no array with two axes of N or more."""
    a, lens = jax.ShapeDtypeStruct((1, 512, 2, 16), jnp.float32), jax.ShapeDtypeStruct((1, 512), jnp.int32)
    shapes = toy.shapes(jax.make_jaxpr(functools.partial(_run, flash.attention))(a, a, a, a, lens))
    assert (128, 64) in shapes and not [shape for shape in shapes if sum(axis >= 512 for axis in shape) > 1]


def test_wide_heads_are_refused():
    """There are no tiles for heads wider than 256."""
    with pytest.raises(UserError, match="heads of 257 are wider than 256"):
        flash.attention(*_inputs(4, 4, 257)[:3], jnp.ones((B, 4), jnp.int32))


def _cuda_text(function, *shapes) -> str:
    """The program for CUDA, as it is handed to XLA."""
    try:
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "compilation handler" not in str(error) and "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this JAX compiles Triton kernels while lowering, which takes a GPU and the [cuda] extra")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_width", [16, 64, 96, 128, 256])
def test_lowers_for_cuda(head_width, dtype):
    """Forward is one Triton kernel, the gradient two more, without a GPU here."""
    q, k = (jax.ShapeDtypeStruct((B, n, H, head_width), dtype) for n in (2 * N, N))
    lens = jax.ShapeDtypeStruct((B, 2 * N), jnp.int32)

    def kernels(text: str) -> list[str]:
        return re.findall(r'custom_call @[\w$.]*triton\w*\(.*?name = "(\w+)"', text)

    assert kernels(_cuda_text(flash.attention, q, k, k, lens)) == ["_flash_forward"]
    found = kernels(_cuda_text(functools.partial(_run, flash.attention), q, k, k, q, lens))
    assert found == ["_flash_forward", "_flash_dq", "_flash_dkv"]


def test_a_rematerialised_layer_keeps_the_softmax():
    """Where output and log-sum-exp are kept by name, nobody reads what a second forward kernel would put out.

    XLA drops such a call: it has no side effect.
    """
    a, lens = jax.ShapeDtypeStruct((1, N, H, K), jnp.float32), jax.ShapeDtypeStruct((1, N), jnp.int32)

    def kernels_in_use(policy) -> int:
        loss = jax.checkpoint(lambda *a: jnp.sum(flash.attention(*a) ** 2), policy=policy)
        text = _cuda_text(jax.value_and_grad(loss, argnums=(0, 1, 2)), a, a, a, lens)
        assert "has_side_effect = true" not in text
        return sum(
            len(re.findall(rf"{result}\b", function)) > 1
            for function in text.split("func.func")
            for result in re.findall(r"(%\d+)(?::\d+)? = stablehlo.custom_call @[\w$.]*triton", function)
        )

    assert kernels_in_use(jax.checkpoint_policies.save_only_these_names(KERNEL_OUTPUT)) == 3
    assert kernels_in_use(None) == 4


@pytest.mark.parametrize(("head_width", "dtype"), [(64, jnp.float32), (64, jnp.bfloat16), (128, jnp.bfloat16)])
def test_equals_dense_on_a_gpu(head_width, dtype):
    """Compiled and run: the same comparison on the hardware."""
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU here")
    length = 1000
    masks = [
        block_mask.build(drawn) for drawn in (order.strided(B, length, 4), order.uniform(jax.random.key(0), B, length))
    ]
    masks.append(block_mask.build(order.masked_diffusion(jax.random.key(1), B, length, 16)))
    inputs = jax.device_put(_inputs(2 * length, length, head_width, dtype), gpu)
    exact = [a.astype(jnp.float32) for a in inputs]
    for mask in masks:
        lens = jax.device_put(jnp.concatenate([mask.x_len_BN, mask.strict_len_BN], axis=1), gpu)
        with jax.default_matmul_precision("highest"):
            expected = _run(DENSE, *exact, lens)
            found = _run(flash.attention, *inputs, lens)
        if dtype == jnp.float32:
            _compare(found, expected, atol=5e-5, rtol=5e-5)
        else:
            _compare(found[:1], expected[:1], atol=0.03)
            _compare(found[1:], expected[1:], atol=0.08, rtol=2**-9)  # gradients reach 37; rounding to bfloat16

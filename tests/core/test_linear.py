"""The matrix product with its own gradient rule: the same product, the same gradients as autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core.kernels.linear import linear


def _autodiff(rows, weight, dtype=None):
    return jnp.tensordot(rows, weight, axes=1, preferred_element_type=dtype)


@pytest.mark.parametrize("out", [(16,), (3,), (8,), (2, 3, 4), (2, 2)], ids=str)
def test_product_and_gradients_equal_those_of_autodiff(out):
    """Wider, narrower and equally wide outputs, of one axis and of several, in float32, also rematerialised."""
    rng = np.random.default_rng(0)
    rows, weight, d_out = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 8), (8, *out), (2, 5, *out))
    )
    for function in (linear, jax.checkpoint(linear)):
        found, pull = jax.vjp(lambda *a, f=function: f(*a), rows, weight)
        expected, expected_pull = jax.vjp(_autodiff, rows, weight)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(jax.jit(pull)(d_out), expected_pull(d_out), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out", [16, 12, 3])
def test_several_axes_can_be_summed(out):
    """Heads and their width at once, as behind attention: values and gradients of the product over both."""
    rng = np.random.default_rng(3)
    rows, weight, d_out = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 3, 4), (3, 4, out), (2, 5, out))
    )
    found, pull = jax.vjp(linear, rows, weight)
    expected, expected_pull = jax.vjp(lambda rows, weight: jnp.einsum("BQHK,HKD->BQD", rows, weight), rows, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(d_out), expected_pull(d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out", [16, 3])
def test_low_precision_sums_and_gives_what_is_asked_for(out):
    """bfloat16 in: bfloat16 or float32 out; gradients in the dtypes of rows and weight, near the float32 ones."""
    rng = np.random.default_rng(1)
    rows, weight = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 5, 8), (8, out)))
    for dtype in (None, jnp.float32):
        found, pull = jax.vjp(lambda *a, d=dtype: linear(*a, d), rows, weight)
        assert found.dtype == (dtype or jnp.bfloat16)
        exact, exact_pull = jax.vjp(_autodiff, rows.astype(jnp.float32), weight.astype(jnp.float32))
        np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=1e-5 if dtype else 0.05)
        for a, b in zip(pull(jnp.ones_like(found)), exact_pull(jnp.ones_like(exact)), strict=True):
            assert a.dtype == jnp.bfloat16
            np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.1)


@pytest.mark.parametrize("out", [16, 3])
def test_the_wide_operand_of_the_weight_gradient_is_not_transposed(out):
    """The product over rows takes the narrower of rows and d out from the left, where a transpose is made of it."""
    rows, weight = jnp.ones((2, 5, 8)), jnp.ones((8, out))
    jaxpr = jax.make_jaxpr(lambda *a: jax.vjp(linear, *a[:2])[1](a[2]))(rows, weight, jnp.ones((2, 5, out)))
    over_rows = ((0, 1), (0, 1)), ((), ())
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    found = [e for e in products if e.params["dimension_numbers"] == over_rows]
    assert len(found) == 1
    assert found[0].invars[0].aval.shape[-1] == min(8, out)


def test_a_policy_that_keeps_products_keeps_these():
    """Rematerialising all but products: the backward pass computes no product of the forward pass again."""
    rows, weight, back = jnp.ones((2, 5, 8)), jnp.ones((8, 16)), jnp.ones((16, 8))

    def two(*a):
        return jnp.sin(linear(jnp.sin(linear(jnp.sin(a[0]), a[1])), a[2])).sum()

    def products(policy) -> int:
        gradient = jax.grad(jax.checkpoint(two, policy=policy), argnums=(0, 1, 2))
        return str(jax.make_jaxpr(gradient)(rows, weight, back)).count("dot_general[")

    assert products(jax.checkpoint_policies.dots_with_no_batch_dims_saveable) == 6
    assert products(None) == 8


@pytest.mark.parametrize("out", [16, 3])
def test_a_float32_weight_has_a_float32_gradient(out):
    """bfloat16 rows times a float32 weight: the product of bfloat16 arrays, and a gradient that no sum has rounded."""
    rng = np.random.default_rng(2)
    rows = jnp.asarray(rng.standard_normal((2, 512, 8)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((8, out)), jnp.float32)
    places = []
    found, pull = jax.vjp(lambda *a: linear(*a, at_use=lambda w: places.append(w.dtype) or w), rows, weight)
    np.testing.assert_array_equal(found, linear(rows, weight.astype(jnp.bfloat16)))
    d_rows, d_weight = pull(jnp.ones_like(found))
    assert (d_rows.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.asarray(rows, np.float64).sum(axis=(0, 1))[:, None] * np.ones(out)
    np.testing.assert_allclose(d_weight, exact, rtol=1e-5, atol=1e-4)
    # Both the weight in use and its gradient are told how to lie on the mesh.
    assert set(places) == {jnp.dtype("bfloat16"), jnp.dtype("float32")}

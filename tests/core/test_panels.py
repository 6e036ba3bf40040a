"""Weights in panels: the same products, for decoding's few rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import block_mask, network, order, parameters
from armd_jax.core.kernels.linear import linear
from armd_jax.core.kernels.panels import Panels, cut, few_rows
from armd_jax.core.rows import rows_for_training


def _draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(2, 1), (1, 3), (4, 4), (1, 17)], ids=str)
@pytest.mark.parametrize("depth", [7, 256, 1024])
@pytest.mark.parametrize("outer", [(64,), (96,), (2, 3, 32), (256,)], ids=str)
def test_products_are_those_of_the_weight(rows, depth, outer):
    """From two rows on, outputs of one axis and of several, by panels of either width, at sizes of real layers."""
    a_BRD, weight = _draw(*rows, depth), _draw(depth, *outer) * depth**-0.5
    panels = cut(weight)
    assert isinstance(panels, Panels)
    found = jax.jit(linear)(a_BRD, panels)
    assert found.shape == (*rows, *outer)
    np.testing.assert_allclose(found, jnp.tensordot(a_BRD, weight, axes=1), rtol=1e-5, atol=1e-5)


def test_layout_by_rows():
    """Panels are for a few rows: a single one and many keep the ordinary product."""
    assert [few_rows(rows) for rows in (1, 2, 16, 17)] == [False, True, True, False]


def test_a_panel_is_bounded():
    """A wide weight has wide panels, a long one narrow ones."""
    assert cut(jnp.zeros((256, 128))).panels_PDW.shape == (2, 256, 64)
    assert cut(jnp.zeros((1024, 128))).panels_PDW.shape == (4, 1024, 32)


def test_columns_that_fill_no_panels_stay():
    """Nothing is padded: such a weight keeps the ordinary product."""
    weight = _draw(8, 40)
    assert cut(weight) is weight


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "mlp": "swiglu"}, {"two_stream_layers": 0}], ids=str)
def test_the_network_is_the_same(changes):
    """Hidden states and logits, tied and untied, with either MLP, with and without two-stream layers."""
    fields = dict(
        vocab_size=70, max_length=6, num_layers=3, two_stream_layers=2, width=64, num_heads=2, dtype="float32"
    )
    config = ModelConfig(**(fields | changes))
    params = parameters.init(jax.random.key(0), config)
    tokens_BN = jnp.asarray(np.random.default_rng(1).integers(0, 70, (2, 6)), jnp.int32)
    drawn = order.strided(2, 6, 2)
    rows = rows_for_training(tokens_BN, drawn, block_mask.build(drawn))

    @jax.jit
    def logits(params):
        h_BND, _ = network.forward(params, config, rows)
        return network.head_logits(params, config, h_BND)[..., :70]

    weights = 6 if config.mlp == "swiglu" else 5
    both = weights - 1 if config.two_stream_layers else 0  # keys and values are of one stream
    is_panels = lambda leaf: isinstance(leaf, Panels)  # noqa: E731
    for switches, expected in {(True, True): 3 * weights + 1, (True, False): both, (False, False): 0}.items():
        panels = parameters.in_panels(params, *switches)
        assert sum(map(is_panels, jax.tree.leaves(panels, is_leaf=is_panels))) == expected
        np.testing.assert_allclose(logits(panels), logits(params), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(1, 2), (2, 8), (2, 32), (4, 64)], ids=str)
@pytest.mark.parametrize("hidden", [64, 128, 1536])
def test_two_products_of_the_same_rows_in_one_expression(rows, hidden):
    """SwiGLU, whose two products the compiler makes one loop of: right from a few rows to many, panels few or many."""
    a_BRD = _draw(*rows, 24)
    gate, weight = _draw(24, hidden), _draw(24, hidden + 1)[:, 1:]
    found = jax.jit(lambda a, g, w: jax.nn.silu(linear(a, g)) * linear(a, w))(a_BRD, cut(gate), cut(weight))
    np.testing.assert_allclose(found, jax.nn.silu(a_BRD @ gate) * (a_BRD @ weight), rtol=1e-4, atol=1e-4)

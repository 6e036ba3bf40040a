"""The TPU kernel, interpreted: equal to dense attention in value and gradients, over every kind of mask in use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import block_mask, curriculum, order
from armd_jax.core.kernels import splash
from armd_jax.core.kernels.attention import attention
from armd_jax.order_config import OrderConfig, block_patterns

B, N, H, K = 2, 256, 2, 32


def _lens(streams: int, group: str) -> jax.Array:
    mask = block_mask.build(order.strided(B, N, streams))
    return {
        "two_stream": jnp.concatenate([mask.x_len_BN, mask.strict_len_BN], axis=1),
        "last_two_stream": mask.strict_len_BN,
        "causal": mask.g_len_BN,
        "bidirectional": jnp.full((B, N), N),
    }[group]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "streams", "patterns"),
    [
        ("two_stream", 1, (1,)),
        ("two_stream", 16, (1, 16)),
        ("last_two_stream", 4, (4,)),
        ("causal", 1, (1, 16)),
        ("bidirectional", 1, (1,)),
    ],
)
def test_equals_dense_in_value_and_gradients(group, streams, patterns):
    """Both streams in one call, the strict one alone, the causal stack, a denoiser; patterns told apart by the data."""
    lens = _lens(streams, group)
    rng = np.random.default_rng(0)
    draw = lambda rows: jnp.asarray(rng.standard_normal((B, rows, H, K)), jnp.float32)  # noqa: E731
    q, k, v, d_out = draw(lens.shape[1]), draw(N), draw(N), draw(lens.shape[1])

    def run(attend):
        out, pull = jax.vjp(lambda *a: attend(*a, lens), q, k, v)
        return out, *pull(d_out)

    kernel = functools.partial(splash.attention, group=group, patterns=patterns, interpret=True)
    expected = jax.jit(lambda: run(functools.partial(attention, implementation="dense")))()
    for a, b in zip(jax.jit(lambda: run(kernel))(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mix", "sbp_steps", "expected"),
    [
        *((kind, (), 0, (1,)) for kind in ("left_to_right", "progressive", "uniform")),
        *((kind, (), 5, (1, 2, 4)) for kind in ("left_to_right", "progressive", "uniform")),
        *(("strided", (), sbp_steps, (2, 4)) for sbp_steps in (0, 5)),
        ("strided", ("uniform:0.4",), 0, (1, 2, 4)),
        ("left_to_right", ("strided:0.4", "uniform:0.2"), 0, (1, 2, 4)),
        ("left_to_right", ("uniform:0.4",), 0, (1,)),
    ],
)
def test_patterns_cover_every_order_of_training(kind, mix, sbp_steps, expected):
    """Prefix lengths of the orders that `curriculum.draw` draws are, in every row, those of one of the patterns."""
    config = OrderConfig(kind=kind, ar_steps=0, permute_steps=5, max_permuted=8, streams=(2, 4), sbp_steps=sbp_steps)
    config = dataclasses.replace(config, mix=mix)
    patterns = block_patterns(config)
    assert patterns == expected
    tables = {s: splash.prefix_tables(128, s) for s in patterns}
    draw = jax.jit(lambda step: block_mask.build(curriculum.draw(config, jax.random.key(step), step, 10, 3, 128)))
    seen = set()
    for step in range(10):
        mask = draw(step)
        fits = [s for s in patterns if np.all(np.asarray(mask.strict_len_BN) == tables[s]["last_two_stream"])]
        assert len(fits) == 1
        table = tables[fits[0]]
        np.testing.assert_array_equal(mask.g_len_BN, np.broadcast_to(table["causal"], (3, 128)))
        np.testing.assert_array_equal(mask.x_len_BN, np.broadcast_to(table["two_stream"][:128], (3, 128)))
        seen.add(fits[0])
    assert len(seen) > 1 or len(patterns) == 1

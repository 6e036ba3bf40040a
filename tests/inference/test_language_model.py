"""Generation as users run it: fully optimised programs, and on CPU weights in panels, at sizes of real layers."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.core.kernels.panels import Panels
from armd_jax.inference.language_model import LanguageModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

VOCAB, LENGTH = 300, 32


@functools.cache
def _model(width: int, mlp: str) -> LanguageModel:
    """A model with weights nowhere zero, whose logits spread over about one nat."""
    config = ModelConfig(
        vocab_size=VOCAB,
        max_length=LENGTH,
        num_layers=3,
        two_stream_layers=2,
        width=width,
        num_heads=2,
        mlp=mlp,
        dtype="float32",
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 1 if leaf.ndim < 2 else leaf.shape[-1] ** -0.5
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    return LanguageModel(config, jax.tree.map(draw, shapes))


@pytest.mark.parametrize(
    ("batch", "streams", "width", "mlp", "prompt"),
    [
        (1, 1, 64, "gelu", ()),  # both streams of a call together have two rows: panels for these alone
        (1, 2, 256, "swiglu", (7, 8, 9)),
        (1, 8, 256, "gelu", ()),
        (4, 4, 64, "gelu", (7, 8)),  # the causal layers alone
    ],
    ids=str,
)
def test_decoding_reports_the_parallel_log_probs(batch, streams, width, mlp, prompt):
    """Whichever layout the number of rows chooses, cached decoding equals the parallel forward."""
    lm = _model(width, mlp)
    if jax.default_backend() == "cpu":
        is_panels = lambda leaf: isinstance(leaf, Panels)  # noqa: E731
        assert any(
            map(is_panels, jax.tree.leaves(lm._loop_params(2 * batch * streams, batch * streams), is_leaf=is_panels))
        )
    out = lm.generate(batch, streams=streams, prompt=prompt or None, seed=3)
    expected = np.asarray(lm.log_prob(out.tokens_BN, out.order))
    assert expected.std() > 0.5  # the model has opinions, so that agreement means something
    np.testing.assert_allclose(out.log_prob_BN, expected, atol=1e-4)


def test_in_bfloat16_the_log_probs_agree_to_its_rounding():
    """Within hundredths of a nat per token, as the docs say: a cache adds up rounded numbers in another order."""
    exact = _model(64, "gelu")
    lm = LanguageModel(dataclasses.replace(exact.config, dtype="bfloat16"), exact.params)
    out = lm.generate(4, streams=2, seed=3)
    difference = np.abs(out.log_prob_BN - np.asarray(lm.log_prob(out.tokens_BN, out.order))).max()
    assert difference < 0.1


def test_models_are_freed_as_soon_as_nobody_holds_them():
    """Copies that wrote a text leave nothing to the cycle collector, which may not look for hundreds of megabytes."""
    lm = _model(64, "gelu")
    lm.generate(1, streams=2)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    gc.collect()
    gc.disable()
    try:
        before = sum(array.nbytes for array in jax.live_arrays())
        for _ in range(4):
            copy = lm.replace(params=jax.tree.map(jnp.copy, lm.params))
            copy.generate(1, streams=2)
            alive = weakref.ref(copy)
            del copy
            assert alive() is None
        assert sum(array.nbytes for array in jax.live_arrays()) < before + size
    finally:
        gc.enable()

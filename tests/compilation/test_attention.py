"""What the text of a program does not tell of attention: iterations over chunks of keys, and tiles of the kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from armd_jax.compilation import attention, costs
from armd_jax.compilation.hlo import Program
from armd_jax.config import Config, ModelConfig, TrainingConfig
from armd_jax.core import flops
from armd_jax.core.kernels import attention as kernels
from armd_jax.core.kernels import splash
from armd_jax.order_config import OrderConfig

BATCH, LENGTH, HEADS, WIDTH, CHUNK = 2, 64, 2, 16, 16


def _compiled() -> str:
    """A compiled forward and backward pass of chunked attention."""
    shape = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH), jnp.float32)
    lens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def loss(q, k, v, lens):
        return jnp.sum(kernels.attention(q, k, v, lens, "chunked", CHUNK) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, lens).compile().as_text()


@pytest.fixture(scope="module")
def text() -> str:
    return _compiled()


@pytest.mark.parametrize("kind", ["armd", "denoiser"])
def test_chunked_attention_counts_the_chunks_that_are_seen(text, kind):
    """Forward 2 products and backward 5, over the chunks of keys that are visible: a triangle of them, or all."""
    config = Config(model=ModelConfig(kind=kind, max_length=LENGTH))
    program = Program(text, attention.iterations(config))
    chunks = LENGTH // CHUNK
    seen = chunks * (chunks + 1) / 2 if config.model.has_orders else chunks**2
    product = 2 * BATCH * HEADS * CHUNK * CHUNK * WIDTH
    delta = 2 * BATCH * HEADS * LENGTH * WIDTH  # the sum of output times gradient, once per row
    assert not program.unknown_loops
    assert costs.product_flops(program) == pytest.approx(7 * seen * product + delta, rel=0.02)


def test_without_an_expectation_the_loops_are_unknown(text):
    """The same program, of which nobody says how long its rows see: a loop forward and one backward."""
    assert len(Program(text).unknown_loops) == 2


def _config(**order) -> Config:
    model = ModelConfig(vocab_size=1280, max_length=1024, num_layers=5, two_stream_layers=2, width=256, num_heads=4)
    return Config(model=model, order=OrderConfig(**order), training=TrainingConfig(batch_size=3))


def test_the_kernel_computes_whole_tiles():
    """Of 2 x 2 tiles of 512, three are visible in part: 3/4 of the square, where half of it can be seen."""
    config = _config(kind="left_to_right")
    assert splash.computed_pairs(1024, 1) == {
        "two_stream": 6 * 512**2,
        "last_two_stream": 3 * 512**2,
        "causal": 3 * 512**2,
        "bidirectional": 4 * 512**2,
    }
    found = attention.splash_forward_flops(config)
    # One two-stream layer of 2 N rows, the last one of N, and three causal ones: the work of six layers.
    assert found == 6 * 4 * 256 * 3 * 512**2 * config.training.batch_size
    visible = flops.forward_flops_per_token(config.model).attention * 1024 * config.training.batch_size
    assert found / visible == pytest.approx(1.5, rel=2e-3)


def test_several_patterns_are_their_mean():
    """A step draws one of its numbers of streams; each has a kernel of its own."""
    alone = [attention.splash_forward_flops(_config(kind="strided", streams=(s,))) for s in (1, 8)]
    both = attention.splash_forward_flops(_config(kind="strided", streams=(1, 8)))
    assert both == sum(alone) / 2
    assert attention.splash_forward_flops(_config(kind="masked_diffusion")) == 0.0
    config = _config(kind="left_to_right")
    odd = dataclasses.replace(config, model=dataclasses.replace(config.model, max_length=250))
    assert attention.splash_forward_flops(odd) == 0.0  # no kernel has rows of this length
    denoiser = dataclasses.replace(_config(), model=ModelConfig(kind="denoiser", num_layers=2, max_length=1024))
    assert attention.splash_forward_flops(denoiser) == 2 * 4 * 768 * 1024**2 * 3

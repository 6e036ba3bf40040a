"""One update and one evaluation step: what is drawn for them, what they minimise, and what they report."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import config as configs
from armd_jax.config import Config
from armd_jax.core import objective, order, parameters
from armd_jax.inference import likelihood
from armd_jax.training import placement, sharding, state, step

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 16)), jnp.int32)


def _config(kind: str = "armd", order: str = "uniform", **training: Any) -> Config:
    values = configs.default_config_dict()
    values.model.update(
        kind=kind, vocab_size=50, max_length=16, num_layers=2, two_stream_layers=1, width=16, num_heads=2
    )
    values.model.positional_width = 8
    values.order.update(kind=order, weight="simple", diffusion_steps=8)
    values.training.update(num_steps=16, batch_size=4, **training)
    return configs.from_config_dict(values)


def _params(config: Config) -> parameters.Params:
    return jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), config.model)


def _placed(config: Config) -> placement.Placement:
    return placement.for_training(config, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize("kind", ["armd", "denoiser"])
def test_every_step_and_seed_draws_another_task(kind):
    """A pure function of the two: the same again at the same step, and another one at another step or seed."""

    def drawn(seed: int, at: int) -> bytes:
        leaves = jax.tree.leaves(step.draw_task(_config(kind, seed=seed), at, 16))
        return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)

    places = [(0, 3), (0, 4), (1, 3), (1, 4)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(0, 3) == drawn(0, 3)


@pytest.mark.slow
def test_every_batch_of_an_evaluation_has_masks_of_its_own():
    """They depend on the number of the batch and on the seed, and on nothing that changes during a run."""

    def nll(seed: int, number: int) -> float:
        config = _config("denoiser", seed=seed)
        run = step.make_eval_step(placement.for_evaluation(config, sharding.make_mesh(config.mesh)))
        return float(run(params, TOKENS, jnp.ones((4, 16), bool), number).nll)

    params = _params(_config("denoiser"))
    assert len({nll(0, 0), nll(0, 1), nll(1, 0)}) == 3 and nll(0, 1) == nll(0, 1)


@pytest.mark.slow
def test_gradients_are_summed_in_the_dtype_of_the_config():
    """Below bfloat16 activations, sums over rows are float32, or bfloat16 if the config asks for it."""

    def sums(kind: str, gradient_sums: str) -> set[str]:
        config = _config(kind, gradient_sums=gradient_sums)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16", mlp="swiglu"))
        placed, params = _placed(config), jax.eval_shape(lambda: parameters.init(jax.random.key(0), config.model))
        task = jax.eval_shape(lambda: step.draw_task(config, 0, 16))
        traced = jax.make_jaxpr(lambda p, t: step.gradients(p, placed, TOKENS, t, 0))(params, task)
        over_rows = r"dimension_numbers=\(\(\[0, 1\], \[0, 1\]\), .*?preferred_element_type=(\w+)"
        return set(re.findall(over_rows, str(traced), re.DOTALL))

    for kind in ("armd", "denoiser"):
        assert sums(kind, "float32") == {"float32"}
        assert "bfloat16" in sums(kind, "activations")


@pytest.mark.slow
def test_the_rate_is_that_of_the_step_whatever_was_skipped():
    """An optimizer that has made no update yet takes the rate of step 9 at step 9, which is what the step reports."""
    config = _config()
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.1, warmup_steps=20)
    )
    placed = _placed(config)
    before = state.create(config, placed.mesh)
    before = dataclasses.replace(before, step=jnp.int32(9))
    params = jax.tree.map(np.asarray, before.params)
    after, metrics = step.make_train_step(placed)(before, TOKENS)
    moves = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), after.params, params)
    moved = max(jax.tree.leaves(moves))
    # Adam's first update of a weight is the rate itself, and the warm-up gives each step a rate of its own.
    assert moved == pytest.approx(float(metrics["train/learning_rate"]), rel=1e-3)
    assert moved == pytest.approx(0.1 * 10 / 20, rel=1e-3)


@pytest.mark.slow
def test_the_penalty_of_the_partition_is_a_mean_over_tokens():
    """`training.z_loss` adds that many times the mean squared log-partition, however large the batch is."""
    config = _config()
    params = jax.tree.map(lambda leaf: 3 * leaf, _params(config))
    task = step.draw_task(config, 0, 16)

    def gradient(z_loss: float) -> parameters.Params:
        training = dataclasses.replace(config.training, z_loss=z_loss)
        placed = _placed(dataclasses.replace(config, training=training))
        return jax.jit(lambda p: step.gradients(p, placed, TOKENS, task, 0)[0])(params)

    mean = lambda p: objective.loss_sums(p, config.model, TOKENS, task).z / TOKENS.size  # noqa: E731
    expected = jax.jit(jax.grad(mean))(params)
    for (path, penalised), plain, of_mean in zip(
        jax.tree_util.tree_leaves_with_path(gradient(0.5)),
        jax.tree.leaves(gradient(0.0)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(
            penalised - plain, 0.5 * of_mean, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.slow
def test_documents_are_kept_apart_in_training_and_validation():
    """With `data.reset=document`, both score every document of a row as if it were alone."""
    config = _config(order="left_to_right", microbatches=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, reset="document", end_of_text=0))
    tokens = jnp.maximum(TOKENS, 1).at[:, [3, 7, 11]].set(0)  # documents of four tokens
    params = jax.tree.map(lambda leaf: 3 * leaf, _params(config))
    alone = likelihood.log_prob(params, config.model, tokens.reshape(16, 4), order.left_to_right(16, 4))
    expected = -float(alone.mean())
    placed = _placed(config)
    evaluate = step.make_eval_step(placement.for_evaluation(config, placed.mesh))
    sums = evaluate(params, tokens, jnp.ones(tokens.shape, bool), 0)
    assert float(sums.nll / sums.tokens) == pytest.approx(expected, rel=1e-5)
    _, metrics = step.make_train_step(placed)(state.create(config, placed.mesh, params), tokens)
    assert float(metrics["train/loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_what_a_step_reports():
    """`train/loss` is weighted as it is minimised, `train/nll` counts every token once; both are per token."""
    config = _config(order="masked_diffusion")
    placed = _placed(config)
    now = state.create(config, placed.mesh)
    task = step.draw_task(config, 0, 16)
    grads, sums = jax.jit(lambda p: step.gradients(p, placed, TOKENS, task, 0))(now.params)
    after, metrics = step.make_train_step(placed)(now, TOKENS)
    assert float(metrics["train/loss"]) == pytest.approx(float(sums.weighted_nll / sums.weight), rel=1e-5)
    assert float(metrics["train/nll"]) == pytest.approx(float(sums.nll) / TOKENS.size, rel=1e-5)
    assert abs(float(metrics["train/loss"] - metrics["train/nll"])) > 1e-3
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))))
    assert float(metrics["train/grad_norm"]) == pytest.approx(norm, rel=1e-5) and int(after.step) == 1

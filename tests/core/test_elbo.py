"""A trained denoiser's ELBO is a bound: on a Markov chain, whose entropy is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.config import Config, OptimizerConfig, TrainingConfig
from armd_jax.core import corruption, objective
from armd_jax.training import placement, sharding, state, step


@pytest.mark.slow
def test_the_elbo_bounds_the_entropy_of_a_markov_chain(toy):
    """Trained on a Markov chain, the exact ELBO is above its entropy, which is known, and at most 3% above."""
    num_states, length, batch, num_steps = 4, 8, 256, 500
    rng = np.random.default_rng(0)
    transition = np.asarray(
        [[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.85, 0.05], [0.3, 0.3, 0.1, 0.3], [0.0, 0.5, 0.0, 0.5]]
    )
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    stationary /= stationary.sum()
    plogp = lambda p: -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=-1)  # noqa: E731
    entropy = plogp(stationary) + (length - 1) * stationary @ plogp(transition)

    def chains(count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences [count, N], and -log p of each."""
        rows = [rng.choice(num_states, size=count, p=stationary)]
        for _ in range(length - 1):
            rows.append((rng.random(count)[:, None] > transition[rows[-1]].cumsum(axis=1)).sum(axis=1))
        tokens = np.stack(rows, axis=1).astype(np.int32)
        nats = -np.log(stationary[tokens[:, 0]]) - np.log(transition[tokens[:, :-1], tokens[:, 1:]]).sum(axis=1)
        return tokens, nats

    model = toy.config(
        kind="denoiser", vocab_size=num_states, max_length=length, num_layers=3, width=32, num_heads=2, mlp_width=64
    )
    optimizer = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=50, schedule="cosine", beta2=0.99, ema_decay=0.99, weight_decay=0.0
    )
    config = Config(model=model, optimizer=optimizer, training=TrainingConfig(num_steps=num_steps, batch_size=batch))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    now, train_step = state.create(config, mesh), step.make_train_step(placement.for_training(config, mesh))
    tokens, _ = chains(num_steps * batch)
    for rows in tokens.reshape(num_steps, batch, length):
        now, metrics = train_step(now, jax.device_put(rows, sharding.batch_sharding(mesh)))
    assert int(metrics["train/skipped"]) == 0
    held_out, nats = chains(200)
    bound = toy.negative_elbo(now.eval_params, model, held_out)
    gap = bound - nats  # paired, so that the noise of the 300 sequences cancels
    error = gap.std(ddof=1) / len(gap) ** 0.5
    assert -4 * error < gap.mean() < 0.03 * entropy - 2 * error, (gap.mean(), error, entropy)
    # What `armd eval` and validation report is the same number, up to the masks that they draw.
    rows = jnp.asarray(np.tile(held_out, (100, 1)))
    sums = objective.loss_sums(
        now.eval_params, model, rows, corruption.by_count(jax.random.key(0), jnp.ones(rows.shape, bool))
    )
    assert float(sums.nll / sums.tokens) * length == pytest.approx(bound.mean(), rel=0.01)
    assert nats.mean() == pytest.approx(entropy, abs=4 * nats.std() / len(nats) ** 0.5)

"""One optimizer update: task, loss, gradients, update rule, average. A pure function of (state, tokens)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from armd_jax.config import Config
from armd_jax.core import documents, objective
from armd_jax.core import task as tasks
from armd_jax.core.objective import LossSums, Task
from armd_jax.core.parameters import Params
from armd_jax.training import optimizer, sharding
from armd_jax.training import state as states
from armd_jax.training.optimizer import Rewarm
from armd_jax.training.placement import Placement
from armd_jax.training.state import TrainState

# Purposes of random draws, folded into the seed's key before the step number; 0 is initialisation.
_TASK, _DROPOUT, _HELD_OUT = 1, 2, 3

Metrics = dict[str, jax.Array]


def _key(config: Config, purpose: int, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.training.seed), purpose), step)


def task_key(config: Config, step: jax.Array | int) -> jax.Array:
    """The key that the order or corruption of a step is drawn with."""
    return _key(config, _TASK, jnp.asarray(step))


def draw_task(config: Config, step: jax.Array | int, length: int, tokens_BN: jax.Array | None = None) -> Task:
    """The order or corruption of the whole global batch at a step: a pure function of (seed, step), and of the tokens.

    tokens_BN: the batch, which only says where documents begin, if they are kept apart (`data.reset`). None: every row
        is one document.
    """
    first_BN = None if tokens_BN is None else documents.of(config, tokens_BN)
    rows = config.training.batch_size, length, first_BN
    return tasks.of(config).draw(task_key(config, step), jnp.asarray(step), *rows)


def gradients(
    params: Params, placement: Placement, tokens_BN: jax.Array, task: Task, step: jax.Array
) -> tuple[Params, LossSums]:
    """The gradient of the loss over the whole batch, and the loss's sums.

    With gradient accumulation, the gradients of the microbatches add up to that of the large batch.
    """
    config, count = placement.config, placement.config.training.microbatches
    weight, tokens = objective.totals(task)
    total_weight, total_tokens = jnp.maximum(weight, 1e-9), jnp.maximum(tokens, 1.0)
    dropout_key = _key(config, _DROPOUT, step) if config.model.dropout else None
    whole = dataclasses.replace(placement.context, dropout_key=dropout_key)

    def loss(params: Params, tokens: jax.Array, task: Task, number: jax.Array | int) -> tuple[jax.Array, LossSums]:
        sums = objective.loss_sums(params, config.model, tokens, task, whole.fold_in(number))
        return sums.weighted_nll / total_weight + config.training.z_loss * sums.z / total_tokens, sums

    grad = jax.grad(loss, has_aux=True)
    if count == 1:
        return grad(params, tokens_BN, task, 0)

    def accumulate(carry: Any, inputs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, grad(params, *inputs)), None

    # Row r goes to microbatch r mod count, so that every device keeps its own rows.
    split = lambda a: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1)  # noqa: E731
    inputs = (split(tokens_BN), jax.tree.map(split, task), jnp.arange(count))
    zeros = jax.tree.map(jnp.zeros_like, params), LossSums(*[jnp.float32(0)] * 5)
    return jax.lax.scan(accumulate, zeros, inputs)[0]


def make_train_step(placement: Placement, rewarm: Rewarm | None = None) -> jax.stages.Wrapped:
    """The jitted update (state, tokens_BN int32 [batch_size, N]) -> (state, metrics); it reuses the state's buffers.

    rewarm: the second warm-up of a run that was continued.
    """
    config, mesh = placement.config, placement.mesh
    tx = optimizer.make(config, rewarm)
    rate = optimizer.learning_rate(config, rewarm)

    def train_step(state: TrainState, tokens_BN: jax.Array) -> tuple[TrainState, Metrics]:
        task = draw_task(config, state.step, tokens_BN.shape[1], tokens_BN)
        task = jax.tree.map(lambda a: placement.context.constrain(a, ("batch", "length")), task)
        grads, sums = gradients(state.params, placement, tokens_BN, task, state.step)
        updates, opt_state = tx.update(grads, optimizer.at_step(state.opt_state, state.step), state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else optimizer.update_ema(config.optimizer, state.ema, params, state.step)
        loss, grad_norm = sums.weighted_nll / sums.weight, optax.global_norm(grads)

        # An update that would do harm is not made: parameters, average and moments stay as they are, bit for bit.
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        kind = tasks.of(config).kind(task_key(config, state.step), state.step) if state.loss_average.ndim else ...
        average = state.loss_average[kind]
        if config.training.spike_nats:
            good &= loss <= average + config.training.spike_nats
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
        average = jnp.where(jnp.isinf(average), loss, 0.98 * average + 0.02 * loss)
        skipped = jnp.where(good, 0, state.skipped + 1)
        metrics = {
            "train/loss": loss,
            "train/nll": sums.nll / sums.tokens,
            "train/grad_norm": grad_norm,
            "train/learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "train/skipped": skipped.astype(jnp.float32),
        }
        new = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=skipped,
            loss_average=keep(state.loss_average.at[kind].set(average), state.loss_average),
        )
        return new, metrics

    everywhere = sharding.replicated(mesh)
    state_sharding = states.shardings(config, mesh)
    return jax.jit(
        train_step,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, everywhere),
        donate_argnums=0,
    )


def make_eval_step(placement: Placement) -> Callable[[Params, jax.Array, jax.Array, jax.Array | int], LossSums]:
    """The jitted (params, tokens_BN, valid_BN, number) -> LossSums of the likelihood, or of the bound if there is none.

    number: of the batch. Whatever the task draws depends on it and on the seed alone, so that two evaluations during a
    run differ by their parameters and nothing else.
    """
    config, mesh = placement.config, placement.mesh
    held_out = tasks.of(config).held_out

    def eval_step(params: Params, tokens_BN: jax.Array, valid_BN: jax.Array, number: jax.Array) -> LossSums:
        task = held_out(_key(config, _HELD_OUT, number), valid_BN, documents.of(config, tokens_BN))
        return objective.loss_sums(params, config.model, tokens_BN, task, placement.context)

    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    params_sharding = states.shardings(config, mesh).params
    return jax.jit(eval_step, in_shardings=(params_sharding, rows, rows, everywhere), out_shardings=everywhere)

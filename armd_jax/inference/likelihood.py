"""Jitted logits and log-probabilities of whole sequences under any order, at natural positions."""

import functools

import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core import block_mask, network, objective
from armd_jax.core.order import Order
from armd_jax.core.parameters import Params
from armd_jax.core.rows import rows_for_training


@functools.partial(jax.jit, static_argnames="config")
def logits(params: Params, config: ModelConfig, tokens_BN: jax.Array, order: Order) -> jax.Array:
    """[B, N, V] float32, V the real vocabulary: row j scores the token at natural position j given earlier blocks."""
    rows = rows_for_training(tokens_BN, order, block_mask.build(order))
    h_BND, _ = network.forward(params, config, rows)
    h_BND = objective.to_natural(order, h_BND)
    return network.head_logits(params, config, h_BND)[..., : config.vocab_size]


@functools.partial(jax.jit, static_argnames="config")
def log_prob(params: Params, config: ModelConfig, tokens_BN: jax.Array, order: Order) -> jax.Array:
    """[B, N] float32: log p of every token at its natural position; the sum over a row is log p of the sequence."""
    log_probs_BN, _ = objective.generation_log_probs(params, config, tokens_BN, order)
    return objective.to_natural(order, log_probs_BN)


@functools.partial(jax.jit, static_argnames="config")
def log_prob_and_greedy(
    params: Params, config: ModelConfig, tokens_BN: jax.Array, order: Order
) -> tuple[jax.Array, jax.Array]:
    """`log_prob`, and bool [B, N]: whether each token is the likeliest at its place, the first one if several are."""
    rows = rows_for_training(tokens_BN, order, block_mask.build(order))
    h_BND, _ = network.forward(params, config, rows)
    found = objective.by_chunks(_of_target, params, config, objective.to_natural(order, h_BND), tokens_BN)
    return found[0], found[1]


@functools.partial(jax.jit, static_argnames="config")
def log_prob_and_hidden(
    params: Params, config: ModelConfig, tokens_BN: jax.Array, order: Order
) -> tuple[jax.Array, jax.Array]:
    """`log_prob`, and [B, N, D] float32: the final hidden state that predicts each token, at its natural position."""
    rows = rows_for_training(tokens_BN, order, block_mask.build(order))
    h_BND, _ = network.forward(params, config, rows)
    h_BND = objective.to_natural(order, h_BND)
    log_probs_BN, _ = objective.token_log_probs(params, config, h_BND, tokens_BN)
    return log_probs_BN, h_BND.astype(jnp.float32)


def _of_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_probs_BC, _ = objective.of_target(logits_BCV, targets_BC)
    return log_probs_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

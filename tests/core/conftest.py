"""Toy models, orders and jaxpr walks shared by the tests of the mathematics."""

import itertools
import math
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import objective, parameters
from armd_jax.core.corruption import Corruption
from armd_jax.core.order import Order


def _config(**changes: Any) -> ModelConfig:
    fields = {
        "vocab_size": 3,
        "max_length": 4,
        "num_layers": 2,
        "two_stream_layers": 1,
        "width": 8,
        "num_heads": 2,
        "mlp_width": 16,
        "positional_width": 8,
        "dtype": "float32",
        "scan_layers": "off",
    }
    return ModelConfig(**(fields | changes))


def _params(config: ModelConfig, seed: int = 0, scale: float = 3.0, noise: float = 0.3) -> parameters.Params:
    """Parameters of `init`'s structure, about `scale` times its size and nowhere zero, so that any leak is visible."""
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = scale if path[-1].key == "scale" else 0.0
        std = np.hypot(scale * config.width**-0.5, noise) if len(leaf.shape) > 1 and not mean else noise
        return jnp.asarray(mean + std * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _blocks(rng: np.random.Generator, length: int) -> list[list[int]]:
    """A random permutation of 0 .. length - 1, cut into blocks at random places."""
    positions = rng.permutation(length)
    cuts = np.flatnonzero(rng.random(length - 1) < 0.5) + 1
    return [[int(p) for p in part] for part in np.split(positions, cuts)]


def _stack(*orders: Order) -> Order:
    """One batch with the rows of all `orders`."""
    return jax.tree.map(lambda *fields: jnp.concatenate(fields), *orders)


def _sequences(vocab: int, length: int) -> np.ndarray:
    """Every sequence, int32 [vocab ** length, length]."""
    return np.asarray(list(itertools.product(range(vocab), repeat=length)), np.int32)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of the jaxprs inside it, each body once."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _equations(inner)


def _shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of every array that appears anywhere in a jaxpr."""
    return {
        tuple(variable.aval.shape)
        for equation in _equations(jaxpr)
        for variable in (*equation.invars, *equation.outvars)
        if hasattr(variable.aval, "shape")
    }


def _negative_elbo(params, config, sequences: np.ndarray) -> np.ndarray:
    """The exact negative ELBO of a denoiser for every sequence [M], float64 nats, by enumeration of all masks.

    A mask of k tokens weighs 1 / (k (N choose k)).
    """
    masks = np.asarray(list(itertools.product([False, True], repeat=sequences.shape[1]))[1:])
    valid = jnp.ones(masks.shape, bool)

    @jax.jit
    def nll(tokens_N: jax.Array) -> jax.Array:
        tokens = jnp.broadcast_to(tokens_N, masks.shape)
        weight = jnp.asarray(masks, jnp.float32)
        log_probs, _ = objective.task_log_probs(params, config, tokens, Corruption(jnp.asarray(masks), weight, valid))
        return -jnp.sum(weight * log_probs, axis=1)

    counts, length = masks.sum(axis=1), sequences.shape[1]
    weights = np.asarray([1 / (k * math.comb(length, k)) for k in counts.tolist()])
    return np.asarray([weights @ np.asarray(nll(tokens), np.float64) for tokens in jnp.asarray(sequences)])


@pytest.fixture(scope="session")
def toy() -> types.SimpleNamespace:
    """config, params, blocks, stack, sequences, equations, shapes, negative_elbo."""
    return types.SimpleNamespace(
        config=_config,
        params=_params,
        blocks=_blocks,
        stack=_stack,
        sequences=_sequences,
        equations=_equations,
        shapes=_shapes,
        negative_elbo=_negative_elbo,
    )

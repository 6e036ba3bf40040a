"""Sizes and the dtype that follow from a `ModelConfig`."""

from typing import assert_never

import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig

VOCAB_MULTIPLE = 128


def padded_vocab(config: ModelConfig) -> int:
    """Rows of embedding and head: the vocabulary size rounded up to a multiple of 128."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def mlp_width(config: ModelConfig) -> int:
    """F: the config's, or if that is 0, 4 D for gelu and 8/3 D rounded up to a multiple of 64 for swiglu."""
    if config.mlp_width:
        return config.mlp_width
    match config.mlp:
        case "gelu":
            return 4 * config.width
        case "swiglu":
            return -(-8 * config.width // 3 // 64) * 64
        case _:
            assert_never(config.mlp)


def embedding_scale(config: ModelConfig) -> float:
    """What looked-up embeddings are multiplied by."""
    match config.embedding_scale:
        case "sqrt_width":
            return config.width**0.5
        case "one":
            return 1.0
        case _:
            assert_never(config.embedding_scale)


def embedding_rms(config: ModelConfig) -> float:
    """The root mean square of the entries of token vectors at initialisation."""
    match config.embedding_scale:
        case "sqrt_width":
            return 1.0  # as large as what layers add to them
        case "one":
            return 0.02
        case _:
            assert_never(config.embedding_scale)


def prediction_offset(config: ModelConfig) -> int:
    """How many positions before its target a row that predicts stands."""
    match config.prediction_position:
        case "own":
            return 0
        case "previous":
            return 1
        case _:
            assert_never(config.prediction_position)


def mlp_matrices(config: ModelConfig) -> int:
    """How many D x F matrices an MLP has."""
    match config.mlp:
        case "gelu":
            return 2
        case "swiglu":
            return 3
        case _:
            assert_never(config.mlp)


def activation_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations. `auto` depends on the backend that runs."""
    match config.dtype:
        case "auto":
            return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        case "float32" | "bfloat16":
            return jnp.dtype(config.dtype)
        case _:
            assert_never(config.dtype)

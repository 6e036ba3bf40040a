"""Fixtures of the evaluation's tests: a little prepared text, and a model for it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.data import packing
from armd_jax.data_config import DataConfig
from armd_jax.inference.language_model import LanguageModel

LENGTH = 16


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory, corpus: pathlib.Path) -> packing.PreparedData:
    """The small corpus in bytes, in rows of 16."""
    config = DataConfig(path=str(corpus), tokenizer="bytes")
    return packing.prepare(config, LENGTH, tmp_path_factory.mktemp("data"), progress=False)


@pytest.fixture(scope="package")
def lm(data: packing.PreparedData) -> LanguageModel:
    """A model of the data's vocabulary with large random weights."""
    config = ModelConfig(vocab_size=data.tokenizer.vocab_size, max_length=LENGTH, num_layers=2, two_stream_layers=1)
    config = dataclasses.replace(config, width=16, num_heads=2, positional_width=8)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    return LanguageModel(config, params, data.tokenizer)

"""An autoregressive model that was trained here, as an ARMD."""

import jax
import numpy as np
import pytest

from armd_jax.config import Config, ModelConfig
from armd_jax.core import order
from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import continuing, readable
from armd_jax.order_config import OrderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
AUTOREGRESSIVE = dict(two_stream_layers=0, aggregator="shift")


def _export(folder, **fields):
    """An export of a model with large weights, so that likelihoods differ, and the model."""
    fields = dict(vocab_size=257, max_length=16, num_layers=3, width=24, num_heads=4) | fields
    config = ModelConfig(**fields)
    lm = LanguageModel.create(config)
    noise = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), lm.params)
    lm = LanguageModel(config, noise, BytesTokenizer())
    readable.write(readable.of(lm), Config(model=config, order=OrderConfig(kind="left_to_right")), folder)
    return lm


@pytest.mark.slow
@pytest.mark.parametrize("two_stream_layers", [0, 2, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"embedding_scale": "one", "tie_embeddings": False},
        {"learned_positions": 16, "prediction_position": "previous"},
        {"learned_positions": 20},
    ],
    ids=["RoPE", "untied", "learned positions", "learned positions, at the target"],
)
def test_likelihoods_stay(tmp_path, fields, two_stream_layers):
    """From left to right, whatever M, and wherever the rows of the autoregressive model stood."""
    before = _export(tmp_path / "ar", **AUTOREGRESSIVE, **fields)
    with continuing.open_model(tmp_path / "ar", two_stream_layers) as (opened, config):
        after = opened.load()
    assert config.model == after.config
    assert (after.config.two_stream_layers, after.config.aggregator) == (two_stream_layers, "neighbours")
    tokens_BN = np.random.default_rng(0).integers(0, 256, (2, 16))
    drawn = order.left_to_right(2, 16)
    np.testing.assert_allclose(after.log_prob(tokens_BN, drawn), before.log_prob(tokens_BN, drawn), atol=2e-5)


def test_other_models_are_refused(tmp_path):
    """What is an ARMD already, and layers that are not there."""
    _export(tmp_path / "armd", two_stream_layers=1)
    refused = pytest.raises(UserError, match="its model is not autoregressive .* set training.init_from=")
    with refused, continuing.open_model(tmp_path / "armd"):
        pass
    _export(tmp_path / "ar", **AUTOREGRESSIVE)
    refused = pytest.raises(UserError, match="--two-stream=4: must be in 0 .. 3")
    with refused, continuing.open_model(tmp_path / "ar", 4):
        pass


def test_what_is_a_run(tmp_path):
    """Not a folder of another program, and not a file."""
    _export(tmp_path / "ar", **AUTOREGRESSIVE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert continuing.is_run(tmp_path / "ar")
    assert not continuing.is_run(tmp_path / "other") and not continuing.is_run(tmp_path / "none")

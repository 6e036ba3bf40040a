"""Held-out figures: every token once, under the model's own probabilities, per token, word and byte."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import order
from armd_jax.config import DataConfig, ModelConfig, OrderConfig
from armd_jax.core import parameters
from armd_jax.data import loader, packing
from armd_jax.errors import UserError
from armd_jax.evaluation import perplexity
from armd_jax.inference.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTH = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory, corpus) -> packing.PreparedData:
    """The small corpus in bytes, in rows of 16."""
    config = DataConfig(path=str(corpus), tokenizer="bytes")
    return packing.prepare(config, LENGTH, tmp_path_factory.mktemp("data"), progress=False)


@pytest.fixture(scope="module")
def lm(data) -> LanguageModel:
    """A model of the data's vocabulary with large random weights."""
    config = ModelConfig(vocab_size=data.tokenizer.vocab_size, max_length=LENGTH, num_layers=2, two_stream_layers=1)
    config = dataclasses.replace(config, width=16, num_heads=2, positional_width=8)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    return LanguageModel(config, params, data.tokenizer)


def _rows(data: packing.PreparedData, split: str) -> np.ndarray:
    return np.stack([data.rows(split)[row] for row in range(data.num_rows(split))])


def _left_to_right(key, batch, length):
    return order.left_to_right(batch, length)


def test_total_is_the_sum_over_every_token_once(data, lm):
    """The left-to-right total sums the log-probabilities of all tokens, the partly filled last row included."""
    rows, counts = _rows(data, "test"), data.counts("test")
    assert counts.tokens % LENGTH  # there is a partly filled row
    log_prob = np.asarray(lm.log_prob(rows, order.left_to_right(*rows.shape)), np.float64).ravel()
    expected = -log_prob[: counts.tokens].sum()
    assert perplexity.total_nats(lm, data, "test", _left_to_right, batch_size=4) == pytest.approx(expected, rel=1e-5)


def test_total_does_not_depend_on_the_batch_size(data, lm):
    """Batches of 4 and of 7 rows give the same total within 1e-5."""
    totals = [perplexity.total_nats(lm, data, "test", _left_to_right, batch_size=size) for size in (4, 7)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_figures_of_a_total():
    """Per token, per word and per byte follow from the total in nats; a lossy tokenizer has no bits per byte."""
    counts = packing.Counts(documents=1, bytes=50, words=5, tokens=20, rows=2)
    figures = perplexity.figures(40.0, counts, lossless=True)
    assert figures["nats_per_token"] == 2.0
    assert figures["perplexity_per_token"] == pytest.approx(math.exp(2))
    assert figures["perplexity_per_word"] == pytest.approx(math.exp(8))
    assert figures["bits_per_byte"] == pytest.approx(40 / math.log(2) / 50)
    assert perplexity.figures(40.0, counts, lossless=False)["bits_per_byte"] is None
    assert perplexity.figures(1e6, counts, lossless=True)["perplexity_per_word"] == math.inf
    assert math.isnan(perplexity.figures(math.nan, counts, lossless=True)["perplexity_per_word"])


def test_unigram_against_a_hand_count(data):
    """The unigram model is the training split's token frequencies, one added to each."""
    ids = {name: _rows(data, name).ravel()[: data.counts(name).tokens].tolist() for name in ("train", "test")}
    seen, size = Counter(ids["train"]), data.tokenizer.vocab_size
    expected = -sum(math.log((seen[token] + 1) / (len(ids["train"]) + size)) for token in ids["test"])
    assert perplexity.unigram_nats(data, "test") == pytest.approx(expected, rel=1e-9)


def test_evaluate_reports_all_figures(data, lm):
    """All orders are scored with their counts, the compressor has a positive number, and the table shows every line."""
    elbo = OrderConfig(kind="masked_diffusion", diffusion_steps=4)
    result = perplexity.evaluate(lm, data, "test", streams=(2, 3), draws=2, elbo=elbo, batch_size=4, progress=False)
    assert result["tokens"] == data.counts("test").tokens and result["bytes"] == data.counts("test").bytes
    assert list(result["strided"]) == ["2"]  # 16 is not divisible by 3
    assert result["random_orders"]["draws"] == 2 and result["elbo"]["diffusion_steps"] == 4
    tokens, valid = (np.concatenate(parts) for parts in zip(*loader.eval_batches(data, "test", 4), strict=True))
    strided = order.padding_last(order.strided(*tokens.shape, 2), jnp.asarray(valid))
    expected = -np.asarray(lm.log_prob(tokens, strided))[valid].sum() / result["tokens"]
    assert result["strided"]["2"]["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    one_step = dataclasses.replace(elbo, diffusion_steps=1)  # all tokens of a row at once
    bound = perplexity.evaluate(lm, data, "test", streams=(), draws=0, elbo=one_step, progress=False)["elbo"]
    at_once = order.from_blocks([list(range(tokens.shape[1]))], len(tokens))
    expected = -np.asarray(lm.log_prob(tokens, order.padding_last(at_once, jnp.asarray(valid))))[valid].sum()
    assert bound["nats_per_token"] == pytest.approx(expected / result["tokens"], rel=1e-5)
    bits = [result[name]["bits_per_byte"] for name in ("left_to_right", "random_orders", "elbo")]
    assert all(0 < value < 40 for value in [*bits, result["strided"]["2"]["bits_per_byte"]])
    assert 0 < result["xz_bits_per_byte"] < result["unigram"]["bits_per_byte"]
    text = perplexity.table(result)
    for words in ("left to right", "random orders", "S = 2", "ELBO, T = 4", "unigram", "xz -9e"):
        assert words in text
    assert "n/a" not in text


def test_lossy_tokenizer_has_no_bits_per_byte(monkeypatch, data, lm):
    """Where the tokenizer changes the text there are no bits per byte and no compressor's number."""
    monkeypatch.setattr(type(data.tokenizer), "lossless", False)
    result = perplexity.evaluate(lm, data, "test", streams=(), draws=0, batch_size=4, progress=False)
    assert result["left_to_right"]["bits_per_byte"] is None and result["xz_bits_per_byte"] is None
    assert result["left_to_right"]["perplexity_per_token"] > 1
    text = perplexity.table(result)
    assert text.count("n/a (lossy)") == 2 and "xz" not in text


def test_another_vocabulary_is_a_user_error(data, lm):
    """A model made for another vocabulary than the data's is not scored."""
    other = dataclasses.replace(lm, config=dataclasses.replace(lm.config, vocab_size=lm.config.vocab_size - 1))
    with pytest.raises(UserError, match="another vocabulary"):
        perplexity.evaluate(other, data, "test", progress=False)


def test_rows_longer_than_the_model_are_a_user_error(data, lm):
    """RoPE would go on beyond the lengths that were trained, and say nothing."""
    shorter = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=LENGTH - 1))
    with pytest.raises(UserError, match=f"longer than the model's max_length={LENGTH - 1}"):
        perplexity.evaluate(shorter, data, "test", progress=False)


def test_training_text_has_no_number_of_the_compressor(data):
    """After itself nothing is left of it to compress."""
    assert perplexity.xz_bits_per_byte(data, "train") is None and perplexity.xz_bits_per_byte(data, "test") > 0

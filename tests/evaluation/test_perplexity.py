"""Held-out figures: every token once, under the model's own probabilities, per token, word and byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import order, typed
from armd_jax.core import documents
from armd_jax.data import loader, packing
from armd_jax.errors import UserError
from armd_jax.evaluation import baselines, perplexity, results, tables
from armd_jax.names import OrderKind
from armd_jax.order_config import OrderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _rows(data: packing.PreparedData, split: str) -> np.ndarray:
    return np.stack([data.rows(split)[row] for row in range(data.num_rows(split))])


@perplexity.under_order
def _left_to_right(key, batch, length):
    return order.left_to_right(batch, length)


@pytest.mark.slow
def test_total_is_the_sum_over_every_token_once(data, lm):
    """The left-to-right total sums the log-probabilities of all tokens, the partly filled last row included."""
    rows, counts = _rows(data, "test"), data.counts("test")
    assert counts.tokens % data.length  # there is a partly filled row
    log_prob = np.asarray(lm.log_prob(rows, order.left_to_right(*rows.shape)), np.float64).ravel()
    expected = -log_prob[: counts.tokens].sum()
    assert perplexity.total_nats(lm, data, "test", _left_to_right, batch_size=4) == pytest.approx(expected, rel=1e-5)


def test_total_does_not_depend_on_the_batch_size(data, lm):
    """Batches of 4 and of 7 rows give the same total within 1e-5."""
    totals = [perplexity.total_nats(lm, data, "test", _left_to_right, batch_size=size) for size in (4, 7)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_score_of_a_total():
    """Per token, per word and per byte follow from the total in nats; a lossy tokenizer has no bits per byte."""
    counts = packing.Counts(documents=1, bytes=50, words=5, tokens=20, rows=2)
    score = perplexity.score(40.0, counts, lossless=True)
    assert score.nats_per_token == 2.0
    assert score.perplexity_per_token == pytest.approx(math.exp(2))
    assert score.perplexity_per_word == pytest.approx(math.exp(8))
    assert score.bits_per_byte == pytest.approx(40 / math.log(2) / 50)
    assert perplexity.score(40.0, counts, lossless=False).bits_per_byte is None
    assert perplexity.score(1e6, counts, lossless=True).perplexity_per_word == math.inf
    assert math.isnan(perplexity.score(math.nan, counts, lossless=True).perplexity_per_word)


@pytest.mark.slow
def test_evaluate_reports_all_figures(data, lm):
    """Every field but `ema` has a value, scores are those of their orders, and the table has every row."""
    masked = OrderConfig(kind="masked_diffusion", diffusion_steps=4)
    found = perplexity.evaluate(
        lm,
        data,
        "test",
        (2, 3),
        draws=2,
        trained_on=masked,
        batch_size=4,
        seed=5,
        progress=False,
        num_orders=2,
        num_rows=3,
        with_price=True,
    )
    # Only the one who loads the weights knows which they are; tests/test_cli.py checks that the verb says it.
    assert [field.name for field in dataclasses.fields(found) if getattr(found, field.name) is None] == ["ema"]
    assert dataclasses.asdict(data.counts("test")).items() <= found.as_dict().items()
    assert (found.split, found.lossless, found.seed) == ("test", True, 5)
    assert list(found.strided) == ["2"]  # 16 is not divisible by 3
    assert found.random_orders.draws == 2 and found.elbo.diffusion_steps == 4
    tokens, valid = (np.concatenate(parts) for parts in zip(*loader.eval_batches(data, "test", 4), strict=True))
    strided = order.padding_last(order.strided(*tokens.shape, 2), jnp.asarray(valid))
    expected = -np.asarray(lm.log_prob(tokens, strided))[valid].sum() / found.tokens
    assert found.strided["2"].nats_per_token == pytest.approx(expected, rel=1e-5)
    one_step = dataclasses.replace(masked, diffusion_steps=1)  # all tokens of a row at once
    bound = perplexity.evaluate(lm, data, "test", (), draws=0, trained_on=one_step, progress=False).elbo
    at_once = order.from_blocks([list(range(tokens.shape[1]))], len(tokens))
    expected = -np.asarray(lm.log_prob(tokens, order.padding_last(at_once, jnp.asarray(valid))))[valid].sum()
    assert bound.nats_per_token == pytest.approx(expected / found.tokens, rel=1e-5)
    scores = [found.left_to_right, found.random_orders, found.elbo, found.strided["2"]]
    assert all(0 < score.bits_per_byte < 40 for score in scores)
    assert 0 < found.xz_bits_per_byte < found.unigram.bits_per_byte
    text = tables.as_text(found)
    for words in ("all orders, bounded by K of them (3 rows", "independence gap", "place in the stream"):
        assert words in text
    for words in ("left to right", "random orders", "S = 2", "ELBO, T = 4", "unigram", "xz -9e"):
        assert words in text
    assert "n/a" not in text


@pytest.mark.slow
def test_every_draw_has_a_seed_of_its_own(data, lm):
    """Expected figures are means over draws that differ: of random orders, and of the bound."""
    uniform = perplexity.under_order(order.uniform)
    totals = [perplexity.total_nats(lm, data, "test", uniform, 4, seed) for seed in (5, 6)]
    found = perplexity.evaluate(lm, data, "test", (), draws=2, batch_size=4, seed=5, progress=False)
    assert abs(totals[0] - totals[1]) > 1e-3
    assert found.random_orders.nats_per_token == pytest.approx(sum(totals) / 2 / found.tokens, rel=1e-6)
    masked = OrderConfig(kind="masked_diffusion", diffusion_steps=4)
    one, other, both = (
        perplexity.evaluate(lm, data, "test", (), draws, masked, batch_size=4, seed=seed, progress=False).elbo
        for draws, seed in ((1, 5), (1, 6), (2, 5))
    )
    nats = [one.nats_per_token, other.nats_per_token]
    assert nats[0] != nats[1] and both.nats_per_token == pytest.approx(sum(nats) / 2, rel=1e-6)
    assert both.standard_error == pytest.approx(abs(nats[0] - nats[1]) / 2, rel=1e-4)


@pytest.mark.slow
def test_bounds_are_those_of_the_chosen_rows(data, lm):
    """Evenly spaced rows in K orders of their own; K = 1 is the mean, and one shuffled token is left to right."""
    num_rows = data.counts("test").rows

    def bounds(**asked):
        return perplexity.evaluate(
            lm, data, "test", (), 4, batch_size=4, seed=5, progress=False, with_baselines=False, num_orders=4, **asked
        )

    whole = bounds(num_rows=10_000)
    found, random = whole.order_bounds, whole.random_orders
    assert (found.rows, found.tokens, found.shuffled) == (num_rows, whole.tokens, None)
    assert list(found.bounds) == ["1", "2", "4"]
    one, two, four = found.bounds.values()
    assert one.nll_at_most == pytest.approx(random.nats_per_token, rel=1e-6)
    assert one.nll_at_most_error == pytest.approx(random.standard_error, rel=1e-6)
    assert found.spread == pytest.approx(random.spread, rel=1e-6) and random.spread > 0
    assert four.nll_at_most < two.nll_at_most < one.nll_at_most
    few = bounds(num_rows=3, shuffled=1).order_bounds
    rows = _rows(data, "test")[[0, num_rows // 3, 2 * num_rows // 3]]
    expected = -np.asarray(lm.log_prob(rows, order.left_to_right(*rows.shape)), np.float64).mean()
    assert (few.rows, few.tokens, few.shuffled) == (3, rows.size, 1) and few.spread < 1e-3
    for bound in few.bounds.values():
        assert bound.nll_at_most == pytest.approx(expected, rel=1e-5)
    assert few.bounds["4"].nll_at_least is None  # of three rows
    with pytest.raises(UserError, match=r"--shuffled=\d+: a row of this text has"):
        bounds(shuffled=data.length + 1)


@pytest.mark.slow
def test_shuffled_tokens_are_valid_ones_of_one_document():
    """Padding takes no part in it, and neither do tokens of two documents, if these are kept apart."""
    tokens = jnp.asarray([[1, 2, 0, 3, 4, 0, 5, 6]] * 2)
    valid = jnp.asarray([[True] * 8, [True] * 3 + [False] * 5])
    drawn = [
        [np.asarray(make(jax.random.key(seed), tokens, valid).positions_BN) for seed in range(60)]
        for make in (perplexity._with_shuffled(2, None), perplexity._with_shuffled(8, 0))
    ]
    two, apart = (np.stack(found) for found in drawn)
    natural = np.arange(8)
    assert set((two[:, 0] != natural).sum(axis=1)) == {0, 2}
    moved = (two[:, 1] != natural).any(axis=1)
    assert (two[:, 1, 3:] == natural[3:]).all()
    assert 0.3 < moved.mean() < 0.7  # two of three tokens, in one of their two orders
    assert all(sorted(row[:3]) == [0, 1, 2] and sorted(row[3:6]) == [3, 4, 5] for row in apart[:, 0])
    assert (apart[:, 0] != natural).any()


@pytest.mark.slow
def test_documents_are_kept_apart_as_in_training(data, lm):
    """With `reset`, text is scored in orders that stay inside its documents, padding included."""
    rows, valid = _rows(data, "test"), data.counts("test").tokens
    assert (rows == data.tokenizer.end_of_text).any(axis=1).sum() > 1
    first = documents.begins(jnp.asarray(rows), data.tokenizer.end_of_text)

    def nats(made):
        kept = documents.keep_apart(made, first)
        return -np.asarray(lm.log_prob(rows, kept), np.float64).ravel()[:valid].sum() / valid

    found = perplexity.evaluate(lm, data, "test", (2,), draws=1, batch_size=4, progress=False, reset="document")
    plain = perplexity.evaluate(lm, data, "test", (2,), draws=1, batch_size=4, progress=False)
    for name, score, other, made in (
        ("left to right", found.left_to_right, plain.left_to_right, order.left_to_right(*rows.shape)),
        ("S = 2", found.strided["2"], plain.strided["2"], documents.strided(first, 2)),
    ):
        assert score.nats_per_token == pytest.approx(nats(made), rel=1e-5), name
        assert score.nats_per_token != pytest.approx(other.nats_per_token, rel=1e-4), name
    assert found.random_orders.nats_per_token != pytest.approx(plain.random_orders.nats_per_token, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", typed.choices(OrderKind))
def test_only_a_masked_diffusion_has_a_bound(data, lm, kind):
    """Orders without masking times give no ELBO, and what was not measured has no key in the file."""
    trained_on = OrderConfig(kind=kind, diffusion_steps=4)
    found = perplexity.evaluate(lm, data, "test", (), draws=0, trained_on=trained_on, progress=False)
    assert (found.elbo is not None) == ("elbo" in found.as_dict()) == (kind == "masked_diffusion")
    assert found.random_orders is None and "random_orders" not in found.as_dict()


def test_lossy_tokenizer_has_no_bits_per_byte(monkeypatch, data, lm):
    """If the tokenizer changes the text, there are no bits per byte and no compressor's number."""
    monkeypatch.setattr(type(data.tokenizer), "lossless", False)
    found = perplexity.evaluate(lm, data, "test", streams=(), draws=0, batch_size=4, progress=False)
    assert found.left_to_right.bits_per_byte is None and found.xz_bits_per_byte is None
    assert found.left_to_right.perplexity_per_token > 1
    text = tables.as_text(found)
    assert text.count("n/a (lossy)") == len(results.rows(found)) and "xz" not in text


def test_baselines_may_be_left_out(monkeypatch, data, lm):
    """Then no training row is read, and the table has neither of the two."""
    monkeypatch.setattr(baselines, "Baselines", lambda *_: pytest.fail("they were measured"))
    found = perplexity.evaluate(
        lm, data, "test", streams=(), draws=0, batch_size=4, progress=False, with_baselines=False
    )
    assert found.unigram is None and found.xz_bits_per_byte is None and found.left_to_right is not None
    text = tables.as_text(found)
    assert "left to right" in text and "unigram" not in text and "xz" not in text


def test_another_vocabulary_is_a_user_error(data, lm):
    """A model made for another vocabulary than the data's is not scored."""
    other = dataclasses.replace(lm, config=dataclasses.replace(lm.config, vocab_size=lm.config.vocab_size - 1))
    with pytest.raises(UserError, match="another vocabulary"):
        perplexity.evaluate(other, data, "test", progress=False)


def test_rows_longer_than_the_model_are_a_user_error(data, lm):
    """RoPE would go on beyond the lengths that were trained, and say nothing."""
    shorter = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=data.length - 1))
    with pytest.raises(UserError, match=f"longer than the model's max_length={data.length - 1}"):
        perplexity.evaluate(shorter, data, "test", progress=False)

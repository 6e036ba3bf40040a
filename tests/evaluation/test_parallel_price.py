"""What streams cost, taken apart: equal to direct computations, and without a remainder."""

import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import documents, order
from armd_jax.data import loader
from armd_jax.evaluation import perplexity
from armd_jax.evaluation.parallel_price import ByPlace

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def rows(data):
    """tokens [R, N] and valid of the whole test split; the last row is partly filled."""
    return tuple(np.concatenate(parts) for parts in zip(*loader.eval_batches(data, "test", 4), strict=True))


@pytest.fixture(scope="module")
def found(data, lm):
    """The evaluation with the price of 1, 2 and 4 streams."""
    return perplexity.evaluate(
        lm, data, "test", (2, 4), 0, batch_size=4, progress=False, with_baselines=False, with_price=True
    )


@pytest.mark.slow
def test_the_independence_gap_is_blocks_against_single_tokens(lm, rows, found):
    """It is the difference of two orders written out here, and exactly 0 for one stream."""
    tokens, valid = rows

    def nats(blocks):
        made = order.padding_last(order.from_blocks(blocks, len(tokens)), jnp.asarray(valid))
        return -np.asarray(lm.log_prob(tokens, made), np.float64)[valid].sum() / valid.sum()

    assert list(found.price) == ["1", "2", "4"]
    one, two, four = found.price.values()
    assert one.independence_gap == one.order_cost == 0 and one.order_cost_per_stream is None
    for streams, heads, groups in (
        ("2", [[0], [8]], [[depth, 8 + depth] for depth in range(1, 8)]),
        ("4", [[0], [4], [8], [12]], [[depth, 4 + depth, 8 + depth, 12 + depth] for depth in range(1, 4)]),
    ):
        price, with_blocks = found.price[streams], nats(heads + groups)
        single = nats(heads + [[position] for group in groups for position in group])
        assert price.independence_gap == pytest.approx(with_blocks - single, abs=1e-6) and price.independence_gap != 0
        assert price.order_cost == pytest.approx(single - found.left_to_right.nats_per_token, abs=1e-6)
        assert price.nats_per_token == found.strided[streams].nats_per_token
        whole = found.left_to_right.nats_per_token + price.order_cost + price.independence_gap
        assert whole == pytest.approx(price.nats_per_token, rel=1e-12)
        assert price.independence_gap_error > 0 and price.order_cost_error > 0


@pytest.mark.slow
def test_nats_by_place_are_those_of_the_tokens_there(lm, rows, found):
    """Place 3 of 4 streams is what stands third in each of them; all places together are the whole."""
    tokens, valid = rows
    made = order.padding_last(order.strided(*tokens.shape, 4), jnp.asarray(valid))
    nats = -np.asarray(lm.log_prob(tokens, made), np.float64)
    for price in found.price.values():
        total = sum(place.nats_per_token * place.tokens for place in price.places)
        assert sum(place.tokens for place in price.places) == found.tokens
        assert total / found.tokens == pytest.approx(price.nats_per_token, rel=1e-12)
    four = found.price["4"]
    assert [(place.first, place.last) for place in four.places] == [(i, i) for i in range(1, 5)]
    for place in four.places:
        there = valid & (np.arange(16) % 4 == place.first - 1)
        assert place.tokens == there.sum()
        assert place.nats_per_token == pytest.approx(nats[there].mean(), rel=1e-5)
    late, early = valid & (np.arange(16) % 4 >= 2), valid & (np.arange(16) % 4 < 2)
    if late.sum() > early.sum():  # the half of the tokens that are late begins behind the third place
        late, early = valid & (np.arange(16) % 4 >= 3), valid & (np.arange(16) % 4 < 3)
    assert four.late_nats_per_token == pytest.approx(nats[late].mean(), rel=1e-5)
    excess = (nats[early] - nats[late].mean()).sum() / four.places[0].tokens
    assert four.cold_start == pytest.approx(excess, rel=1e-4)


@pytest.mark.slow
def test_streams_of_documents_have_places_too(data, lm, rows):
    """With documents kept apart, each document has its own heads, and places are counted in its streams."""
    tokens, valid = rows
    found = perplexity.evaluate(
        lm, data, "test", (2,), 0, batch_size=4, progress=False, reset="document", with_baselines=False, with_price=True
    )
    one, two = found.price.values()
    first = np.asarray(documents.begins(jnp.asarray(tokens), data.tokenizer.end_of_text))
    assert one.places[0].tokens == (valid & (np.arange(16) == first)).sum() > len(tokens)
    assert one.places[0].tokens < two.places[0].tokens <= 2 * one.places[0].tokens
    for price in found.price.values():
        total = sum(place.nats_per_token * place.tokens for place in price.places)
        assert total / found.tokens == pytest.approx(price.nats_per_token, rel=1e-12)


def test_places_go_by_octaves():
    """Eight single places, then 9-16, 17-32 and so on; streams of one token have no late part."""
    by_place = ByPlace(40)
    by_place.add(np.arange(40)[None], np.arange(40.0)[None], np.ones((1, 40), bool))
    spans = [(place.first, place.last) for place in by_place.places()]
    assert spans == [*((i, i) for i in range(1, 9)), (9, 16), (17, 32), (33, 40)]
    assert by_place.places()[8].nats_per_token == pytest.approx(np.arange(8, 16).mean())
    late, cold = by_place.cold_start()
    assert late == pytest.approx(29.5) and cold == pytest.approx(-400)
    heads = ByPlace(4)
    heads.add(np.zeros((2, 2), int), np.ones((2, 2)), np.ones((2, 2), bool))
    assert heads.cold_start() == (None, None) and len(heads.places()) == 1

"""Documents that are kept apart: each is computed as if it were a row, and no bit of it depends on the others."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import block_mask, curriculum, documents, objective, order
from armd_jax.order_config import OrderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

END, LENGTH, VOCAB = 0, 16, 7
CUTS = (0, 5, 6, 11, 16)  # where documents begin, and the end of the row
SPANS = tuple(itertools.pairwise(CUTS))
MODES = [
    ("positional", "dense", {}),
    ("mean", "chunked", {"prediction_position": "previous"}),
    ("shift", "dense", {"learned_positions": LENGTH + 1, "two_stream_layers": 0}),
    ("neighbours", "chunked", {"neighbours": "both", "scan_layers": "on"}),
]


def _tokens(seed: int, batch: int) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(1, VOCAB, (batch, LENGTH))
    tokens[:, [end - 1 for end in CUTS[1:-1]]] = END
    return tokens.astype(np.int32)


def _orders(toy, first_BN: jax.Array) -> order.Order:
    """A batch of orders of many kinds that stay inside documents."""
    first_1N, key = first_BN[:1], jax.random.key(2)
    drawn = toy.stack(
        order.left_to_right(1, LENGTH),
        order.uniform(key, 2, LENGTH),
        order.progressive(key, 1, LENGTH, 10, first_BN=first_1N),
        order.contiguous(key, 1, LENGTH, 4),
        order.masked_diffusion(key, 1, LENGTH, 4),
        documents.strided(first_1N, 2),
        documents.strided(first_1N, 4),
    )
    return documents.keep_apart(drawn, first_BN)


def _within(begin: int, end: int) -> np.ndarray:
    index = np.arange(LENGTH)
    return (index >= begin) & (index < end)


def _alone(kept: order.Order, begin: int, end: int) -> order.Order:
    """The order of one document as that of rows which hold nothing else."""
    positions, blocks, weights = (a[:, begin:end] for a in (kept.positions_BN, kept.block_BN, kept.weight_BN))
    return order.Order(positions - begin, blocks - blocks[:, :1] + 1, weights)


@functools.partial(jax.jit, static_argnames="config")
def _scored(params, config, tokens_BN, kept):
    log_probs_BN, _ = objective.generation_log_probs(params, config, tokens_BN, kept)
    return objective.to_natural(kept, log_probs_BN)


@pytest.mark.slow
@pytest.mark.parametrize(("aggregator", "attention", "changes"), MODES)
def test_a_row_of_documents_is_as_many_rows(toy, aggregator, attention, changes):
    """Every document has the log-probabilities that it has alone, and other documents change no bit of them."""
    fields = {"num_layers": 3, "two_stream_layers": 2, "attention": attention, "attention_chunk": 4}
    config = toy.config(vocab_size=VOCAB, max_length=LENGTH, aggregator=aggregator, **(fields | changes))
    params, tokens, others = toy.params(config), _tokens(0, 8), _tokens(3, 8)
    kept = _orders(toy, documents.begins(jnp.asarray(tokens), END))
    together = np.asarray(_scored(params, config, tokens, kept))
    for size in {end - begin for begin, end in SPANS}:
        spans = [span for span in SPANS if span[1] - span[0] == size]
        rows = np.concatenate([tokens[:, slice(*span)] for span in spans])
        alone = _scored(params, config, rows, toy.stack(*(_alone(kept, *span) for span in spans)))
        expected = np.concatenate([together[:, slice(*span)] for span in spans])
        np.testing.assert_allclose(alone, expected, rtol=2e-4, atol=2e-4)
    for begin, end in SPANS:
        changed = np.asarray(_scored(params, config, np.where(_within(begin, end), tokens, others), kept))
        np.testing.assert_array_equal(changed[:, begin:end], together[:, begin:end])
        assert (changed != together)[:, ~_within(begin, end)].mean() > 0.5  # the others do have other probabilities


def test_documents_end_with_end_of_text():
    """The example of the module; one end-of-text behind another is a document of its own."""
    tokens = jnp.asarray([[1, 2, END, 3, 4, 5, END, 6], [END, END, 1, 2, 3, 4, 5, END]])
    first = documents.begins(tokens, END)
    assert first.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7], [0, 1, 2, 2, 2, 2, 2, 2]] and first.dtype == jnp.int32
    assert documents.ends(first).tolist() == [[3, 3, 3, 7, 7, 7, 7, 8], [1, 2, 8, 8, 8, 8, 8, 8]]


def test_orders_stay_inside_documents(toy):
    """All of a document comes before the next, tokens keep their sequence, and no block holds two documents."""
    first = documents.begins(jnp.asarray(_tokens(0, 8)), END)
    kept = _orders(toy, first)
    for row in range(8):
        positions, blocks = np.asarray(kept.positions_BN[row]), np.asarray(kept.block_BN[row])
        np.testing.assert_array_equal(kept.first_BN[row], first[row])
        for begin, end in SPANS:
            assert sorted(positions[begin:end]) == list(range(begin, end))
        assert all(blocks[cut - 1] < blocks[cut] for cut in CUTS[1:-1])
        assert blocks[0] == 1 and set(np.diff(blocks)) <= {0, 1}
    drawn = order.uniform(jax.random.key(5), 1, LENGTH)
    inside = documents.keep_apart(drawn, first[:1])
    expected = [int(p) for p in drawn.positions_BN[0] if p >= CUTS[3]]
    assert inside.positions_BN[0, CUTS[3] :].tolist() == expected


@pytest.mark.slow
def test_training_draws_orders_inside_documents():
    """Whatever a step draws, mixed kinds and the SBP phase included."""
    first = documents.begins(jnp.asarray(_tokens(0, 4)), END)
    mixed = OrderConfig(ar_steps=1, permute_steps=2, max_permuted=8, sbp_steps=2, streams=(2,))
    mixed = dataclasses.replace(mixed, mix=("masked_diffusion:0.3", "contiguous:0.3"))
    draw = jax.jit(lambda step: curriculum.draw(mixed, jax.random.key(step), step, 16, 4, LENGTH, first))
    drawn = [draw(step) for step in range(16)]
    blocks = [np.asarray(one.block_BN) for one in drawn]
    assert {tuple(one.max(axis=1)) for one in blocks} > {(LENGTH,) * 4}  # blocks of one token, and others
    for one, its_blocks in zip(drawn, blocks, strict=True):
        np.testing.assert_array_equal(one.first_BN, first)
        np.testing.assert_array_equal(np.take_along_axis(np.asarray(first), np.asarray(one.positions_BN), 1), first)
        assert all((its_blocks[:, cut - 1] < its_blocks[:, cut]).all() for cut in CUTS[1:-1])


@pytest.mark.slow
def test_streams_are_those_of_the_document():
    """A document of n tokens is strided as a row of n tokens is, in at most n streams."""
    first = documents.begins(jnp.asarray(_tokens(0, 1)), END)
    for streams in (1, 2, 5):
        kept = documents.keep_apart(documents.strided(first, streams), first)
        for begin, end in SPANS:
            index, block = order.in_streams(end - begin, streams)
            alone = _alone(kept, begin, end)
            assert alone.positions_BN[0, index].tolist() == list(range(end - begin))
            assert alone.block_BN[0, index].tolist() == block.tolist()


@pytest.mark.slow
def test_depths_are_places_in_the_streams_of_documents():
    """Heads have 0 in every stream of every document, and without documents streams are those of the row."""
    first = jnp.asarray([[begin for begin, end in SPANS for _ in range(begin, end)]])
    expected = [0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]
    np.testing.assert_array_equal(documents.depths(first, 2), [expected])
    np.testing.assert_array_equal(documents.depths(jnp.zeros((1, 16), jnp.int32), 4), [[*range(4)] * 4])
    made = documents.strided(first, 2)
    heads = np.asarray(made.positions_BN)[np.take_along_axis(np.asarray([expected]), made.positions_BN, 1) == 0]
    assert sorted(heads.tolist()) == [0, 3, 5, 6, 9, 11, 14]


def test_shuffled_tokens_keep_the_places_of_their_document():
    """Of a document, as many places are shuffled as tokens, and all other tokens stand in their natural place."""
    first = documents.begins(jnp.asarray(_tokens(0, 64)), END)
    drawn = order.progressive(jax.random.key(0), 64, LENGTH, 8, first_BN=first)
    positions = np.asarray(drawn.positions_BN)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(first), positions, axis=1), first)
    moved = (positions != np.arange(LENGTH)).mean(axis=0)
    assert moved[CUTS[1]] == 0 and 0.1 < moved[: CUTS[1]].mean() < 0.5 and 0.1 < moved[CUTS[2] :].mean() < 0.5


def test_what_is_visible_begins_with_the_document():
    """Masks of both streams are blocks of the documents, each with a start token, and none of them is empty."""
    tokens = jnp.asarray(_tokens(0, 1))
    first = documents.begins(tokens, END)
    mask = block_mask.build(documents.keep_apart(order.left_to_right(1, LENGTH), first))
    own = np.asarray(first[0])[:, None] == np.asarray(first[0])
    triangle = np.tril(np.ones((LENGTH, LENGTH), bool))
    for lens in (mask.strict_len_BN, mask.x_len_BN, mask.g_len_BN):
        np.testing.assert_array_equal(block_mask.dense(lens, LENGTH, first)[0], triangle & own)
    assert mask.previous_len_BN[0, jnp.asarray(CUTS[:-1])].tolist() == list(CUTS[:-1])

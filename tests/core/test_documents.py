"""Documents that are kept apart: a row of several is computed as if each of them were a row, to the last bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import block_mask, documents, objective, order

pytestmark = pytest.mark.usefixtures("quick_compilation")

END, LENGTH, VOCAB = 0, 16, 7
CUTS = (0, 5, 6, 16)  # documents of 5 tokens, of 1, and of the rest
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


def _alone(kept: order.Order, begin: int, end: int) -> order.Order:
    """The order of one document as that of rows which hold nothing else."""
    positions, blocks, weights = (a[:, begin:end] for a in (kept.positions_BN, kept.block_BN, kept.weight_BN))
    return order.Order(positions - begin, blocks - blocks[:, :1] + 1, weights)


@functools.partial(jax.jit, static_argnames="config")
def _scored(params, config, tokens_BN, kept, pull_BN):
    """Log-probabilities at natural positions, and the gradient of their sum weighted with `pull`."""

    def scores(params):
        log_probs_BN, _ = objective.generation_log_probs(params, config, tokens_BN, kept)
        return objective.to_natural(kept, log_probs_BN)

    log_probs_BN, back = jax.vjp(scores, params)
    return log_probs_BN, back(pull_BN)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("aggregator", "attention", "changes"), MODES)
def test_a_row_of_documents_is_as_many_rows(toy, aggregator, attention, changes):
    """Log-probabilities and gradients are those of rows with one document; other documents change no bit of them."""
    fields = {"num_layers": 3, "two_stream_layers": 2, "attention": attention, "attention_chunk": 5}
    config = toy.config(vocab_size=VOCAB, max_length=LENGTH, aggregator=aggregator, **(fields | changes))
    params = toy.params(config)
    tokens = _tokens(0, 8)
    pull = np.random.default_rng(1).standard_normal(tokens.shape).astype(np.float32)
    kept = _orders(toy, documents.begins(jnp.asarray(tokens), END))
    together, gradient = _scored(params, config, tokens, kept, pull)
    gradients = []
    for begin, end in zip(CUTS[:-1], CUTS[1:], strict=True):
        inside = slice(begin, end)
        alone, its_gradient = _scored(params, config, tokens[:, inside], _alone(kept, begin, end), pull[:, inside])
        np.testing.assert_allclose(together[:, inside], alone, rtol=2e-4, atol=2e-4)
        gradients.append(its_gradient)
        others = _tokens(3, 8)
        others[:, inside] = tokens[:, inside]
        changed, _ = _scored(params, config, others, kept, pull)
        np.testing.assert_array_equal(changed[:, inside], together[:, inside])
        outside = np.delete(np.asarray(changed != together), np.arange(begin, end), axis=1)
        assert outside.mean() > 0.5  # the others do have other probabilities now
    for whole, *parts in zip(jax.tree.leaves(gradient), *map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(whole, sum(parts), rtol=2e-3, atol=2e-3)


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
        for begin, end in zip(CUTS[:-1], CUTS[1:], strict=True):
            assert sorted(positions[begin:end]) == list(range(begin, end))
        assert all(blocks[cut - 1] < blocks[cut] for cut in CUTS[1:-1])
        assert blocks[0] == 1 and set(np.diff(blocks)) <= {0, 1}
    drawn = order.uniform(jax.random.key(5), 1, LENGTH)
    inside = documents.keep_apart(drawn, first[:1])
    expected = [int(p) for p in drawn.positions_BN[0] if p >= CUTS[2]]
    assert inside.positions_BN[0, CUTS[2] :].tolist() == expected


def test_streams_are_those_of_the_document():
    """A document of n tokens is strided as a row of n tokens is, in at most n streams."""
    first = documents.begins(jnp.asarray(_tokens(0, 1)), END)
    for streams in (1, 2, 5):
        kept = documents.keep_apart(documents.strided(first, streams), first)
        for begin, end in zip(CUTS[:-1], CUTS[1:], strict=True):
            index, block = order.in_streams(end - begin, streams)
            alone = _alone(kept, begin, end)
            assert alone.positions_BN[0, index].tolist() == list(range(end - begin))
            assert alone.block_BN[0, index].tolist() == block.tolist()


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
    one = dataclasses.replace(mask, first_BN=None)
    assert (np.asarray(mask.previous_len_BN)[0, list(CUTS[:-1])] == CUTS[:-1]).all() and one.x_len_BN is not None

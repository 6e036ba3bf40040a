"""The documents of a row of tokens, each of which keeps to itself (`data.reset`).

A row is cut from a stream of documents and may hold several, each of them followed by end-of-text. If they are kept
apart, the row is computed as if every document in it were a row of its own: documents lie one behind the other in
generation order too, each has a start token of its own, and its positions count from there. For `core.block_mask` a
document is where the visible part of the context begins.

    tokens      a b . c d e . f     natural position at which the document begins: 0 0 0 3 3 3 3 7
"""

from typing import assert_never

import jax
import jax.numpy as jnp

from armd_jax.config import Config
from armd_jax.core.order import Order, place_in_streams, stream_and_depth


def of(config: Config, tokens_BN: jax.Array) -> jax.Array | None:
    """Where the documents of rows begin (see `begins`) if the config keeps them apart, else None."""
    match config.data.reset:
        case "none":
            return None
        case "document":
            return begins(tokens_BN, config.data.end_of_text)
        case _:
            assert_never(config.data.reset)


def begins(tokens_BN: jax.Array, end_of_text: int) -> jax.Array:
    """int32 [B, N]: the natural position at which the document of each token begins.

    An end-of-text is the last token of its document. If the row begins with the rest of a document of another row, that
    rest is a document for itself, and begins at 0.
    """
    behind_end_BN = jnp.pad(tokens_BN[:, :-1] == end_of_text, ((0, 0), (1, 0)), constant_values=True)
    index_BN = jnp.broadcast_to(jnp.arange(tokens_BN.shape[1], dtype=jnp.int32), tokens_BN.shape)
    return jax.lax.cummax(jnp.where(behind_end_BN, index_BN, 0), axis=1)


def ends(first_BN: jax.Array) -> jax.Array:
    """int32 [B, N]: where the document of each index ends (the index behind its last), from where it begins."""
    length = first_BN.shape[1]
    last_BN = jnp.pad(first_BN[:, 1:] != first_BN[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    behind_BN = jnp.where(last_BN, jnp.arange(1, length + 1, dtype=jnp.int32), length)
    return jax.lax.cummin(behind_BN, axis=1, reverse=True)


def keep_apart(order: Order, first_BN: jax.Array) -> Order:
    """The order, carried out inside each document by itself: first all of the first document, then of the second.

    Within a document, tokens keep their sequence, and those of one block stay together.

    first_BN: see `begins`.
    """
    own_BN = jnp.take_along_axis(first_BN, order.positions_BN, axis=1)
    source_BN = jnp.argsort(own_BN, axis=1, stable=True)
    positions_BN, block_BN, weight_BN, own_BN = (
        jnp.take_along_axis(a_BN, source_BN, axis=1)
        for a_BN in (order.positions_BN, order.block_BN, order.weight_BN, own_BN)
    )
    differs = lambda a_BN: a_BN[:, 1:] != a_BN[:, :-1]  # noqa: E731
    starts_BN = jnp.pad(differs(block_BN) | differs(own_BN), ((0, 0), (1, 0)), constant_values=True)
    return Order(positions_BN, jnp.cumsum(starts_BN, axis=1).astype(jnp.int32), weight_BN, own_BN)


def strided(first_BN: jax.Array, streams: jax.Array | int) -> Order:
    """The strided order of every document by itself (`order.strided`), in S streams or as many as it has tokens.

    Its block ids increase and skip numbers; `keep_apart` mends that.

    first_BN: see `begins`.
    """
    batch, length = first_BN.shape
    index_BN, block_BN = place_in_streams(*_ranks(first_BN, streams))
    positions_BN = jnp.argsort(first_BN + index_BN, axis=1).astype(jnp.int32)
    # A document of n tokens has at most n blocks, numbered from 1, so that no two documents share a number.
    block_BN = jnp.take_along_axis(first_BN + block_BN, positions_BN, axis=1)
    return Order(positions_BN, block_BN, jnp.ones((batch, length), jnp.float32))


def depths(first_BN: jax.Array, streams: int) -> jax.Array:
    """int32 [B, N]: how many tokens of its stream come before each natural position in the order of `strided`.

    The heads of streams have 0. With one document per row these are the streams of `order.strided`.

    first_BN: see `begins`.
    """
    return stream_and_depth(*_ranks(first_BN, streams))[1].astype(jnp.int32)


def _ranks(first_BN: jax.Array, streams: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The place of each token in its document, the number of tokens there, and the number of its streams."""
    size_BN = ends(first_BN) - first_BN
    return jnp.arange(first_BN.shape[1], dtype=jnp.int32) - first_BN, size_BN, jnp.minimum(streams, size_BN)

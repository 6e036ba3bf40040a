"""The rows that one network call works on: a whole sequence in training, two blocks in decoding."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from armd_jax.core.block_mask import BlockMask
from armd_jax.core.order import Order

START = -1  # stands for the learned start token among token ids, and for a masked token in a denoiser
UNSEEN = -2  # stands for a token that no earlier block holds, likewise


@flax.struct.dataclass
class Rows:
    """What one network call works on: rows of stream X and rows of stream G, and how far each of them sees.

    Lengths count from the start of the context, even if a cache holds its first part. In training, X has N rows (the
    start token and the first N - 1 tokens) and G has N. In decoding, X has the block that was just sampled and G the
    next one.
    """

    x_tokens_BX: jax.Array  # int32, START for the start token
    x_positions_BX: jax.Array  # int32, 0 for the start token, j + 1 for natural position j
    x_len_BX: jax.Array  # int32, how many keys of X each row sees
    g_positions_BG: jax.Array  # int32, likewise
    g_strict_len_BG: jax.Array  # int32, how many keys of X each target sees
    g_previous_len_BG: jax.Array  # int32, context index at which the block before the target's begins
    g_len_BG: jax.Array  # int32, how many keys of G each target sees in the causal layers
    # int32, the tokens at the natural positions before and after each target: START before the first position, UNSEEN
    # if no earlier block holds them.
    g_left_BG: jax.Array
    g_right_BG: jax.Array
    # Context index of the first row of X, and generation index of the first row of G; one number, or int32 [B].
    x_start: jax.Array | int = 0
    g_start: jax.Array | int = 0
    x_valid_BX: jax.Array | None = None  # bool, False for padding rows, which enter no cache; None: all are valid
    g_valid_BG: jax.Array | None = None  # likewise
    # int32, context index of the start token, before which all is padding; None: 0. Keys of G begin at the same index.
    first_B: jax.Array | None = None
    # int32, the index of a key of G that each target sees besides the first `g_len`, which is its own; None: its own is
    # among those.
    g_own_BG: jax.Array | None = None
    # int32, the index at which the document of each row begins, in X (with its start token) and in G alike: a row sees
    # nothing before it. In training only, where both streams have N rows. None: all rows are of one document.
    document_BN: jax.Array | None = None


def rows_for_training(tokens_BN: jax.Array, order: Order, mask: BlockMask) -> Rows:
    """All rows of a sequence at once. tokens_BN: int32, at natural positions."""
    generated_BN = jnp.take_along_axis(tokens_BN, order.positions_BN, axis=1)
    positions_BN = order.positions_BN + 1
    index_BN = ranks(order) + 1
    start = jnp.full_like(generated_BN[:, :1], START)
    context_BT = jnp.concatenate([start, generated_BN], axis=1)
    rows = Rows(
        x_tokens_BX=context_BT[:, :-1],
        x_positions_BX=jnp.concatenate([jnp.zeros_like(start), positions_BN[:, :-1]], axis=1),
        x_len_BX=mask.x_len_BN,
        g_positions_BG=positions_BN,
        g_strict_len_BG=mask.strict_len_BN,
        g_previous_len_BG=mask.previous_len_BN,
        g_len_BG=mask.g_len_BN,
        g_left_BG=neighbours(context_BT, index_BN, order.positions_BN - 1, mask.strict_len_BN),
        g_right_BG=neighbours(context_BT, index_BN, order.positions_BN + 1, mask.strict_len_BN),
    )
    return rows if mask.first_BN is None else _by_document(rows, mask.first_BN)


def _by_document(rows: Rows, first_BN: jax.Array) -> Rows:
    """The rows of a sequence with documents that are kept apart: each with a start token and positions of its own.

    first_BN: int32, the index at which the document of each index begins, in natural and in generation order alike.
    """
    starts_BN = jnp.arange(first_BN.shape[1]) == first_BN
    # A document's start token stands in the place of the last token of the one before.
    return dataclasses.replace(
        rows,
        x_tokens_BX=jnp.where(starts_BN, START, rows.x_tokens_BX),
        x_positions_BX=jnp.where(starts_BN, 0, rows.x_positions_BX - first_BN),
        g_positions_BG=rows.g_positions_BG - first_BN,
        # What is to the right of a document comes later, so that no target sees it anyway.
        g_left_BG=jnp.where(rows.g_positions_BG - 1 == first_BN, START, rows.g_left_BG),
        document_BN=first_BN,
    )


def ranks(order: Order) -> jax.Array:
    """int32 [B, N]: the generation index of every natural position."""
    return jnp.argsort(order.positions_BN, axis=1).astype(jnp.int32)


def neighbours(
    context_BT: jax.Array, index_BN: jax.Array, positions_BG: jax.Array, strict_len_BG: jax.Array
) -> jax.Array:
    """int32 [B, G]: the tokens at natural positions beside targets, if targets may see them.

    context_BT: int32, the start token and then the tokens in generation order, as rows of X have them. Tokens that are
        not there yet may be anything.
    index_BN: int32, the context index of every natural position.
    positions_BG: int32, the natural position that is asked for, by target; it may lie outside the sequence.
    strict_len_BG: how many rows of X, the start token among them, each target sees.
    Returns START before the first position, and UNSEEN if the target sees no token at that position.
    """
    length = index_BN.shape[1]
    index_BG = jnp.take_along_axis(index_BN, jnp.clip(positions_BG, 0, length - 1), axis=1)
    tokens_BG = jnp.take_along_axis(context_BT, index_BG, axis=1, mode="clip")
    seen_BG = (positions_BG < length) & (index_BG < strict_len_BG)
    return jnp.where(positions_BG < 0, START, jnp.where(seen_BG, tokens_BG, UNSEEN))


def single_row() -> Rows:
    """One row of each stream, for shapes only."""
    one = jnp.ones((1, 1), jnp.int32)
    return Rows(one, one, one, one, one, one * 0, one, one, one)

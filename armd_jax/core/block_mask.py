"""The causal block-mask builder: order -> prefix lengths -> dense array or picture.

If tokens are arranged in generation order, blocks are contiguous. "May see every earlier block" and "may see every
block up to its own" then both mean a prefix of the context, so a block mask is two integers per token and never an
N x N array (paper section 3, the strictly causal and the causal relation).

The context begins with a learned start token at index 0, which has a block of its own and is visible to every token.
Context index i + 1 is generation index i. For a block at generation indices [a, e), strict_len = a + 1 and
causal_len = e + 1; both count the start token. An example with N = 8 and two streams:

    generation index   0 1 2 3 4 5 6 7        strict_len   1 2 3 3 5 5 7 7
    natural position   0 4 1 5 2 6 3 7        causal_len   2 3 5 5 7 7 9 9

If a row holds several documents that are kept apart (`core.documents`), a token sees no more than its own: the context
begins where the document does, at `first`. Every document has a start token there, in the place of the last token of
the one before, which nobody sees. So lengths still count from the start of the row, and all rules hold in each document
as if it were a row.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.core import documents
from armd_jax.core.order import Order


@flax.struct.dataclass
class BlockMask:
    """Prefix lengths [B, N] int32 over the context (start token included), in generation order.

    strict_len_BN: how many context tokens the target at each index may see, which are those of all earlier blocks.
    causal_len_BN: the same, including the target's own block.
    previous_len_BN: strict_len of the preceding block, which is where that block begins; for the first block, where the
        document begins, 0 in a row that is one.
    first_BN: where the document of each index begins, and with it what is seen; None: the row is one document.
    """

    strict_len_BN: jax.Array
    causal_len_BN: jax.Array
    previous_len_BN: jax.Array
    first_BN: jax.Array | None = None

    @property
    def x_len_BN(self) -> jax.Array:
        """How many of X's keys each of stream X's N rows (start token, then the first N - 1 tokens) sees."""
        if self.first_BN is not None:
            index_BN = jnp.broadcast_to(jnp.arange(self.first_BN.shape[1]), self.first_BN.shape)
            before_BN = jnp.pad(self.causal_len_BN[:, :-1], ((0, 0), (1, 0)))
            own_BN = jnp.minimum(before_BN, documents.ends(self.first_BN))
            return jnp.where(index_BN == self.first_BN, index_BN + 1, own_BN)
        length = self.causal_len_BN.shape[1]
        start_BN = jnp.ones_like(self.causal_len_BN[:, :1])
        return jnp.concatenate([start_BN, jnp.minimum(self.causal_len_BN[:, :-1], length)], axis=1)

    @property
    def g_len_BN(self) -> jax.Array:
        """How many of G's keys each of stream G's N rows sees in the causal layers. The start token has none."""
        return self.causal_len_BN - 1


def build(order: Order) -> BlockMask:
    """The block mask of an order, computed in O(N). Traceable.

    The sampler is the only other place that knows this rule: its calls know where their block begins and ends.
    """
    block_BN = order.block_BN
    length = block_BN.shape[1]
    index_BN = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), block_BN.shape)
    changes = block_BN[:, 1:] != block_BN[:, :-1]
    edge = jnp.ones_like(block_BN[:, :1], bool)
    starts_BN = jnp.concatenate([edge, changes], axis=1)
    ends_BN = jnp.concatenate([changes, edge], axis=1)
    first_BN = jax.lax.cummax(jnp.where(starts_BN, index_BN, 0), axis=1)  # a
    last_BN = jax.lax.cummin(jnp.where(ends_BN, index_BN, length), axis=1, reverse=True)  # e - 1
    # The token just before this block belongs to the preceding block, and its `first` is where that block begins.
    before_BN = jnp.take_along_axis(first_BN, jnp.maximum(first_BN - 1, 0), axis=1)
    document_BN = 0 if order.first_BN is None else order.first_BN
    return BlockMask(
        strict_len_BN=first_BN + 1,
        causal_len_BN=last_BN + 2,
        previous_len_BN=jnp.where(first_BN > document_BN, before_BN + 1, document_BN),
        first_BN=order.first_BN,
    )


def dense(len_BQ: jax.Array, num_keys: int, first_BQ: jax.Array | None = None) -> jax.Array:
    """bool [B, Q, K], True if the query sees the key. For tests and for pictures only."""
    seen_BQT = jnp.arange(num_keys) < len_BQ[..., None]
    return seen_BQT if first_BQ is None else seen_BQT & (jnp.arange(num_keys) >= first_BQ[..., None])


def picture(order: Order, strict: bool, row: int = 0) -> str:
    """The mask of one batch row as text: one line per target in generation order, one column per context token.

    `#` marks what a target sees; the first column is the start token.
    strict: draw the strictly causal relation (stream G) instead of the causal one.
    """
    mask = build(order)
    lens_BN = mask.strict_len_BN if strict else mask.causal_len_BN
    seen = np.asarray(dense(lens_BN, lens_BN.shape[1] + 1, mask.first_BN)[row])
    positions = np.asarray(order.positions_BN[row])
    return "\n".join(
        f"{position:>4} {''.join('#' if s else '.' for s in line)}"
        for position, line in zip(positions, seen, strict=True)
    )

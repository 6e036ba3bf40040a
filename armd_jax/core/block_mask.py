"""The causal block-mask builder: order -> prefix lengths -> dense array or picture.

Once tokens stand in generation order, blocks are contiguous, so "may see every earlier block" and "may see every block
up to its own" are both prefixes of the context: a block mask is two integers a token, never an N x N array
(paper section 3, the strictly causal and causal relations).

The context has a learned start token at index 0, in a block of its own that everything sees; context index i + 1 is
generation index i. For a block at generation indices [a, e): strict_len = a + 1, causal_len = e + 1, counting the start
token. N = 8 in two streams:

    generation index   0 1 2 3 4 5 6 7        strict_len   1 2 3 3 5 5 7 7
    natural position   0 4 1 5 2 6 3 7        causal_len   2 3 5 5 7 7 9 9
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.core.order import Order


@flax.struct.dataclass
class BlockMask:
    """Prefix lengths [B, N] int32 over the context (start token included), in generation order.

    strict_len_BN: how many context tokens the target at each index may see (all earlier blocks).
    causal_len_BN: the same with the target's own block.
    previous_len_BN: strict_len of the block before (0 for the first block): where the preceding block begins.
    """

    strict_len_BN: jax.Array
    causal_len_BN: jax.Array
    previous_len_BN: jax.Array

    @property
    def x_len_BN(self) -> jax.Array:
        """Key lengths of stream X's N rows (the start token, then the first N - 1 tokens) over X's keys."""
        length = self.causal_len_BN.shape[1]
        start_BN = jnp.ones_like(self.causal_len_BN[:, :1])
        return jnp.concatenate([start_BN, jnp.minimum(self.causal_len_BN[:, :-1], length)], axis=1)

    @property
    def g_len_BN(self) -> jax.Array:
        """Key lengths of stream G's N rows in the causal stack, over G's keys (no start row)."""
        return self.causal_len_BN - 1


def build(order: Order) -> BlockMask:
    """The block mask of an order. O(N), traceable.

    The rule's only other place is the sampler, whose later calls know where their block begins and ends.
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
    # The block before begins where the token just left of this block's first index has its own `first`.
    before_BN = jnp.take_along_axis(first_BN, jnp.maximum(first_BN - 1, 0), axis=1)
    return BlockMask(
        strict_len_BN=first_BN + 1,
        causal_len_BN=last_BN + 2,
        previous_len_BN=jnp.where(first_BN > 0, before_BN + 1, 0),
    )


def dense(len_BQ: jax.Array, num_keys: int) -> jax.Array:
    """bool [B, Q, K], True where the query sees the key. For tests and for pictures only."""
    return jnp.arange(num_keys) < len_BQ[..., None]


def picture(order: Order, strict: bool, row: int = 0) -> str:
    """The mask of one row as text: a line a target in generation order, a column a context token, `#` where seen.

    The first column is the start token. `strict` chooses the strictly causal relation (stream G), else the causal one.
    """
    mask = build(order)
    lens = np.asarray((mask.strict_len_BN if strict else mask.causal_len_BN)[row])
    seen = np.asarray(dense(jnp.asarray(lens)[None], len(lens) + 1)[0])
    positions = np.asarray(order.positions_BN[row])
    return "\n".join(
        f"{position:>4} {''.join('#' if s else '.' for s in line)}"
        for position, line in zip(positions, seen, strict=True)
    )

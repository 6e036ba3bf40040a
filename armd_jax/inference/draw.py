"""Drawing tokens from logits: temperature, truncation to the likeliest tokens, greedy choice."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.core.sizes import VOCAB_MULTIPLE
from armd_jax.errors import UserError

# Below this temperature logits / temperature leaves the range of float32, and only the likeliest token has any mass.
_GREEDY = 1e-30


@flax.struct.dataclass
class Draw:
    """How a token is chosen: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

    Exactly k tokens are kept, and the smallest nucleus, also if several tokens are equally likely.

    temperature: float32 scalar. top_p: float32 scalar below 1; None: no nucleus. greedy: take the likeliest token
    whatever the rest says. top_k: how many tokens are kept; None: all. Greedy and top-k are part of the compiled
    program, the other two are data.
    """

    temperature: jax.Array
    top_p: jax.Array | None
    greedy: bool = flax.struct.field(pytree_node=False)
    top_k: int | None = flax.struct.field(pytree_node=False)

    @classmethod
    def make(cls, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> "Draw":
        """From plain numbers; temperature 0 is greedy. Raises UserError if one of them is impossible."""
        if not 0 <= temperature < float("inf"):
            raise UserError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k={top_k}: must be at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p}: must be in (0, 1]")
        greedy = temperature < _GREEDY
        return cls(
            temperature=jax.device_put(np.float32(1.0 if greedy else temperature)),
            # A nucleus of everything, as float32 sees it, is none.
            top_p=None if top_p is None or np.float32(top_p) == 1 else jax.device_put(np.float32(top_p)),
            greedy=greedy,
            top_k=top_k,
        )

    def __call__(self, key: jax.Array, logits_BSV: jax.Array) -> jax.Array:
        """Tokens [B, S] int32 from float32 logits.

        key: one for all rows, or [B], one for each row, whose tokens then do not depend on the other rows.
        The Gumbel noise is the accurate one: plain float32 noise never reaches the tail and makes samples too cold.
        """
        if self.greedy:
            return jnp.argmax(logits_BSV, axis=-1).astype(jnp.int32)
        logits_BSV = logits_BSV / self.temperature
        if self.top_k is not None and self.top_k < logits_BSV.shape[-1]:
            kth_BS1 = jax.lax.top_k(logits_BSV, self.top_k)[0][..., -1:]
            logits_BSV = _likeliest(logits_BSV, kth_BS1, jnp.full_like(kth_BS1, self.top_k, jnp.int32))
        if self.top_p is not None:
            logits_BSV = _nucleus(logits_BSV, self.top_p)
        return _categorical(key, logits_BSV)


def _nucleus(logits_BSV: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits of the smallest set of likeliest tokens whose mass is at least `top_p`, and -inf for all others.

    A token is kept if those that are likelier have less mass than `top_p`: if it and those that are less likely have
    more than 1 - `top_p`. Masses are summed from the least likely token on, because the sum over all the likelier ones
    reaches 1 too early in float32, and the tail would be lost.
    """
    sorted_BSV = jnp.sort(logits_BSV, axis=-1)
    mass_BSV = jnp.cumsum(jax.nn.softmax(sorted_BSV, axis=-1), axis=-1)
    kept_BSV = (mass_BSV > 1 - top_p).at[..., -1].set(True)
    least_BS1 = jnp.min(jnp.where(kept_BSV, sorted_BSV, jnp.inf), axis=-1, keepdims=True)
    return _likeliest(logits_BSV, least_BS1, jnp.sum(kept_BSV, axis=-1, keepdims=True, dtype=jnp.int32))


def _likeliest(logits_BSV: jax.Array, least_BS1: jax.Array, count_BS1: jax.Array) -> jax.Array:
    """The `count` largest logits, of which `least` is the smallest, and -inf in place of all others.

    If several are equal to `least`, only as many of them are kept as `count` leaves room for, the first ones.
    """
    above_BSV, equal_BSV = logits_BSV > least_BS1, logits_BSV == least_BS1
    room_BS1 = count_BS1 - jnp.sum(above_BSV, axis=-1, keepdims=True, dtype=jnp.int32)
    kept_BSV = above_BSV | (equal_BSV & (jnp.cumsum(equal_BSV, axis=-1, dtype=jnp.int32) <= room_BS1))
    return jnp.where(kept_BSV, logits_BSV, -jnp.inf)


def _categorical(key: jax.Array, logits_BSV: jax.Array) -> jax.Array:
    """An exact draw in two steps: a group of 128 entries by its mass, and then an entry of the group.

    P(group) P(entry | group) is the softmax. V / 128 + 128 noise values per token take the place of V, which would cost
    as much as the network itself if that is small. A group without mass is -inf and never drawn.
    """
    vocab = logits_BSV.shape[-1]
    size = VOCAB_MULTIPLE if vocab % VOCAB_MULTIPLE == 0 else vocab
    groups = vocab // size
    logits_BSCW = logits_BSV.reshape(*logits_BSV.shape[:-1], groups, size)
    mass_BSC = jax.nn.logsumexp(logits_BSCW, axis=-1)
    # One draw of noise serves both steps: on CPU the generator costs by how often it runs.
    shape = (*logits_BSV.shape[:-1], groups + size)
    if key.ndim:
        noise = jax.vmap(lambda row_key: jax.random.gumbel(row_key, shape[1:], mode="high"))(key)
    else:
        noise = jax.random.gumbel(key, shape, mode="high")
    group_BS = jnp.argmax(mass_BSC + noise[..., :groups], axis=-1)
    inside_BSW = jnp.take_along_axis(logits_BSCW, group_BS[..., None, None], axis=2)[:, :, 0]
    entry_BS = jnp.argmax(inside_BSW + noise[..., groups:], axis=-1)
    return (group_BS * size + entry_BS).astype(jnp.int32)

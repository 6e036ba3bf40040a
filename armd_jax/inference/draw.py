"""Drawing tokens from logits: temperature, truncation to the likeliest tokens, greedy choice."""

import flax.struct
import jax
import jax.numpy as jnp

from armd_jax.core.sizes import VOCAB_MULTIPLE
from armd_jax.errors import UserError

# Below this temperature logits / temperature leaves the range of float32, and only the likeliest token has any mass.
_GREEDY = 1e-30


@flax.struct.dataclass
class Draw:
    """How a token is chosen: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

    temperature: float32 scalar. top_p: float32 scalar; None: no nucleus. greedy: take the likeliest token whatever the
    rest says. top_k: how many tokens are kept; None: all. Greedy and top-k are part of the compiled program, the other
    two are data.
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
            temperature=jnp.float32(1.0 if greedy else temperature),
            top_p=None if top_p is None else jnp.float32(top_p),
            greedy=greedy,
            top_k=top_k,
        )

    def __call__(self, key: jax.Array, logits_BSV: jax.Array) -> jax.Array:
        """Tokens [B, S] int32 from float32 logits.

        The Gumbel noise is the accurate one: plain float32 noise never reaches the tail and makes samples too cold.
        """
        if self.greedy:
            return jnp.argmax(logits_BSV, axis=-1).astype(jnp.int32)
        logits_BSV = logits_BSV / self.temperature
        if self.top_k is not None:
            kth = jax.lax.top_k(logits_BSV, min(self.top_k, logits_BSV.shape[-1]))[0][..., -1:]
            logits_BSV = jnp.where(logits_BSV >= kth, logits_BSV, -jnp.inf)
        if self.top_p is not None:
            sorted_BSV = jnp.sort(logits_BSV, axis=-1, descending=True)
            p_BSV = jax.nn.softmax(sorted_BSV, axis=-1)
            before_BSV = jnp.cumsum(p_BSV, axis=-1) - p_BSV  # mass of the likelier tokens; the first is always kept
            last = jnp.min(jnp.where(before_BSV < self.top_p, sorted_BSV, jnp.inf), axis=-1, keepdims=True)
            logits_BSV = jnp.where(logits_BSV >= last, logits_BSV, -jnp.inf)
        return _categorical(key, logits_BSV)


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
    noise = jax.random.gumbel(key, (*logits_BSV.shape[:-1], groups + size), mode="high")
    group_BS = jnp.argmax(mass_BSC + noise[..., :groups], axis=-1)
    inside_BSW = jnp.take_along_axis(logits_BSCW, group_BS[..., None, None], axis=2)[:, :, 0]
    entry_BS = jnp.argmax(inside_BSW + noise[..., groups:], axis=-1)
    return (group_BS * size + entry_BS).astype(jnp.int32)

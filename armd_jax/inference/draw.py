"""Drawing tokens from logits: temperature, truncation to the likeliest tokens, greedy choice."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.core.sizes import VOCAB_MULTIPLE
from armd_jax.errors import UserError

# Below this temperature logits / temperature leaves the range of float32, and only the likeliest token has any mass.
GREEDY = 1e-30


@flax.struct.dataclass
class Draw:
    """How a token is chosen: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

    Exactly k tokens are kept, and the smallest nucleus, also if several tokens are equally likely.

    temperature: float32, one number for all rows, or [B, 1, 1]. top_p: likewise, at most 1; None: no nucleus. greedy:
    take the likeliest token whatever the rest says. top_k: how many tokens are kept; None: all. Greedy and top-k are
    part of the compiled program, the other two are data.
    """

    temperature: jax.Array
    top_p: jax.Array | None
    greedy: bool = flax.struct.field(pytree_node=False)
    top_k: int | None = flax.struct.field(pytree_node=False)

    @classmethod
    def make(
        cls,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None = None,
        top_p: float | Sequence[float] | None = None,
    ) -> "Draw":
        """From plain numbers, one for all rows or one for each; temperature 0 is greedy, for all rows alike.

        Raises UserError if one of them is impossible.
        """
        temperatures, nuclei = np.atleast_1d(temperature), np.atleast_1d(1.0 if top_p is None else top_p)
        for each in temperatures.tolist():
            if not 0 <= each < float("inf"):
                raise UserError(f"temperature={each}: must be 0 (greedy) or a positive number")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k={top_k}: must be at least 1")
        for each in nuclei.tolist():
            if not 0 < each <= 1:
                raise UserError(f"top_p={each}: must be in (0, 1]")
        greedy = bool((temperatures < GREEDY).any())
        if greedy and (temperatures >= GREEDY).any():
            raise UserError("temperature: texts of one call are all greedy (0) or none of them is")

        def as_data(numbers: np.ndarray) -> jax.Array:
            numbers = numbers.astype(np.float32)
            return jax.device_put(numbers[0] if len(numbers) == 1 else numbers[:, None, None])

        return cls(
            temperature=as_data(np.ones_like(temperatures) if greedy else temperatures),
            # A nucleus of everything, as float32 sees it, is none.
            top_p=None if (nuclei.astype(np.float32) == 1).all() else as_data(nuclei),
            greedy=greedy,
            top_k=top_k,
        )

    def for_rows(self, rows: int) -> "Draw":
        """The same for more rows, if rows have numbers of their own; those that are added get the first."""

        def padded(numbers: jax.Array) -> jax.Array:
            if not numbers.ndim:
                return numbers
            return jax.device_put(np.concatenate([np.asarray(numbers), np.repeat(numbers[:1], rows - len(numbers), 0)]))

        return dataclasses.replace(
            self, temperature=padded(self.temperature), top_p=None if self.top_p is None else padded(self.top_p)
        )

    def __call__(self, key: jax.Array, logits_BSV: jax.Array) -> jax.Array:
        """Tokens [B, S] int32 from float32 logits.

        key: one for all rows, or [B], one for each row, whose tokens then do not depend on the other rows.
        """
        if self.greedy:
            return jnp.argmax(logits_BSV, axis=-1).astype(jnp.int32)
        # One draw of noise serves both of its steps: on CPU the generator costs by how often it runs.
        return categorical(noise(key, logits_BSV.shape[:-1], logits_BSV.shape[-1]), self._kept(logits_BSV))

    def law(self, logits_BSV: jax.Array) -> jax.Array:
        """The log-probabilities [B, S, V] with which a call draws tokens."""
        if self.greedy:
            likeliest_BS1 = jnp.argmax(logits_BSV, axis=-1, keepdims=True)
            return jnp.where(jnp.arange(logits_BSV.shape[-1]) == likeliest_BS1, 0.0, -jnp.inf)
        return jax.nn.log_softmax(self._kept(logits_BSV), axis=-1)

    def _kept(self, logits_BSV: jax.Array) -> jax.Array:
        """Logits at this temperature, -inf at tokens that are cut off."""
        logits_BSV = logits_BSV / self.temperature
        if self.top_k is not None and self.top_k < logits_BSV.shape[-1]:
            kth_BS1 = jax.lax.top_k(logits_BSV, self.top_k)[0][..., -1:]
            logits_BSV = _likeliest(logits_BSV, kth_BS1, jnp.full_like(kth_BS1, self.top_k, jnp.int32))
        if self.top_p is not None:
            logits_BSV = _nucleus(logits_BSV, self.top_p)
        return logits_BSV


def _nucleus(logits_BSV: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits of the smallest set of likeliest tokens whose mass is at least `top_p`, and -inf for all others.

    A token is kept if those that are likelier have less mass than `top_p`: if it and those that are less likely have
    more than 1 - `top_p`. Masses are summed from the least likely token on, because the sum over all the likelier ones
    reaches 1 too early in float32, and the tail would be lost.
    """
    sorted_BSV = jnp.sort(logits_BSV, axis=-1)
    mass_BSV = jnp.cumsum(jax.nn.softmax(sorted_BSV, axis=-1), axis=-1)
    # A nucleus of everything, which one row of several may have, keeps tokens whose mass rounds to 0 too.
    kept_BSV = ((mass_BSV > 1 - top_p) | (top_p >= 1)).at[..., -1].set(True)
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


def noise(key: jax.Array, shape: tuple[int, ...], vocab: int, more: int = 0) -> jax.Array:
    """Gumbel noise [B, ..., C + W + more] for a draw of `categorical` in each place of `shape` [B, ...].

    key: one for all rows, or [B], one for each row, whose noise then does not depend on the other rows. more: how many
    numbers there are beyond those that a draw uses. The noise is the accurate one: plain float32 noise never reaches
    the tail and makes samples too cold.
    """
    groups, size = _groups(vocab)
    if not key.ndim:
        return jax.random.gumbel(key, (*shape, groups + size + more), mode="high")
    each = (*shape[1:], groups + size + more)
    return jax.vmap(lambda row_key: jax.random.gumbel(row_key, each, mode="high"))(key)


def categorical(noise_BSN: jax.Array, logits_BSV: jax.Array) -> jax.Array:
    """Tokens [B, S] int32 drawn from the softmax of logits with the `noise` of each draw.

    An exact draw in two steps: a group of 128 entries by its mass, and then an entry of the group. P(group) P(entry |
    group) is the softmax. V / 128 + 128 noise values per token take the place of V, which would cost as much as the
    network itself if that is small. A group without mass is -inf and never drawn.
    """
    groups, size = _groups(logits_BSV.shape[-1])
    logits_BSCW = logits_BSV.reshape(*logits_BSV.shape[:-1], groups, size)
    group_BS = jnp.argmax(jax.nn.logsumexp(logits_BSCW, axis=-1) + noise_BSN[..., :groups], axis=-1)
    inside_BSW = jnp.take_along_axis(logits_BSCW, group_BS[..., None, None], axis=2)[:, :, 0]
    entry_BS = jnp.argmax(inside_BSW + noise_BSN[..., groups : groups + size], axis=-1)
    return (group_BS * size + entry_BS).astype(jnp.int32)


def _groups(vocab: int) -> tuple[int, int]:
    """Into how many groups `categorical` cuts a vocabulary, and how many entries each has."""
    size = VOCAB_MULTIPLE if vocab % VOCAB_MULTIPLE == 0 else vocab
    return vocab // size, size

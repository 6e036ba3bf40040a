"""How a network call is carried out, beside what it computes: on which devices, with which kernel, with which dropout.

One `Context` travels from the training step through objective and network to every layer. The mathematics knows no
mesh: what depends on one comes in through the two functions here.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from armd_jax.core.axes import Axes

LayerGroup = Literal["two_stream", "last_two_stream", "causal", "bidirectional"]


class Constrain(Protocol):
    """Tells an array how to lie on the mesh, by the logical names of its axes, and returns it otherwise unchanged."""

    def __call__(self, array: jax.Array, axes: Axes) -> jax.Array: ...


class Attend(Protocol):
    """An attention kernel that takes the place of `core.kernels.attention.attention`, with the same arrays."""

    def __call__(
        self, q_BQHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, len_BQ: jax.Array, group: LayerGroup
    ) -> jax.Array: ...


def no_constraint(array: jax.Array, axes: Axes) -> jax.Array:
    """The `Constrain` of a single device."""
    del axes
    return array


@dataclasses.dataclass(frozen=True)
class Context:
    """How a network call is carried out. The default is a single device, the config's own attention and no dropout.

    constrain: tells activations, and weights where they are used, how to lie on the mesh.
    float32_sums: whether the gradients of the layers' matrices are summed in float32 and not in the dtype of the
        activations.
    attend: the attention kernel; None: what the config says.
    dropout_key: the key that all dropout of the call is drawn from; None: no dropout.
    """

    constrain: Constrain = no_constraint
    attend: Attend | None = None
    dropout_key: jax.Array | None = None
    float32_sums: bool = False

    def fold_in(self, number: jax.Array | int) -> "Context":
        """The context of one part of the call: its dropout draws are its own."""
        if self.dropout_key is None:
            return self
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, number))

    def dropout(self, rate: float, array: jax.Array, place: int) -> jax.Array:
        """Dropout with the key folded with `place`. The draw depends on key and shape alone."""
        if self.dropout_key is None or rate == 0.0:
            return array
        keep = jax.random.bernoulli(jax.random.fold_in(self.dropout_key, place), 1.0 - rate, array.shape)
        return jnp.where(keep, array / (1.0 - rate), 0).astype(array.dtype)


PLAIN = Context()  # one device, no dropout

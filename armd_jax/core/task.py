"""What one step asks of the network: a generation order for an ARMD, a corruption for a denoiser.

`of` has one case per `names.ModelKind`. Training step, validation, evaluation and report ask it, and so need to know
nothing else about kinds of models.
"""

import dataclasses
from collections.abc import Callable
from typing import assert_never

import jax
import jax.numpy as jnp

from armd_jax.config import Config
from armd_jax.core import corruption, curriculum, documents
from armd_jax.core import order as orders
from armd_jax.core.curriculum import Phase
from armd_jax.core.objective import Task


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The tasks of a config.

    drawn: what is drawn at every step, in one word. describe: a few words for people. phases: of training.
    draw: (key, step, batch, length, first_BN) -> the task that is trained on at a step; the key already belongs to this
        step. first_BN: where documents begin, if they are kept apart (`core.documents.of`); None: they are not.
    num_kinds: how many kinds of steps there are, whose losses differ by nature.
    kind: (key, step) -> int32, the kind of the task that `draw` draws with this key.
    held_out: (key, valid_BN, first_BN) -> the task that held-out text is scored with during training.
    bounds: whether the expected loss of `held_out` only bounds the negative log-likelihood (negative ELBO). If not, it
        is the exact one, left to right.
    """

    drawn: str
    describe: str
    phases: tuple[Phase, ...]
    draw: Callable[[jax.Array, jax.Array, int, int, jax.Array | None], Task]
    num_kinds: int
    kind: Callable[[jax.Array, jax.Array], jax.Array]
    held_out: Callable[[jax.Array, jax.Array, jax.Array | None], Task]
    bounds: bool


def of(config: Config) -> Tasks:
    """The tasks of a config."""
    order, num_steps = config.order, config.training.num_steps
    match config.model.kind:
        case "armd":
            bounding = curriculum.bounding_order(order)

            def score(key: jax.Array, valid_BN: jax.Array, first_BN: jax.Array | None) -> Task:
                batch, length = valid_BN.shape
                made = orders.left_to_right(batch, length) if bounding is None else bounding(key, batch, length)
                made = orders.padding_last(made, valid_BN)
                return made if first_BN is None else documents.keep_apart(made, first_BN)

            return Tasks(
                drawn="orders",
                describe=f"orders: {curriculum.describe(order)}",
                phases=curriculum.phases(order, num_steps),
                draw=lambda key, step, *rows: curriculum.draw(order, key, step, num_steps, *rows),
                num_kinds=curriculum.num_kinds(order),
                kind=lambda key, step: curriculum.kind_of_step(order, key, step, num_steps),
                held_out=score,
                bounds=bounding is not None,
            )
        case "denoiser":
            return Tasks(
                drawn="masks",
                describe="masks: masked diffusion in continuous time",
                phases=(Phase("masked diffusion", 0, num_steps),),
                draw=lambda key, step, batch, length, _: corruption.by_time(key, jnp.ones((batch, length), bool)),
                num_kinds=1,
                kind=lambda key, step: jnp.int32(0),
                held_out=lambda key, valid_BN, _: corruption.by_count(key, valid_BN),
                bounds=True,
            )
        case _:
            assert_never(config.model.kind)

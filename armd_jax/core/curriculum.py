"""The curriculum: which kind of order training draws at which step (paper section on the curriculum).

Steps draw `order.kind`, in its phases and, at the end, in the SBP phase. `order.mix` gives a share of all steps to
other kinds: which kind a step draws follows from its key.

`_base` has one case per `names.OrderKind`. To add a kind of order, write its constructor in `core.order`, name it in
the group of `names.OrderKind` whose block structure it has, and give `_base` its case.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from armd_jax import typed
from armd_jax.core import documents
from armd_jax.core import order as orders
from armd_jax.core.order import Order
from armd_jax.names import StridedOrder
from armd_jax.order_config import OrderConfig, mixture

_MIX = 2  # folded into the key of a step, which is split in two for everything else


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps `first` .. `end` - 1 of training, in which orders are drawn in the same way."""

    name: str
    first: int
    end: int


DrawOrder = Callable[[jax.Array, int, int], Order]  # (key, batch, length) -> order


class _Keys(NamedTuple):
    """The keys of one step: of the order, and of the number of streams."""

    order: jax.Array
    streams: jax.Array


@dataclasses.dataclass(frozen=True)
class _Base:
    """How orders are drawn before the SBP phase.

    describe: a few words for people.
    draw: (keys, step, batch, length, first_BN) -> order; first_BN as in `draw`.
    phases: names with the step at which each ends; the last one has no end of its own.
    shuffled: step -> how many tokens are shuffled; None if the order is not the natural one with shuffled tokens.
    bounding: (key, batch, length) -> an order under which the expected loss bounds the likelihood that the model was
        trained for; None if that is the likelihood of the natural order, token by token, which is exact.
    """

    describe: str
    draw: Callable[[_Keys, jax.Array, int, int, jax.Array | None], Order]
    phases: tuple[tuple[str, int | None], ...]
    shuffled: Callable[[jax.Array | int], jax.Array] | None = None
    bounding: DrawOrder | None = None


def _base(config: OrderConfig) -> _Base:
    one_phase = ((config.kind.replace("_", " "), None),)
    match config.kind:
        case "left_to_right":
            return _Base(
                "left to right", lambda keys, step, batch, length, _: orders.left_to_right(batch, length), one_phase
            )
        case "progressive":
            return _Base(
                f"progressive, {config.max_permuted} tokens shuffled",
                lambda keys, step, batch, length, first_BN: orders.progressive(
                    keys.order, batch, length, num_permuted(config, step), config.permute, first_BN=first_BN
                ),
                (("identity", config.ar_steps), ("rising", config.permute_steps), ("constant", None)),
                lambda step: num_permuted(config, step),
            )
        case "uniform":
            return _Base(
                "uniform", lambda keys, step, batch, length, _: orders.uniform(keys.order, batch, length), one_phase
            )
        case "strided":
            return _Base(_streams(config), lambda keys, step, *rows: _strided(config, keys, *rows), one_phase)
        case "masked_diffusion":
            return _Base(
                f"diffusion blocks, {config.diffusion_steps} time steps",
                lambda keys, step, batch, length, _: orders.masked_diffusion(
                    keys.order, batch, length, config.diffusion_steps, config.noise_schedule, config.weight
                ),
                one_phase,
                bounding=lambda key, batch, length: orders.masked_diffusion(
                    key, batch, length, config.diffusion_steps, config.noise_schedule
                ),
            )
        case "contiguous":
            return _Base(
                f"contiguous blocks of up to {config.max_block} tokens",
                lambda keys, step, batch, length, _: orders.contiguous(keys.order, batch, length, config.max_block),
                one_phase,
            )
        case _:
            assert_never(config.kind)


def _streams(config: OrderConfig) -> str:
    numbers = ", ".join(map(str, config.streams))
    return f"strided, S = {numbers}" if len(config.streams) == 1 else f"strided, S from {numbers}"


def _strided(config: OrderConfig, keys: _Keys, batch: int, length: int, first_BN: jax.Array | None) -> Order:
    streams = _num_streams(config, keys)
    return orders.strided(batch, length, streams) if first_BN is None else documents.strided(first_BN, streams)


def _num_streams(config: OrderConfig, keys: _Keys) -> jax.Array:
    return jax.random.choice(keys.streams, jnp.asarray(config.streams, jnp.int32))


def _parts(config: OrderConfig) -> tuple[OrderConfig, ...]:
    """The kinds of orders that are mixed, each as a config without a mix: first the main kind, with its SBP phase."""
    mixed = [dataclasses.replace(config, kind=kind, sbp_steps=0, mix=()) for kind, _ in mixture(config)]
    return dataclasses.replace(config, mix=()), *mixed


def part_of_step(config: OrderConfig, key: jax.Array) -> jax.Array:
    """int32: 0 if a step draws `order.kind` (or its SBP phase), and i if it draws the i-th kind of `order.mix`.

    key: as for `draw`.
    """
    ends = jnp.cumsum(jnp.asarray([share for _, share in mixture(config)], jnp.float32))
    chosen = jnp.sum(jax.random.uniform(jax.random.fold_in(key, _MIX)) >= ends).astype(jnp.int32)
    return (chosen + 1) % (len(ends) + 1)  # past the last of the shares is the main kind


def describe(config: OrderConfig) -> str:
    """The kinds of orders in a few words."""
    main, *mixed = (_base(part).describe for part in _parts(config))
    shares = [
        f"{words} ({100 * share:.3g}% of steps)" for words, (_, share) in zip(mixed, mixture(config), strict=True)
    ]
    return f"{main}, mixed with {' and '.join(shares)}" if shares else main


def phases(config: OrderConfig, num_steps: int) -> tuple[Phase, ...]:
    """The phases of training that have steps, first to last. A run of strided orders has no SBP phase of its own.

    They are those of `order.kind`; the kinds of a mix are drawn in all of them.
    """
    sbp_begins = num_steps - (0 if config.kind in typed.choices(StridedOrder) else config.sbp_steps)
    found, first = [], 0
    for name, end in (*_base(config).phases, ("SBP", num_steps)):
        end = num_steps if name == "SBP" else min(sbp_begins if end is None else end, sbp_begins)
        if end > first:
            found.append(Phase(name, first, end))
            first = end
    return tuple(found)


def bounding_order(config: OrderConfig) -> DrawOrder | None:
    """(key, batch, length) -> an order whose expected loss bounds the likelihood that training aims at.

    None if what `order.kind` aims at is the likelihood of the natural order, which is exact. A mix changes nothing.
    """
    return _base(config).bounding


def num_permuted(config: OrderConfig, step: jax.Array | int) -> jax.Array:
    """k of the progressive curriculum at a step: 0 until i_AR, then rising linearly from 1 to rho at i_perm."""
    ramp = max(config.permute_steps - config.ar_steps, 1)
    done = jnp.clip((jnp.asarray(step) - config.ar_steps) / ramp, 0.0, 1.0)
    k = 1 + jnp.round(done * (config.max_permuted - 1)).astype(jnp.int32)
    return jnp.where(jnp.asarray(step) < config.ar_steps, 0, k)


def draw(
    config: OrderConfig,
    key: jax.Array,
    step: jax.Array,
    num_steps: int,
    batch: int,
    length: int,
    first_BN: jax.Array | None = None,
) -> Order:
    """The order that is trained on at `step` of `num_steps`, for a batch of rows of `length` tokens.

    A step that draws the main kind draws the same order that it would draw without a mix.

    key: already belongs to this step.
    first_BN: where the document of each token begins, if documents are kept apart: a kind that permutes or cuts the row
        does so with each of them, and every order stays inside them (see `core.documents`). None: they are not.
    """
    rows = batch, length, first_BN
    draws = [functools.partial(_draw_part, part, key, step, num_steps, rows) for part in _parts(config)]
    drawn = draws[0]() if len(draws) == 1 else jax.lax.switch(part_of_step(config, key), draws)
    return drawn if first_BN is None else documents.keep_apart(drawn, first_BN)


def _draw_part(
    config: OrderConfig, key: jax.Array, step: jax.Array, num_steps: int, rows: tuple[int, int, jax.Array | None]
) -> Order:
    keys = _Keys(*jax.random.split(key))
    base = functools.partial(_base(config).draw, keys, step, *rows)
    if not config.sbp_steps:
        return base()
    sbp_begins = num_steps - config.sbp_steps
    return jax.lax.cond(step >= sbp_begins, lambda: _strided(config, keys, *rows), base)


def num_kinds(config: OrderConfig) -> int:
    """How many kinds of steps there are, see `kind_of_step`. It does not depend on the number of steps."""
    return sum(map(_num_kinds_of_part, _parts(config)))


def _num_kinds_of_part(config: OrderConfig) -> int:
    strided = config.kind in typed.choices(StridedOrder)
    base = 0 if strided else len(_base(config).phases)
    return base + (len(config.streams) if strided or config.sbp_steps else 0)


def kind_of_step(config: OrderConfig, key: jax.Array, step: jax.Array, num_steps: int) -> jax.Array:
    """int32 below `num_kinds`: which of the mixed kinds of orders a step draws, its phase, and its number of streams.

    The phase is that of the kind itself, and strided orders have the number of streams in its place. Losses of one kind
    of step can be compared: with eight streams a loss is naturally higher than with one.

    key: as for `draw`.
    """
    kinds, first = [], 0
    for part in _parts(config):
        kinds.append(first + _kind_within_part(part, key, step, num_steps))
        first += _num_kinds_of_part(part)
    return kinds[0] if len(kinds) == 1 else jnp.stack(kinds)[part_of_step(config, key)]


def _kind_within_part(config: OrderConfig, key: jax.Array, step: jax.Array, num_steps: int) -> jax.Array:
    strided = config.kind in typed.choices(StridedOrder)
    phases: tuple[tuple[str, int | None], ...] = () if strided else _base(config).phases
    phase = sum((jnp.asarray(step) >= end for _, end in phases if end is not None), jnp.int32(0))
    if phases and not config.sbp_steps:
        return phase
    drawn = _num_streams(config, _Keys(*jax.random.split(key)))
    streams = len(phases) + jnp.argmax(jnp.asarray(config.streams, jnp.int32) == drawn).astype(jnp.int32)
    return jnp.where(step >= num_steps - config.sbp_steps, streams, phase) if phases else streams


def shuffled_tokens(config: OrderConfig, step: jax.Array | int) -> jax.Array | None:
    """How many tokens the orders of `order.kind` shuffle at a step, before the SBP phase.

    None if orders of this kind are not the natural one with some of its tokens shuffled.
    """
    shuffled = _base(config).shuffled
    return None if shuffled is None else shuffled(step)

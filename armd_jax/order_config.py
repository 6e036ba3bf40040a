"""The `order` section of a config: which generation orders training draws, and what can be told of them beforehand."""

import dataclasses
import math
from collections.abc import Iterator
from typing import cast

from armd_jax import names, typed
from armd_jax.errors import UserError, shown

_field = typed.field


@dataclasses.dataclass(frozen=True)
class OrderConfig:
    """The generation orders drawn during training (the paper's curriculum, and choices that it leaves open)."""

    kind: names.OrderKind = "progressive"
    permute: names.Permutation = "scatter"  # progressive: which tokens are shuffled
    ar_steps: int = _field(9_000, at_least=0)  # progressive: left to right until this step (i_AR)
    permute_steps: int = 48_000  # progressive: the number of shuffled tokens rises linearly until this step (i_perm) …
    max_permuted: int = _field(32, at_least=1)  # … to this number, and stays there (rho)
    streams: tuple[int, ...] = (1, 2, 4)  # strided: the number of streams S of each step is drawn from these
    sbp_steps: int = 0  # the last steps of training use strided orders (strided block-parallel fine-tuning)
    diffusion_steps: int = _field(64, at_least=1)  # masked_diffusion (diffusion blocks): T
    noise_schedule: names.NoiseSchedule = "linear"  # masked_diffusion
    weight: names.OrderWeight = "elbo"  # masked_diffusion: the weights gamma of the loss
    max_block: int = _field(4, at_least=1)  # contiguous: the sizes of blocks are drawn uniformly from 1 .. this number
    # Other kinds of orders, each with the share of all steps that draw it, such as ("contiguous:0.25", "uniform:0.1").
    # They are drawn throughout training, the SBP phase included; the steps that are left draw `kind`.
    mix: tuple[str, ...] = ()


def mixture(order: OrderConfig) -> tuple[tuple[names.OrderKind, float], ...]:
    """The kinds of orders that `order.mix` names, each with its share of the steps, in that sequence.

    Raises UserError if an entry is not a known kind and a share between 0 and 1, if a kind is named twice or is the
    main one, or if the shares leave no steps to the main kind.
    """
    found: dict[names.OrderKind, float] = {}
    for entry in order.mix:
        name, _, text = entry.partition(":")
        try:
            share = float(text)
        except ValueError as error:
            raise UserError(
                f"order.mix={shown(entry)}: expected a kind of order and its share of the steps, as in contiguous:0.25"
            ) from error
        name = name.strip()
        typed.check_choice(names.OrderKind, name, "order.mix")
        kind = cast(names.OrderKind, name)
        if not 0 < share < 1:
            raise UserError(f"order.mix={shown(entry)}: the share must be above 0 and below 1")
        if kind in found:
            raise UserError(f"order.mix={shown(entry)}: this kind is named twice")
        if kind == order.kind:
            raise UserError(f"order.mix={shown(entry)}: order.kind={kind!r} already has the steps that are left")
        found[kind] = share
    total = math.fsum(found.values())
    if total >= 1:
        raise UserError(f"order.mix: the shares add up to {total:g} and leave no steps to order.kind={order.kind!r}")
    return tuple(found.items())


def drawn_kinds(order: OrderConfig) -> tuple[names.OrderKind, ...]:
    """Every kind of order that steps before the SBP phase may draw, the main one first."""
    return order.kind, *(kind for kind, _ in mixture(order))


def block_patterns(order: OrderConfig) -> tuple[int, ...] | None:
    """The block structures of the orders drawn in training, as numbers of streams; 1 means one-token blocks.

    The position of each token may be drawn at random, but the blocks, and with them every mask, are those of a strided
    order with one of these numbers of streams. None if the blocks themselves are drawn, be it in a few of the steps.
    """
    kinds = drawn_kinds(order)
    if any(kind in typed.choices(names.DrawnBlocksOrder) for kind in kinds):
        return None
    one_token = {1} if any(kind in typed.choices(names.OneTokenOrder) for kind in kinds) else set()
    return tuple(sorted({*one_token, *_streams(order)}))


def _streams(order: OrderConfig) -> tuple[int, ...]:
    """The numbers of streams that training draws; empty if it never draws a strided order."""
    strided = any(kind in typed.choices(names.StridedOrder) for kind in drawn_kinds(order))
    return order.streams if strided or order.sbp_steps else ()


def check(order: OrderConfig, max_length: int, num_steps: int, attention: names.AttentionKind) -> None:
    """Raises UserError if a model could not be trained on these orders.

    max_length: tokens per row. num_steps: of the training. attention: as in the model's config.
    """
    if order.permute_steps < order.ar_steps:
        raise UserError(f"order.permute_steps={order.permute_steps}: must be at least {order.ar_steps}")
    if not 0 <= order.sbp_steps <= num_steps:
        raise UserError(f"order.sbp_steps={order.sbp_steps}: must be in [0, training.num_steps={num_steps}]")
    if not order.streams:
        raise UserError("order.streams=(): needs at least one number of streams")
    kinds = drawn_kinds(order)
    for kind, name, tokens in _longest(order):
        if kind in kinds and tokens > max_length:
            raise UserError(f"order.{name}={tokens}: cannot exceed model.max_length={max_length}")
    drawn = [kind for kind in kinds if kind in typed.choices(names.DrawnBlocksOrder)]
    if drawn and attention in typed.choices(names.TpuKernel):
        where = f"order.kind={drawn[0]!r}" if drawn[0] == order.kind else f"{drawn[0]!r} in order.mix"
        raise UserError(
            f"model.attention={attention!r}: the blocks of {where} are drawn at random,"
            " and this kernel has to know its mask beforehand; use auto or chunked"
        )
    for streams in _streams(order):
        if streams < 1:
            raise UserError(f"order.streams={streams}: must be at least 1")
        if max_length % streams:
            raise UserError(f"model.max_length={max_length} is not divisible by {streams} streams (order.streams)")


def _longest(order: OrderConfig) -> Iterator[tuple[names.OrderKind, str, int]]:
    """(kind of order, field, its value in tokens) of the fields that a row limits."""
    yield "progressive", "max_permuted", order.max_permuted
    yield "contiguous", "max_block", order.max_block

"""Generation orders: which token is predicted when, and together with which others.

For each row of a batch, an order lists the natural positions in the sequence in which they are generated, and the
block that each belongs to. The tokens of a block are predicted together, from all earlier blocks and nothing else
(paper section 3). In masked diffusion, a block is the set of tokens that share a masking time. All functions here are
pure and can be traced, so orders are drawn on the device, inside the jitted training step.

    tokens      t h e   c a t s        natural positions 0 .. 7
    strided, S = 2:   positions 0 4 1 5 2 6 3 7
                      block     1 2 3 3 4 4 5 5
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, assert_never

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax import typed
from armd_jax.errors import UserError
from armd_jax.names import NoiseSchedule, OrderWeight, Permutation


@flax.struct.dataclass
class Order:
    """A generation order for every row of a batch; all fields are [B, N], in generation order.

    positions_BN: int32, the natural position (0 .. N - 1) that is generated at each index; every row is a permutation.
    block_BN: int32, block ids, which start at 1 and never decrease or skip a number.
    weight_BN: float32, the loss weight gamma of each index. If all are 1, the loss is a likelihood or a bound on one.
    first_BN: int32, the index at which the document of each index begins, if documents are kept apart (see
        `core.documents`); None: the row is one document.
    """

    positions_BN: jax.Array
    block_BN: jax.Array
    weight_BN: jax.Array
    first_BN: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        batch, length = self.positions_BN.shape
        return batch, length


def left_to_right(batch: int, length: int, evidence: np.ndarray | None = None) -> Order:
    """The natural order, one token per block. evidence: see `evidence_first`."""
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return evidence_first(one_token_blocks(positions), evidence)


def uniform(key: jax.Array, batch: int, length: int, evidence: np.ndarray | None = None) -> Order:
    """A uniformly random permutation in every row, one token per block. evidence: see `evidence_first`."""
    positions = jnp.argsort(jax.random.uniform(key, (batch, length)), axis=1).astype(jnp.int32)
    return evidence_first(one_token_blocks(positions), evidence)


def progressive(
    key: jax.Array,
    batch: int,
    length: int,
    num_permuted: jax.Array | int,
    permute: Permutation = "scatter",
    evidence: np.ndarray | None = None,
    first_BN: jax.Array | None = None,
    among_BN: jax.Array | None = None,
) -> Order:
    """The natural order with `num_permuted` tokens shuffled (the paper's curriculum), one token per block.

    num_permuted: a whole number in 0 .. N, which may be traced.
    permute: which tokens are shuffled. "scatter" draws positions uniformly and permutes them among themselves, "window"
        permutes one contiguous window, and "reinsert" takes tokens out and puts them back at random places.
    evidence: see `evidence_first`.
    first_BN: int32, the natural position at which the document of each token begins. The chosen tokens of a document
        are then permuted among themselves alone; not with "reinsert", whose places lie anywhere. None: one document.
    among_BN: bool; with "scatter", the tokens that may be chosen, all of them if they are fewer. None: every token.
    """
    typed.check_choice(Permutation, permute, "permute")
    choose_key, shuffle_key, slot_key = jax.random.split(key, 3)
    natural = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    match permute:
        case "scatter":
            chosen = slots = _random_subset(choose_key, batch, length, num_permuted, among_BN)
        case "window":
            start = jax.random.uniform(choose_key, (batch, 1)) * (length - num_permuted + 1)
            start = jnp.minimum(start.astype(jnp.int32), length - num_permuted)
            chosen = slots = (natural >= start) & (natural < start + num_permuted)
        case "reinsert":
            chosen = _random_subset(choose_key, batch, length, num_permuted)
            slots = _random_subset(slot_key, batch, length, num_permuted)
        case _:
            assert_never(permute)
    # The chosen tokens in random order, then the others in natural order, fill the chosen slots, then the other slots.
    shuffled = jnp.where(chosen, jax.random.uniform(shuffle_key, (batch, length)), 2.0 + natural)
    tokens = jnp.argsort(shuffled, axis=1).astype(jnp.int32)
    if first_BN is not None:
        own = jnp.take_along_axis(jnp.where(chosen, first_BN, length), tokens, axis=1)
        tokens = jnp.take_along_axis(tokens, jnp.argsort(own, axis=1, stable=True), axis=1)
    places = jnp.argsort(jnp.where(slots, natural, length + natural), axis=1)
    positions = jnp.zeros((batch, length), jnp.int32).at[jnp.arange(batch)[:, None], places].set(tokens)
    return evidence_first(one_token_blocks(positions), evidence)


def strided(batch: int, length: int, streams: jax.Array | int, evidence: np.ndarray | None = None) -> Order:
    """Strided block-parallel order (paper section on SBP): S streams of neighbouring tokens, generated side by side.

    The S stream heads come first, one by one. Then position 2 of every stream is one block, then position 3, and so on.
    Evidence precedes all of them, one token per block and in natural order; the R free positions are then cut into
    streams whose lengths differ by at most one, longer ones first.

    streams: S. If it is traced, the caller has to ensure that 1 <= S <= R and that S divides N.
    evidence: see `evidence_first`.
    Raises UserError if S does not divide N (without evidence) or exceeds R.
    """
    evidence = _evidence_mask(evidence, length)
    num_free = length - int(evidence.sum())
    if not isinstance(streams, jax.core.Tracer):
        check_streams(length, int(streams), num_free)
    index, block = in_streams(num_free, streams)
    free = np.flatnonzero(~evidence)
    num_evidence = length - num_free
    positions = jnp.zeros((length,), jnp.int32).at[num_evidence + index].set(jnp.asarray(free, jnp.int32))
    positions = positions.at[:num_evidence].set(jnp.asarray(np.flatnonzero(evidence), jnp.int32))
    blocks = jnp.arange(1, length + 1, dtype=jnp.int32)
    blocks = blocks.at[num_evidence + index].set((num_evidence + block).astype(jnp.int32))
    return Order(
        positions_BN=jnp.broadcast_to(positions, (batch, length)),
        block_BN=jnp.broadcast_to(blocks, (batch, length)),
        weight_BN=jnp.ones((batch, length), jnp.float32),
    )


def contiguous(key: jax.Array, batch: int, length: int, max_block: int, evidence: np.ndarray | None = None) -> Order:
    """The natural order, cut into blocks of neighbouring tokens; every row has blocks of its own.

    The sizes of blocks are drawn independently and uniformly from 1 .. `max_block`; the end of the row cuts the last.
    A model that is trained on it can predict several tokens in a row at once.

    max_block: the largest size, at least 1.
    evidence: see `evidence_first`; blocks from which it takes tokens are smaller.
    Raises UserError if max_block is below 1.
    """
    if max_block < 1:
        raise UserError(f"max_block={max_block}: must be at least 1")
    # No block needs to be longer than the row, and sums of such sizes do not overflow.
    sizes_BN = jnp.minimum(jax.random.randint(key, (batch, length), 1, max_block + 1), length)
    ends_BN = jnp.cumsum(sizes_BN, axis=1)  # of the blocks; those past the end of the row begin nothing
    positions_BN = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    starts_BN = jnp.zeros((batch, length), jnp.int32).at[jnp.arange(batch)[:, None], ends_BN].set(1, mode="drop")
    block_BN = 1 + jnp.cumsum(starts_BN, axis=1)
    return evidence_first(Order(positions_BN, block_BN, jnp.ones((batch, length), jnp.float32)), evidence)


def in_streams(num_free: int, streams: Any) -> tuple[Any, Any]:
    """Where each of R = `num_free` positions comes in S streams: the generation index (from 0) and the block (from 1).

    Both are int [R]: NumPy arrays, or JAX's if S is traced. A plain number above R is taken as R.
    """
    xp = jnp if isinstance(streams, jax.core.Tracer) else np
    rank = xp.arange(num_free)
    if not num_free:
        return rank, rank
    if xp is np:
        streams = min(int(streams), num_free)
    return place_in_streams(rank, num_free, streams, xp)


def place_in_streams(rank: Any, num_free: Any, streams: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """`in_streams` for the positions of these ranks, of which there are `num_free` in at most as many streams.

    All are whole numbers, or arrays of them. xp: the module of NumPy or of JAX's arrays that computes.
    """
    stream, depth = stream_and_depth(rank, num_free, streams, xp)
    # The index has no gaps: longer streams come first, so that only the last group is smaller.
    return depth * streams + stream, xp.where(depth == 0, stream + 1, streams + depth)


def stream_and_depth(rank: Any, num_free: Any, streams: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Which stream each position belongs to, and how many positions of its stream come before it; both from 0.

    The arguments are those of `place_in_streams`.
    """
    short, longer = num_free // streams, num_free % streams
    in_longer = rank < longer * (short + 1)
    # Both branches of the selects are evaluated, so the unused one must not divide by zero either.
    past = rank - longer * (short + 1)
    stream = xp.where(in_longer, rank // (short + 1), longer + past // xp.maximum(short, 1))
    depth = xp.where(in_longer, rank % (short + 1), past % xp.maximum(short, 1))
    return stream, depth


def one_by_one(order: Order) -> Order:
    """The same sequence of tokens with every block cut into single tokens: its likelihood is exact."""
    return dataclasses.replace(order, block_BN=one_token_blocks(order.positions_BN).block_BN)


def check_streams(length: int, streams: int, num_free: int) -> None:
    """Raises UserError if `num_free` of `length` positions cannot be generated in this many streams."""
    if streams < 1:
        raise UserError(f"streams={streams}: must be at least 1")
    if num_free == length and length % streams:
        raise UserError(f"length={length} is not divisible by streams={streams}: choose another of the two")
    if 0 < num_free < streams:
        raise UserError(f"streams={streams} exceeds the {num_free} positions left to generate: use fewer streams")


def masked_diffusion(
    key: jax.Array,
    batch: int,
    length: int,
    num_steps: int,
    schedule: NoiseSchedule = "linear",
    weight: OrderWeight = "elbo",
    evidence: np.ndarray | None = None,
) -> Order:
    """The order of masking times that are drawn independently with P(tau = t) = alpha_{t-1} - alpha_t.

    Tokens that are masked last come first.

    weight: with "elbo", the summed loss over this order has a bound on the negative log-likelihood as its mean, in
        nats: the negative ELBO of a diffusion with `num_steps` steps whose reverse process remembers in which steps its
        tokens were filled in (see `core.objective`; only with one layer is that the usual masked diffusion). The
        familiar 1/t weight is already contained in the draw of the times. "simple" gives the masked cross-entropy of
        every time step the same weight. It is for training and is never a likelihood.
    evidence: see `evidence_first`.
    """
    alpha = alphas(num_steps, schedule)
    uniform_BN = jax.random.uniform(key, (batch, length))
    # tau = t if alpha_t <= u < alpha_{t-1}; alpha falls from 1 at t = 0 to 0 at t = T.
    tau_BN = 1 + jnp.searchsorted(-alpha[1:-1].astype(np.float32), -uniform_BN, side="left")
    return from_times(tau_BN.astype(jnp.int32), num_steps, schedule, weight, evidence)


def alphas(num_steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """alpha_0 = 1 .. alpha_T = 0 [T + 1]: the probability that a token is not masked yet after each diffusion step."""
    typed.check_choice(NoiseSchedule, schedule, "noise_schedule")
    t = np.arange(num_steps + 1) / num_steps
    match schedule:
        case "linear":
            return 1.0 - t
        case "cosine":
            alpha = 1.0 - np.cos(np.pi / 2 * (1.0 - t))
            alpha[0] = 1.0
            return alpha
        case "geometric":
            # Geometric noise between 1e-3 and 20, the shape that SEDD and MDLM call so, stretched so that alpha_0 = 1
            # and alpha_T = 0.
            alpha = np.exp(-(1e-3 ** (1.0 - t)) * 20.0**t)
            return (alpha - alpha[-1]) / (alpha[0] - alpha[-1])
        case _:
            assert_never(schedule)


def from_times(
    tau_BN: jax.Array,
    num_steps: int,
    schedule: NoiseSchedule = "linear",
    weight: OrderWeight = "elbo",
    evidence: np.ndarray | None = None,
) -> Order:
    """The order of masking times tau_BN (int, 1 .. T, at natural positions). Tokens of the same time are one block."""
    typed.check_choice(OrderWeight, weight, "weight")
    positions_BN = jnp.argsort(-tau_BN, axis=1, stable=True).astype(jnp.int32)
    times_BN = jnp.take_along_axis(tau_BN, positions_BN, axis=1)
    starts = jnp.concatenate([jnp.ones_like(times_BN[:, :1]), times_BN[:, 1:] != times_BN[:, :-1]], axis=1)
    match weight:
        case "elbo":
            weight_BN = jnp.ones(tau_BN.shape, jnp.float32)
        case "simple":
            # The ELBO weighs step t by (alpha_{t-1} - alpha_t) / (1 - alpha_t). This divides that out, step by step.
            alpha = alphas(num_steps, schedule)
            drop = alpha[:-1] - alpha[1:]
            gamma = (1.0 - alpha[1:]) / np.maximum(drop, 1e-12) / num_steps
            weight_BN = jnp.asarray(gamma, jnp.float32)[times_BN - 1]
        case _:
            assert_never(weight)
    order = Order(positions_BN, jnp.cumsum(starts, axis=1).astype(jnp.int32), weight_BN)
    return evidence_first(order, evidence)


def from_blocks(blocks: Sequence[Sequence[int]], batch: int = 1) -> Order:
    """The order that generates these blocks one after another, the same in every row.

    blocks: lists of natural positions, which together are 0 .. N - 1.
    Raises UserError if a block is empty or the positions are not a permutation.
    """
    try:
        positions = [position for block in blocks for position in block]
    except TypeError as error:
        raise UserError(f"from_blocks: expected lists of positions, such as [[2, 0], [1, 3]] ({error})") from error
    if wrong := [position for position in positions if not isinstance(position, int | np.integer)]:
        raise UserError(f"from_blocks: expected lists of positions, such as [[2, 0], [1, 3]], got {wrong[0]!r} in one")
    length = len(positions)
    if not length or any(not len(block) for block in blocks):
        raise UserError("from_blocks: every block needs at least one position")
    if sorted(positions) != list(range(length)):
        raise UserError(f"from_blocks: the blocks must hold each of the positions 0 .. {length - 1} once")
    ids = [number for number, block in enumerate(blocks, start=1) for _ in block]
    return Order(
        positions_BN=jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (batch, length)),
        block_BN=jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (batch, length)),
        weight_BN=jnp.ones((batch, length), jnp.float32),
    )


def one_token_blocks(positions_BN: jax.Array) -> Order:
    """The order of a permutation positions_BN (int32) in which every token is a block of its own."""
    batch, length = positions_BN.shape
    blocks = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (batch, length))
    return Order(positions_BN, blocks, jnp.ones((batch, length), jnp.float32))


def evidence_first(order: Order, evidence: np.ndarray | None) -> Order:
    """Moves known positions to the front, in natural order and one token per block.

    The other positions keep their order and their blocks.

    evidence: bool [N], True at natural positions whose tokens are known (a prompt, or tokens around a gap); None: none.
    """
    if evidence is None:
        return order
    mask = jnp.asarray(_evidence_mask(evidence, order.shape[1]))
    known_BN = mask[order.positions_BN]
    return _regroup(order, jnp.where(known_BN, 0, 1), known_BN, jnp.where(known_BN, order.positions_BN, 0))


def padding_last(order: Order, valid_BN: jax.Array) -> Order:
    """Moves padding behind everything else and gives it weight 0. valid_BN: bool at natural positions."""
    padding_BN = ~jnp.take_along_axis(valid_BN, order.positions_BN, axis=1)
    moved = _regroup(order, padding_BN.astype(jnp.int32), padding_BN, jnp.zeros_like(order.positions_BN))
    valid_sorted_BN = jnp.take_along_axis(valid_BN, moved.positions_BN, axis=1)
    return dataclasses.replace(moved, weight_BN=jnp.where(valid_sorted_BN, moved.weight_BN, 0.0))


def _regroup(order: Order, group_BN: jax.Array, single_BN: jax.Array, within_BN: jax.Array) -> Order:
    """Sorts stably by (group, within). Indices marked `single` get blocks of their own; the others keep theirs."""
    if order.first_BN is not None:
        raise UserError("documents are kept apart already; put evidence first and padding last before that")
    length = order.shape[1]
    index = jnp.arange(length)
    source_BN = jnp.argsort(group_BN * length + within_BN, axis=1, stable=True)
    take = lambda a: jnp.take_along_axis(a, source_BN, axis=1)  # noqa: E731
    label_BN = take(jnp.where(single_BN, length + 1 + index, order.block_BN))
    starts_BN = jnp.concatenate([jnp.ones_like(label_BN[:, :1]), label_BN[:, 1:] != label_BN[:, :-1]], axis=1)
    return Order(take(order.positions_BN), jnp.cumsum(starts_BN, axis=1).astype(jnp.int32), take(order.weight_BN))


def _random_subset(
    key: jax.Array, batch: int, length: int, size: jax.Array | int, among_BN: jax.Array | None = None
) -> jax.Array:
    """bool [B, N] with `size` True in every row, uniformly; only at places of `among_BN`, if it is given."""
    drawn = jax.random.uniform(key, (batch, length))
    if among_BN is None:
        return jnp.argsort(jnp.argsort(drawn, axis=1), axis=1) < size
    return (jnp.argsort(jnp.argsort(jnp.where(among_BN, drawn, 2.0), axis=1), axis=1) < size) & among_BN


def _evidence_mask(evidence: np.ndarray | None, length: int) -> np.ndarray:
    if evidence is None:
        return np.zeros(length, bool)
    mask = np.asarray(evidence)
    if mask.shape != (length,) or mask.dtype != bool:
        raise UserError(f"evidence: expected a bool array of shape ({length},), got {mask.dtype} {mask.shape}")
    return mask

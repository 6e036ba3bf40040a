"""What every row of a batch has to generate, laid out so that one network call serves all of them.

Rows may differ in what they know and in how many positions are free. They are aligned: the evidence of every row ends
at context index E, the first generated token is at E + 1, and what stands before the start token of a shorter row is
padding that nobody sees.

    context index   0      1      2    3    4   5   6
    row 0           start  e1     e2   e3   a   b   c       E = 3
    row 1           -      -      start e1  d   e   -       two tokens to generate

Sizes that a compiled program depends on are rounded up to a few, so that requests of other sizes find it ready.
"""

from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.core import order as orders
from armd_jax.core.order import Order
from armd_jax.core.rows import START

SHORTEST = 32  # the least capacity of a context, in tokens
FREE, ABSENT = -1, -2  # in place of a known token: it is to be generated; the row is shorter


@flax.struct.dataclass
class Schedule:
    """The layout of a batch; T is the context's capacity.

    context_BT: int32, the start token and the evidence; anything elsewhere.
    positions_BT: int32, positions as the network takes them: 0 for the start token, j + 1 for natural position j.
    index_BW: int32, the context index of every natural position; T if the row has no such position.
    first_B: int32, context index of the start token.
    free_B: int32, how many tokens are generated.
    num_evidence: int32 scalar, E. num_calls: int32 scalar, how many network calls draw tokens.
    streams: S, the number of tokens of the largest block.
    """

    context_BT: jax.Array
    positions_BT: jax.Array
    index_BW: jax.Array
    first_B: jax.Array
    free_B: jax.Array
    num_evidence: jax.Array
    num_calls: jax.Array
    streams: int = flax.struct.field(pytree_node=False)


def round_up(size: int, largest: int | None = None) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …, or `largest` if that is nearer."""
    power = 1 << max(size - 1, 0).bit_length()  # the next power of two
    rounded = power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power
    return min(rounded, largest) if largest is not None and size <= largest else rounded


def strided(
    known_BN: np.ndarray, streams: int, max_length: int, rows: int | None = None, spare: int | None = None
) -> Schedule:
    """The schedule of strided block-parallel sampling (paper section on SBP).

    known_BN: int, at natural positions: known ids, FREE where to generate, ABSENT behind the end of a row. A row with
    fewer free positions than streams has as many streams as positions.
    rows: of the layout, at least as many as there are texts; default: rounded up.
    spare: how many indices there are behind the last token; default: S.
    """
    batch = len(known_BN)
    evidence_B, free_B = (known_BN >= 0).sum(axis=1), (known_BN == FREE).sum(axis=1)
    num_evidence, num_free = int(evidence_B.max()), int(free_B.max())
    rows = round_up(batch) if rows is None else rows
    width = width_of(known_BN, max_length)
    # By default, a block of S can be cut out wherever a shorter last block begins.
    capacity = width + (streams if spare is None else spare)
    context_BT = np.zeros((rows, capacity), np.int32)
    positions_BT = np.zeros((rows, capacity), np.int32)
    index_BW = np.full((rows, width), capacity, np.int32)
    context_BT[:, num_evidence] = START
    for at, known_N in _alike(known_BN):
        places, in_order, _ = _in_order(known_N, streams)
        first, last = num_evidence - len(places), num_evidence + len(in_order) - len(places)
        context_BT[at, first] = START
        context_BT[at, first + 1 : num_evidence + 1] = known_BN[at][:, places]
        positions_BT[at, first + 1 : last + 1] = in_order + 1
        index_BW[np.ix_(at, in_order)] = np.arange(first + 1, last + 1)
    pad = (0, rows - batch)
    first_B = np.pad(num_evidence - evidence_B, pad, constant_values=num_evidence).astype(np.int32)
    free_B = np.pad(free_B, pad).astype(np.int32)
    calls = np.int32(num_calls(num_free, streams))
    arrays: dict[str, Any] = dict(context_BT=context_BT, positions_BT=positions_BT, index_BW=index_BW)
    arrays |= dict(first_B=first_B, free_B=free_B, num_evidence=np.int32(num_evidence), num_calls=calls)
    # Unlike `jnp.asarray`, this compiles nothing for a shape that is new.
    return Schedule(**jax.device_put(arrays), streams=streams)


def after_prompts(prompt_BP: jax.Array, length_B: jax.Array, new: int, streams: int) -> Schedule:
    """The schedule that `strided` makes of prompts which are followed by `new` free positions. Traceable.

    Its sizes are P, `new` and S, not rounded up, and B and P may be symbolic dimensions of `jax.export`.

    prompt_BP: int32, anything behind the end of a prompt. length_B: int32, tokens of each prompt, in 0 .. P.
    """
    width = prompt_BP.shape[1] + new
    capacity = width + streams
    num_evidence = jnp.max(length_B)
    first_B1 = (num_evidence - length_B)[:, None]
    index, _ = orders.in_streams(new, streams)
    in_order_R = np.empty(new, np.int32)
    in_order_R[index] = np.arange(new)
    # What each context index holds: the start token, prompt tokens 1, 2, …, then free positions in generation order.
    rank_BT = jnp.arange(capacity) - first_B1
    drawn_T = jnp.arange(capacity) - num_evidence - 1
    prompt_BT = jnp.take_along_axis(prompt_BP, rank_BT - 1, axis=1, mode="clip")
    free_BT = length_B[:, None] + 1 + jnp.asarray(in_order_R)[jnp.clip(drawn_T, 0, new - 1)]
    place_BW = jnp.arange(width) - length_B[:, None]  # among the free positions
    rank_BW = jnp.asarray(index, jnp.int32)[jnp.clip(place_BW, 0, new - 1)]
    known_or_free_BW = jnp.where(place_BW < 0, first_B1 + 1 + jnp.arange(width), num_evidence + 1 + rank_BW)
    return Schedule(
        context_BT=jnp.where(rank_BT == 0, START, jnp.where(drawn_T < 0, prompt_BT, 0)).astype(jnp.int32),
        positions_BT=jnp.where(drawn_T < 0, jnp.maximum(rank_BT, 0), free_BT).astype(jnp.int32),
        index_BW=jnp.where(place_BW < new, known_or_free_BW, capacity).astype(jnp.int32),
        first_B=first_B1[:, 0].astype(jnp.int32),
        free_B=jnp.full_like(length_B, new),
        num_evidence=num_evidence,
        num_calls=jnp.int32(num_calls(new, streams)),
        streams=streams,
    )


def width_of(known_BN: np.ndarray, max_length: int) -> int:
    """How many tokens the context of `strided` has room for."""
    tokens = int((known_BN >= 0).sum(axis=1).max()) + int((known_BN == FREE).sum(axis=1).max())
    # Powers of two alone: what a context has to spare costs little, because only attention reads it.
    width = max(SHORTEST, 1 << (tokens - 1).bit_length())
    return min(width, max_length) if tokens <= max_length else width


def lengths(known_BN: np.ndarray) -> np.ndarray:
    """int [B]: how many positions each row has."""
    return (known_BN != ABSENT).sum(axis=1)


def _alike(known_BN: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that know the same places: their numbers, and one of them."""
    kind_BN = np.minimum(known_BN, 0).astype(np.int8)  # 0 at evidence
    if (kind_BN == kind_BN[0]).all():
        yield np.arange(len(known_BN)), known_BN[0]
        return
    _, firsts, group_B = np.unique(kind_BN, axis=0, return_index=True, return_inverse=True)
    for group, first in enumerate(firsts):
        yield np.flatnonzero(group_B.reshape(-1) == group), known_BN[first]


def _in_order(known_N: np.ndarray, streams: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a row: the places of its evidence; all its places in generation order; the blocks (from 1) of the free ones.

    The blocks are in generation order too.
    """
    places, free = np.flatnonzero(known_N >= 0), np.flatnonzero(known_N == FREE)
    index, block = orders.in_streams(len(free), streams)
    in_order, blocks = np.empty(len(places) + len(free), int), np.empty(len(free), int)
    in_order[: len(places)] = places
    in_order[len(places) + index] = free
    blocks[index] = block
    return places, in_order, blocks


def num_calls(num_free: int, streams: int) -> int:
    """How many network calls draw R free tokens in S streams: S + ceil(R / S) - 1, and R if there are fewer than S."""
    return streams + -(-num_free // streams) - 1 if num_free >= streams else num_free


def order_of(known_BN: np.ndarray, streams: int) -> tuple[Order, np.ndarray]:
    """The order of `strided`, and int32 [B, N], the number (from 1) of the call that makes each token, 0 at evidence.

    The latter is at natural positions. Positions behind the end of a row come last, one token per block, where they
    change no probability of the others.
    """
    batch, length = known_BN.shape
    positions_BN = np.empty((batch, length), np.int32)
    block_BN = np.empty((batch, length), np.int32)
    call_BN = np.zeros((batch, length), np.int32)
    for at, known_N in _alike(known_BN):
        places, in_order, block = _in_order(known_N, streams)
        absent = np.flatnonzero(known_N == ABSENT)
        positions_BN[at] = np.concatenate([in_order, absent])
        calls = int(block.max(initial=0))
        ids = np.concatenate([np.zeros(len(places), int), block, calls + np.arange(1, len(absent) + 1)])
        ids[: len(places)] = np.arange(1 - len(places), 1)
        block_BN[at] = len(places) + ids
        call_BN[np.ix_(at, in_order[len(places) :])] = block
    return _order(positions_BN, block_BN, np.ones((batch, length), np.float32)), call_BN


def order_of_calls(known_BN: np.ndarray, call_BN: np.ndarray) -> Order:
    """The order in which calls made the tokens of a batch: those of one call are a block.

    call_BN: int, at natural positions, as in `Generation.call_BN`. Evidence comes first, one token per block; what has
    not been made and what is behind the end of a row come last, likewise.
    """
    last = np.iinfo(np.int64).max
    time_BN = np.where(call_BN < 0, last, call_BN)
    positions_BN = np.argsort(time_BN, axis=1, kind="stable")
    time_BN = np.take_along_axis(time_BN, positions_BN, axis=1)
    alone_BN = (time_BN == 0) | (time_BN == last)
    starts_BN = alone_BN.copy()
    starts_BN[:, 0] = True
    starts_BN[:, 1:] |= time_BN[:, 1:] != time_BN[:, :-1]
    return _order(
        positions_BN.astype(np.int32),
        np.cumsum(starts_BN, axis=1).astype(np.int32),
        np.ones(known_BN.shape, np.float32),
    )


def blocks_from_starts(known_BN: np.ndarray, starts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Streams that begin at given free places: places [B, C, S] of every block, then -1; each last start [B]. int32.

    The heads come first, one by one, and then the second tokens of all streams, the third, and so on, as far as each
    stream goes: up to the next start. The first free place begins a stream too.
    """
    rows, last = [], []
    for known_N, heads in zip(known_BN, starts, strict=True):
        free = np.flatnonzero(known_N == FREE)
        cuts = np.searchsorted(free, np.union1d(heads, free[:1]))
        streams = np.split(free, cuts[1:]) if len(free) else []
        last.append(streams[-1][0] if streams else 0)
        depth = max(map(len, streams), default=1)
        rows.append(
            [[stream[0]] for stream in streams]
            + [[stream[place] for stream in streams if len(stream) > place] for place in range(1, depth)]
        )
    calls, most = max(map(len, rows)), max(max(map(len, blocks), default=1) for blocks in rows)
    places_BCS = np.full((len(rows), round_up(calls), most), -1, np.int32)
    for row, blocks in enumerate(rows):
        for call, block in enumerate(blocks):
            places_BCS[row, call, : len(block)] = block
    return places_BCS, np.array(last, np.int32)


def pad(order: Order, rows: int, width: int) -> Order:
    """The order with more positions, which come last and one by one, and with more rows, which are copies of others."""
    batch, length = order.shape

    def padded(a_BN: np.ndarray, added_N: np.ndarray | int) -> np.ndarray:
        more_BN = np.broadcast_to(added_N, (batch, width - length)).astype(a_BN.dtype)
        return np.resize(np.concatenate([a_BN, more_BN], axis=1), (rows, width))

    positions_BN, block_BN, weight_BN = map(np.asarray, (order.positions_BN, order.block_BN, order.weight_BN))
    behind = np.arange(length, width)
    return _order(
        padded(positions_BN, behind),
        padded(block_BN, block_BN[:, -1:] + 1 + behind - length),
        padded(weight_BN, 1),
        None if order.first_BN is None else padded(np.asarray(order.first_BN), behind),  # each a document of its own
    )


def _order(
    positions_BN: np.ndarray, block_BN: np.ndarray, weight_BN: np.ndarray, first_BN: np.ndarray | None = None
) -> Order:
    return Order(*jax.device_put((positions_BN, block_BN, weight_BN, first_BN)))

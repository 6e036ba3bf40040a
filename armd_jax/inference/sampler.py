"""Strided block-parallel sampling (paper section on SBP): jitted functions, one network call per block.

Evidence comes first in the order and is read in chunks by `begin`. Then `advance` draws the S stream heads one by one,
and groups of S after them. The rows of a call are the X rows of the block that was drawn before and the G rows of the
next one:

    call        1         2        3 (S = 2)          4
    X rows      last e    head 1   head 2, -          group 1   (written to the caches)
    G rows      head 1    head 2   group 1            group 2   (drawn)

The same `network.forward` as in training does the work, with a cache. Each row of a batch has evidence, free positions
and random numbers of its own (`inference.schedule`).
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core import cache as caches
from armd_jax.core import network, objective
from armd_jax.core.cache import Cache
from armd_jax.core.parameters import Params
from armd_jax.core.rows import Rows, neighbours
from armd_jax.core.sizes import activation_dtype
from armd_jax.inference.draw import Draw
from armd_jax.inference.schedule import Schedule

# Evidence tokens that one network call reads: the first of these that holds all of it, or the last. Fewer would make
# poor use of a processor, more would waste a last chunk.
_CHUNKS = {"cpu": (8, 32)}
_CHUNKS_OF_ACCELERATORS = (128,)


@flax.struct.dataclass
class Ending:
    """What is special about the end-of-text token.

    token: int32 scalar; -1: there is none. With one stream, a row that draws it is complete.
    bias: float32 scalar, added to its logit in all streams but the last of a row; -inf: they never draw it.
    """

    token: jax.Array
    bias: jax.Array

    @classmethod
    def make(cls, token: int = -1, bias: float = 0.0) -> "Ending":
        """From plain numbers."""
        return cls(*jax.device_put((np.int32(token), np.float32(bias))))


@flax.struct.dataclass
class SamplingState:
    """Everything that the sampling loop carries.

    context_BT: int32, as in the schedule, with what was drawn. log_prob_BT: float32, the log-probability of each token.
    call: int32 scalar, how many calls have drawn tokens. ended_B: bool, True if a row's text has ended. key_B: random
    keys, one per row.
    """

    cache: Cache
    context_BT: jax.Array
    log_prob_BT: jax.Array
    call: jax.Array
    ended_B: jax.Array
    key_B: jax.Array


def start(
    params: Params, config: ModelConfig, plan: Schedule, seed_B: np.ndarray, stream_B: np.ndarray
) -> SamplingState:
    """What `begin` returns, for a plan with rows to spare. seed_B, stream_B: int32, of the texts that are asked for."""
    rows, capacity = plan.context_BT.shape
    pad = (0, rows - len(seed_B))
    chunks = _CHUNKS.get(jax.default_backend(), _CHUNKS_OF_ACCELERATORS)
    size = next((size for size in chunks if size >= int(plan.num_evidence)), chunks[-1])
    return begin(params, config, plan, np.pad(seed_B, pad), np.pad(stream_B, pad), min(size, capacity - 1))


@functools.partial(jax.jit, static_argnames=("config", "size"))
def begin(
    params: Params, config: ModelConfig, plan: Schedule, seed_B: jax.Array, stream_B: jax.Array, size: int
) -> SamplingState:
    """Reads the evidence of all rows, in chunks of `size` tokens, which is less than the capacity.

    params: `unstack`ed. seed_B, stream_B: int32, what the random numbers of each row are made from.
    """
    batch, capacity = plan.context_BT.shape
    state = SamplingState(
        cache=caches.empty(config, activation_dtype(config), batch, capacity),
        context_BT=plan.context_BT,
        log_prob_BT=jnp.zeros((batch, capacity), jnp.float32),
        call=jnp.int32(0),
        ended_B=jnp.zeros((batch,), bool),
        key_B=jax.vmap(lambda seed, stream: jax.random.fold_in(jax.random.key(seed), stream))(seed_B, stream_B),
    )

    def step(number: jax.Array, state: SamplingState) -> SamplingState:
        return _read(params, config, plan, number * size, size, state)

    return jax.lax.fori_loop(0, -(-plan.num_evidence // size), step, state)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def advance(
    params: Params,
    config: ModelConfig,
    plan: Schedule,
    state: SamplingState,
    draw: Draw,
    ending: Ending,
    until: jax.Array,
) -> SamplingState:
    """Draws tokens until every row is complete, or `until` calls (int32 scalar) have drawn some.

    params: `unstack`ed, and possibly `parameters.in_panels`, because the calls have few rows.
    """

    def unfinished(state: SamplingState) -> jax.Array:
        going_on_B = ~state.ended_B & (state.call < plan.free_B)
        return (state.call < jnp.minimum(plan.num_calls, until)) & jnp.any(going_on_B)

    return jax.lax.while_loop(unfinished, lambda state: draw_block(params, config, plan, state, draw, ending), state)


def values_at(a_BT: jax.Array, index_BR: jax.Array) -> jax.Array:
    """Values [B, R] at context indices; those of the nearest index if one is outside."""
    return jnp.take_along_axis(a_BT, index_BR, axis=1, mode="clip")


def _take(a_BT: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a_BT, start, size, axis=1)


def _put(a_BT: jax.Array, new_BS: jax.Array, start: jax.Array, valid_BS: jax.Array) -> jax.Array:
    """The array with new values from `start` on; what is not valid stays."""
    kept_BS = jnp.where(valid_BS, new_BS, _take(a_BT, start, new_BS.shape[1]))
    return jax.lax.dynamic_update_slice_in_dim(a_BT, kept_BS, start, axis=1)


def _beside(plan: Schedule, state: SamplingState, positions_BG: jax.Array, strict_BG: jax.Array) -> list[jax.Array]:
    """The left and the right neighbour of every target."""
    # A natural position is one less than the position that the network is given.
    natural_BG = positions_BG - 1
    context_BT, index_BW = state.context_BT, plan.index_BW
    return [neighbours(context_BT, index_BW, natural_BG + offset, strict_BG) for offset in (-1, 1)]


def _read(
    params: Params, config: ModelConfig, plan: Schedule, first: jax.Array, size: int, state: SamplingState
) -> SamplingState:
    """Context tokens `first` .. `first` + size - 1 as X rows, and the evidence after each of them as G rows."""
    batch, capacity = plan.context_BT.shape
    # The last chunk begins earlier if it would not fit, and what it then repeats is not valid.
    start = jnp.minimum(first, capacity - 1 - size)
    index_BC = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
    valid_BC = (index_BC >= first) & (index_BC >= plan.first_B[:, None]) & (index_BC < plan.num_evidence)
    g_positions_BC = _take(plan.positions_BT, start + 1, size)
    left_BC, right_BC = _beside(plan, state, g_positions_BC, index_BC + 1)
    rows = Rows(
        x_tokens_BX=_take(state.context_BT, start, size),
        x_positions_BX=_take(plan.positions_BT, start, size),
        x_len_BX=index_BC + 1,
        g_positions_BG=g_positions_BC,
        g_strict_len_BG=index_BC + 1,
        g_previous_len_BG=index_BC,
        g_len_BG=index_BC + 1,
        g_left_BG=left_BC,
        g_right_BG=right_BC,
        x_start=start,
        g_start=start,
        x_valid_BX=valid_BC,
        g_valid_BG=valid_BC,
        first_B=plan.first_B,
    )
    h_BCD, cache = network.forward(params, config, rows, state.cache)
    assert cache is not None
    log_prob_BC, _ = objective.token_log_probs(params, config, h_BCD, _take(state.context_BT, start + 1, size))
    return dataclasses.replace(
        state, cache=cache, log_prob_BT=_put(state.log_prob_BT, log_prob_BC, start + 1, valid_BC)
    )


def _block(plan: Schedule, call: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Context index at which the block of a call (from 0) begins, and int32 [B], how many tokens each row has in it.

    What lies before the first block is the last token of the evidence, or the start token.
    """
    streams = plan.streams
    offset = jnp.where(call < streams, call, streams + (call - streams) * streams)
    count_B = jnp.clip(plan.free_B - offset, 0, jnp.where(call < streams, 1, streams))
    return plan.num_evidence + 1 + offset, jnp.where(call < 0, 1, count_B)


def draw_block(
    params: Params, config: ModelConfig, plan: Schedule, state: SamplingState, draw: Draw, ending: Ending
) -> SamplingState:
    """The block of the call before as X rows, and the next block, which is drawn, as G rows."""
    batch, streams = plan.context_BT.shape[0], plan.streams
    x_start, x_count_B = _block(plan, state.call - 1)
    g_start, g_count_B = _block(plan, state.call)

    def every(value_B: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.reshape(value_B, (-1, 1)), (batch, streams)).astype(jnp.int32)

    x_valid_BS = jnp.arange(streams) < x_count_B[:, None]
    g_valid_BS = (jnp.arange(streams) < g_count_B[:, None]) & ~state.ended_B[:, None]
    g_positions_BS = _take(plan.positions_BT, g_start, streams)
    left_BS, right_BS = _beside(plan, state, g_positions_BS, every(g_start))
    rows = Rows(
        x_tokens_BX=_take(state.context_BT, x_start, streams),
        x_positions_BX=_take(plan.positions_BT, x_start, streams),
        x_len_BX=every(x_start + x_count_B),
        g_positions_BG=g_positions_BS,
        g_strict_len_BG=every(g_start),
        g_previous_len_BG=every(x_start),
        g_len_BG=every(g_start - 1 + g_count_B),
        g_left_BG=left_BS,
        g_right_BG=right_BS,
        x_start=x_start,
        g_start=g_start - 1,  # keys of G have no start token
        x_valid_BX=x_valid_BS,
        g_valid_BG=g_valid_BS,
        first_B=plan.first_B,
    )
    h_BSD, cache = network.forward(params, config, rows, state.cache)
    assert cache is not None
    logits_BSV = network.head_logits(params, config, h_BSD)
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.call)
    tokens_BS = draw(key_B, _without_inner_ends(plan, state.call, logits_BSV, ending))
    chosen_BS = jnp.take_along_axis(logits_BSV, tokens_BS[..., None], axis=-1)[..., 0]
    log_prob_BS = chosen_BS - jax.nn.logsumexp(logits_BSV, axis=-1)
    ended_B = jnp.any(g_valid_BS & (tokens_BS == ending.token), axis=1) if streams == 1 else False
    return dataclasses.replace(
        state,
        cache=cache,
        context_BT=_put(state.context_BT, tokens_BS, g_start, g_valid_BS),
        log_prob_BT=_put(state.log_prob_BT, log_prob_BS, g_start, g_valid_BS),
        call=state.call + 1,
        ended_B=state.ended_B | ended_B,
    )


def _without_inner_ends(plan: Schedule, call: jax.Array, logits_BSV: jax.Array, ending: Ending) -> jax.Array:
    """The logits of a block, with the bias of the end-of-text token in all streams but the last."""
    streams = plan.streams
    if streams == 1:
        return logits_BSV
    stream_S = jnp.where(call < streams, call, jnp.arange(streams))
    inner_BS1 = (stream_S < jnp.minimum(plan.free_B, streams)[:, None] - 1)[..., None]
    at_end_V = jnp.arange(logits_BSV.shape[-1]) == ending.token
    return logits_BSV + jnp.where(inner_BS1 & at_end_V, ending.bias, 0)

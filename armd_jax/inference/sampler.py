"""Strided block-parallel sampling (paper section on SBP): one jitted function, one network call per block.

Evidence comes first in the order, then the S stream heads one by one, then groups of S. The rows of a call are the X
rows of the block that was just sampled and the G rows of the next one. The first call also takes the X and G rows of
all evidence:

    call        1              2        3 (S = 2)          4
    X rows      start, e1, e2  head 1   head 2, -          group 1   (written to the caches)
    G rows      e1, e2, head 1 head 2   group 1            group 2   (sampled, except evidence)

The same `network.forward` as in training does the work, with a cache.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core import block_mask, network, objective
from armd_jax.core import cache as caches
from armd_jax.core.cache import Cache
from armd_jax.core.parameters import Params
from armd_jax.core.rows import START, Rows, neighbours, ranks
from armd_jax.core.sizes import activation_dtype
from armd_jax.inference.draw import Draw
from armd_jax.inference.schedule import Schedule


@flax.struct.dataclass
class SamplingState:
    """Everything that the sampling loop carries. Sequences are in generation order with S spare places at the end."""

    cache: Cache
    tokens_BN: jax.Array  # int32
    log_prob_BN: jax.Array  # float32
    num_calls: jax.Array  # int32, network calls made


@functools.partial(jax.jit, static_argnames="config")
def generate(
    params: Params,
    config: ModelConfig,
    key: jax.Array,
    tokens_BN: jax.Array,
    schedule: Schedule,
    draw: Draw,
    loop_params: Params | None = None,
) -> SamplingState:
    """Samples every position of the schedule that is not evidence.

    params: `unstack`ed. tokens_BN: int32 in generation order, with the evidence filled in.
    loop_params: the same parameters in a layout for the few rows of all calls but the first (`parameters.in_panels`);
        the first call has the rows of the evidence too.
    """
    loop_params = params if loop_params is None else loop_params
    num_calls = schedule.start_C.shape[0]
    call_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_calls))
    positions_BN = _spare(schedule.order.positions_BN + 1, schedule.streams)
    rank_BN = ranks(schedule.order)  # outside the loop: sorting costs more than a small network's call
    state = _first_call(params, config, call_keys[0], tokens_BN, positions_BN, rank_BN, schedule, draw)

    def step(call: jax.Array, state: SamplingState) -> SamplingState:
        return _next_call(loop_params, config, call_keys[call], call, state, positions_BN, rank_BN, schedule, draw)

    state = jax.lax.fori_loop(1, num_calls, step, state)
    length = tokens_BN.shape[1]
    return state.replace(tokens_BN=state.tokens_BN[:, :length], log_prob_BN=state.log_prob_BN[:, :length])


def _sample(
    params: Params, config: ModelConfig, key: jax.Array, h_BSD: jax.Array, draw: Draw
) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn from final hidden states, and the model's own log-probability of each; both [B, S]."""
    logits_BSV = network.head_logits(params, config, h_BSD)
    tokens_BS = draw(key, logits_BSV)
    chosen = jnp.take_along_axis(logits_BSV, tokens_BS[..., None], axis=-1)[..., 0]
    return tokens_BS, chosen - jax.nn.logsumexp(logits_BSV, axis=-1)


def _first_call(
    params: Params,
    config: ModelConfig,
    key: jax.Array,
    tokens_BN: jax.Array,
    positions_BN: jax.Array,
    rank_BN: jax.Array,
    schedule: Schedule,
    draw: Draw,
) -> SamplingState:
    """Start token and evidence as X rows; evidence and the first head, which is sampled, as G rows."""
    batch, length = tokens_BN.shape
    num_evidence, streams = schedule.num_evidence, schedule.streams
    mask = block_mask.build(schedule.order)
    first = slice(0, num_evidence + 1)
    natural_BG = schedule.order.positions_BN[:, first]
    start_B1 = jnp.full((batch, 1), START, jnp.int32)
    rows = Rows(
        x_tokens_BX=jnp.concatenate([start_B1, tokens_BN[:, :num_evidence]], axis=1),
        x_positions_BX=jnp.concatenate([jnp.zeros_like(start_B1), positions_BN[:, :num_evidence]], axis=1),
        x_len_BX=mask.x_len_BN[:, first],
        g_positions_BG=positions_BN[:, first],
        g_strict_len_BG=mask.strict_len_BN[:, first],
        g_previous_len_BG=mask.previous_len_BN[:, first],
        g_len_BG=mask.g_len_BN[:, first],
        g_left_BG=neighbours(tokens_BN, rank_BN, natural_BG - 1, mask.strict_len_BN[:, first]),
        g_right_BG=neighbours(tokens_BN, rank_BN, natural_BG + 1, mask.strict_len_BN[:, first]),
    )
    empty = caches.empty(config, activation_dtype(config), batch, length + streams)
    h_BGD, cache = network.forward(params, config, rows, empty)
    assert cache is not None
    head_B1, log_prob_B1 = _sample(params, config, key, h_BGD[:, -1:], draw)
    if num_evidence:
        known, _ = objective.token_log_probs(params, config, h_BGD[:, :-1], tokens_BN[:, :num_evidence])
        log_prob_B1 = jnp.concatenate([known, log_prob_B1], axis=1)
    return SamplingState(
        cache=cache,
        tokens_BN=_spare(tokens_BN, streams).at[:, num_evidence].set(head_B1[:, 0]),
        log_prob_BN=jnp.zeros((batch, length + streams), jnp.float32).at[:, first].set(log_prob_B1),
        num_calls=jnp.int32(1),
    )


def _next_call(
    params: Params,
    config: ModelConfig,
    key: jax.Array,
    call: jax.Array,
    state: SamplingState,
    positions_BN: jax.Array,
    rank_BN: jax.Array,
    schedule: Schedule,
    draw: Draw,
) -> SamplingState:
    """The block sampled by call `call` - 1 as X rows, and the next block, which is sampled, as G rows."""
    batch, streams = state.tokens_BN.shape[0], schedule.streams
    x_start, x_count = schedule.start_C[call - 1], schedule.count_C[call - 1]
    g_start, g_count = schedule.start_C[call], schedule.count_C[call]

    def take(a: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, start, streams, axis=1)

    def every(value: jax.Array) -> jax.Array:
        return jnp.full((batch, streams), value, jnp.int32)

    def beside(offset: int) -> jax.Array:
        # A natural position is one less than the position that the network is given.
        positions_BS = take(positions_BN, g_start) - 1 + offset
        return neighbours(state.tokens_BN, rank_BN, positions_BS, every(g_start + 1))

    x_valid = jnp.broadcast_to(jnp.arange(streams) < x_count, (batch, streams))
    g_valid = jnp.broadcast_to(jnp.arange(streams) < g_count, (batch, streams))
    rows = Rows(
        x_tokens_BX=take(state.tokens_BN, x_start),
        x_positions_BX=take(positions_BN, x_start),
        x_len_BX=every(x_start + x_count + 1),
        g_positions_BG=take(positions_BN, g_start),
        g_strict_len_BG=every(g_start + 1),
        g_previous_len_BG=every(x_start + 1),
        g_len_BG=every(g_start + g_count),
        g_left_BG=beside(-1),
        g_right_BG=beside(1),
        x_start=x_start + 1,
        g_start=g_start,
        x_valid_BX=x_valid,
        g_valid_BG=g_valid,
    )
    h_BSD, cache = network.forward(params, config, rows, state.cache)
    assert cache is not None
    tokens_BS, log_prob_BS = _sample(params, config, key, h_BSD, draw)

    def put(a: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(a, jnp.where(g_valid, new, take(a, g_start)), g_start, axis=1)

    return SamplingState(
        cache=cache,
        tokens_BN=put(state.tokens_BN, tokens_BS),
        log_prob_BN=put(state.log_prob_BN, log_prob_BS),
        num_calls=state.num_calls + 1,
    )


def _spare(a_BN: jax.Array, streams: int) -> jax.Array:
    """The array with S more places, so that a block of S can be cut out wherever a shorter last block begins."""
    return jnp.pad(a_BN, ((0, 0), (0, streams)))

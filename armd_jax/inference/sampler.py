"""Strided block-parallel sampling (paper section on SBP): one jitted function, one network call a block.

Evidence comes first in the order, then the S stream heads one by one, then groups of S. A call's rows are the X rows of
the block just sampled and the G rows of the next one; the X and G rows of all evidence travel with the first head's:

    call        1              2        3 (S = 2)          4
    X rows      start, e1, e2  head 1   head 2, -          group 1   (written to the caches)
    G rows      e1, e2, head 1 head 2   group 1            group 2   (sampled, except evidence)

The same `network.forward` as in training does the work, with a cache.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core import block_mask, network, objective
from armd_jax.core import cache as caches
from armd_jax.core.cache import Cache
from armd_jax.core.network import Params
from armd_jax.core.order import Order
from armd_jax.core.rows import START, Rows


@flax.struct.dataclass
class SamplingState:
    """Everything that the sampling loop carries; sequences are in generation order with S spare places at the end."""

    cache: Cache
    tokens_BN: jax.Array  # int32
    log_prob_BN: jax.Array  # float32
    num_calls: jax.Array  # int32, network calls made


@flax.struct.dataclass
class BlockTable:
    """Where each sampled block begins in the generation order and how many tokens it has; [C] int32 each."""

    start_C: jax.Array
    count_C: jax.Array


def block_table(order: Order, num_evidence: int) -> BlockTable:
    """The sampled blocks of an order whose rows share one block structure, evidence left out."""
    blocks = np.asarray(order.block_BN[0])[num_evidence:]
    starts = np.flatnonzero(np.diff(blocks, prepend=blocks[:1] - 1))
    counts = np.diff(np.append(starts, len(blocks)))
    return BlockTable(jnp.asarray(starts + num_evidence, jnp.int32), jnp.asarray(counts, jnp.int32))


def draw(
    key: jax.Array,
    logits_BSV: jax.Array,
    temperature: jax.Array,
    greedy: bool,
    top_k: int | None,
    top_p: jax.Array | None,
) -> jax.Array:
    """Tokens [B, S] int32 from float32 logits after temperature, top-k, then top-p (nucleus, Holtzman et al. 2020).

    The Gumbel noise is the accurate one: plain float32 noise never reaches the tail and makes samples too cold.
    """
    if greedy:
        return jnp.argmax(logits_BSV, axis=-1).astype(jnp.int32)
    logits_BSV = logits_BSV / temperature
    if top_k is not None:
        kth = jax.lax.top_k(logits_BSV, min(top_k, logits_BSV.shape[-1]))[0][..., -1:]
        logits_BSV = jnp.where(logits_BSV >= kth, logits_BSV, -jnp.inf)
    if top_p is not None:
        sorted_BSV = jnp.sort(logits_BSV, axis=-1, descending=True)
        p_BSV = jax.nn.softmax(sorted_BSV, axis=-1)
        before_BSV = jnp.cumsum(p_BSV, axis=-1) - p_BSV  # mass of the likelier tokens: the first is always kept
        last = jnp.min(jnp.where(before_BSV < top_p, sorted_BSV, jnp.inf), axis=-1, keepdims=True)
        logits_BSV = jnp.where(logits_BSV >= last, logits_BSV, -jnp.inf)
    return _categorical(key, logits_BSV)


def _categorical(key: jax.Array, logits_BSV: jax.Array) -> jax.Array:
    """An exact draw in two steps, a group of 128 entries by its mass and then an entry of it.

    P(group) P(entry | group) is the softmax; V / 128 + 128 noise values a token replace V, which cost as much as the
    network itself where that is small. A group without mass is -inf and never drawn.
    """
    vocab = logits_BSV.shape[-1]
    size = network.VOCAB_MULTIPLE if vocab % network.VOCAB_MULTIPLE == 0 else vocab
    groups = vocab // size
    logits_BSCW = logits_BSV.reshape(*logits_BSV.shape[:-1], groups, size)
    mass_BSC = jax.nn.logsumexp(logits_BSCW, axis=-1)
    # One draw for both steps: on CPU the generator's cost is in how often it runs.
    noise = jax.random.gumbel(key, (*logits_BSV.shape[:-1], groups + size), mode="high")
    group_BS = jnp.argmax(mass_BSC + noise[..., :groups], axis=-1)
    inside_BSW = jnp.take_along_axis(logits_BSCW, group_BS[..., None, None], axis=2)[:, :, 0]
    entry_BS = jnp.argmax(inside_BSW + noise[..., groups:], axis=-1)
    return (group_BS * size + entry_BS).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "streams", "num_evidence", "greedy", "top_k"))
def generate(
    params: Params,
    config: ModelConfig,
    key: jax.Array,
    tokens_BN: jax.Array,
    order: Order,
    table: BlockTable,
    *,
    streams: int,
    num_evidence: int,
    temperature: jax.Array,
    greedy: bool,
    top_k: int | None,
    top_p: jax.Array | None,
    loop_params: Params | None = None,
) -> SamplingState:
    """Samples every position after the first `num_evidence` of the order.

    params: `network.unstack`ed. loop_params: the same in a layout for the few rows of all calls but the first, which
    has the evidence (`network.in_panels`). tokens_BN: int32 in generation order, evidence filled in. The order's first
    sampled block is a single token and no block is longer than `streams`.
    """
    batch, length = tokens_BN.shape
    loop_params = params if loop_params is None else loop_params
    mask = block_mask.build(order)
    call_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(table.start_C.shape[0]))
    spare = lambda a: jnp.pad(a, ((0, 0), (0, streams)))  # noqa: E731
    positions_BN = spare(order.positions_BN + 1)

    def sample(key, logits_BSV):
        tokens_BS = draw(key, logits_BSV, temperature, greedy, top_k, top_p)
        chosen = jnp.take_along_axis(logits_BSV, tokens_BS[..., None], axis=-1)[..., 0]
        return tokens_BS, chosen - jax.nn.logsumexp(logits_BSV, axis=-1)

    # The first call: start token and evidence as X rows, evidence and the first head as G rows.
    first = slice(0, num_evidence + 1)
    start_B1 = jnp.full((batch, 1), START, jnp.int32)
    rows = Rows(
        x_tokens_BX=jnp.concatenate([start_B1, tokens_BN[:, :num_evidence]], axis=1),
        x_positions_BX=jnp.concatenate([jnp.zeros_like(start_B1), positions_BN[:, :num_evidence]], axis=1),
        x_len_BX=mask.x_len_BN[:, first],
        g_positions_BG=positions_BN[:, first],
        g_strict_len_BG=mask.strict_len_BN[:, first],
        g_previous_len_BG=mask.previous_len_BN[:, first],
        g_len_BG=mask.g_len_BN[:, first],
    )
    cache = caches.empty(config, network.activation_dtype(config), batch, length + streams)
    h_BGD, cache = network.forward(params, config, rows, cache)
    head_B1, head_log_prob_B1 = sample(call_keys[0], network.head_logits(params, config, h_BGD[:, -1:]))
    log_prob_B1 = head_log_prob_B1
    if num_evidence:
        known, _ = objective.token_log_probs(params, config, h_BGD[:, :-1], tokens_BN[:, :num_evidence])
        log_prob_B1 = jnp.concatenate([known, head_log_prob_B1], axis=1)
    state = SamplingState(
        cache=cache,
        tokens_BN=spare(tokens_BN).at[:, num_evidence].set(head_B1[:, 0]),
        log_prob_BN=jnp.zeros((batch, length + streams), jnp.float32).at[:, first].set(log_prob_B1),
        num_calls=jnp.int32(1),
    )

    def step(call, state):
        x_start, x_count = table.start_C[call - 1], table.count_C[call - 1]
        g_start, g_count = table.start_C[call], table.count_C[call]
        take = lambda a, start: jax.lax.dynamic_slice_in_dim(a, start, streams, axis=1)  # noqa: E731
        every = lambda value: jnp.full((batch, streams), value, jnp.int32)  # noqa: E731
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
            x_start=x_start + 1,
            g_start=g_start,
            x_valid_BX=x_valid,
            g_valid_BG=g_valid,
        )
        h_BSD, cache = network.forward(loop_params, config, rows, state.cache)
        tokens_BS, log_prob_BS = sample(call_keys[call], network.head_logits(loop_params, config, h_BSD))
        put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            a, jnp.where(g_valid, new, take(a, g_start)), g_start, axis=1
        )
        return SamplingState(
            cache=cache,
            tokens_BN=put(state.tokens_BN, tokens_BS),
            log_prob_BN=put(state.log_prob_BN, log_prob_BS),
            num_calls=state.num_calls + 1,
        )

    state = jax.lax.fori_loop(1, table.start_C.shape[0], step, state)
    return state.replace(tokens_BN=state.tokens_BN[:, :length], log_prob_BN=state.log_prob_BN[:, :length])

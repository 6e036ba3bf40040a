"""Decoding in blocks that are chosen: where the model is confident, or in streams that begin at given places.

Blocks may have any places and, up to S, any size, and those of each row are its own. A call has the X rows of the block
before and the G rows of the next one, as in `inference.sampler`; but where a row's block begins in the context depends
on the row.

In the mode "confident", a call with G rows at all places looks first how uncertain each of them is, from everything
that has been drawn. Places whose entropy is at most a threshold become the next block, or the least uncertain place if
there is no such. A second call draws the block, with the probabilities that the parallel forward has under the order
that has come about.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core import network, objective
from armd_jax.core.cache import Cache, put_at
from armd_jax.core.parameters import Params
from armd_jax.core.rows import Rows, neighbours
from armd_jax.core.sizes import padded_vocab
from armd_jax.inference import sampler, schedule
from armd_jax.inference.decoding import Decoding, Request, Weights
from armd_jax.inference.draw import Draw
from armd_jax.inference.generation import Generation, collect
from armd_jax.inference.sampler import Ending, values_at
from armd_jax.inference.schedule import Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChosenState:
    """What the loop carries.

    context_BT, positions_BT, index_BW: int32, as in the schedule, and changed as tokens are drawn; at free places that
        are not drawn yet, index_BW is T.
    log_prob_BT: float32. call_BT: int32, the number (from 1) of the call that made each token, 0: none.
    at_B: int32, context index of the newest token. size_B: int32, how many tokens its block has, whose rows of X are
        in no cache yet.
    blocks: int32 scalar, how many blocks were drawn. call: int32 scalar, how many calls were made. ended_B: bool, all
        False, because what lies behind an end may still be drawn. key_B: random keys, one per row.
    """

    cache: Cache
    context_BT: jax.Array
    positions_BT: jax.Array
    index_BW: jax.Array
    log_prob_BT: jax.Array
    call_BT: jax.Array
    at_B: jax.Array
    size_B: jax.Array
    blocks: jax.Array
    call: jax.Array
    ended_B: jax.Array
    key_B: jax.Array


class Chosen(Decoding[ChosenState]):
    """Texts in blocks that are chosen by the model, or beforehand."""

    in_order = False

    def __init__(
        self, weights: Weights, config: ModelConfig, request: Request, starts: list[np.ndarray] | None = None
    ) -> None:
        """Reads the evidence. starts: the free places of each row where streams begin; None: the model chooses."""
        known_BN = request.known_BN
        if starts is None:
            places_BCS, streams = None, request.streams
            last_B = (np.arange(known_BN.shape[1]) * (known_BN == schedule.FREE)).max(axis=1)
        else:
            places_BCS, last_B = schedule.blocks_from_starts(known_BN, starts)
            streams = places_BCS.shape[2]
        # Behind the last token, a block has room, and so have the keys of a look at all places.
        looks = schedule.width_of(known_BN, config.max_length) if places_BCS is None else 0
        plan = schedule.strided(known_BN, 1, config.max_length, spare=streams + looks)
        rows, width = plan.index_BW.shape
        began = sampler.start(weights.layers, config, plan, request.seed_B, request.stream_B)
        capacity = plan.context_BT.shape[1]
        free_BW = np.zeros((rows, width), bool)
        free_BW[: len(known_BN), : known_BN.shape[1]] = known_BN == schedule.FREE
        evidence = np.arange(capacity) <= int(plan.num_evidence)
        state = ChosenState(
            cache=began.cache,
            context_BT=began.context_BT,
            log_prob_BT=began.log_prob_BT,
            call=began.call,
            ended_B=began.ended_B,
            key_B=began.key_B,
            **jax.device_put(
                dict(
                    positions_BT=np.where(evidence, np.asarray(plan.positions_BT), 0),
                    index_BW=np.where(free_BW, capacity, np.asarray(plan.index_BW)),
                    call_BT=np.zeros((rows, capacity), np.int32),
                    at_B=np.full((rows,), int(plan.num_evidence), np.int32),
                    size_B=np.ones((rows,), np.int32),
                    blocks=np.int32(0),
                )
            ),
        )
        more = (0, rows - len(known_BN))
        if places_BCS is not None:
            places_BCS = np.pad(places_BCS, (more, (0, 0), (0, 0)), constant_values=-1)
        given = free_BW, places_BCS, np.pad(last_B, more).astype(np.int32)
        self._free_BW, self._places_BCS, self._last_B = jax.device_put(given)
        self._streams = streams
        params = weights.loop(2 * rows * streams, rows * streams)
        super().__init__(config, request, plan, params, state)

    def _advance(self, until: int) -> ChosenState:
        return _advance(
            self._params,
            self._config,
            self._plan,
            self._state,
            self._draw,
            self._ending,
            np.int32(until),
            self._free_BW,
            self._places_BCS,
            self._last_B,
            np.float32(self._request.max_entropy),
            streams=self._streams,
        )

    @property
    def finished(self) -> bool:
        """Whether every place is filled."""
        return not bool(np.asarray(_missing(self._plan, self._state)).any())

    def _collect(self) -> Generation:
        known_BN, state = self._request.known_BN, self._state
        made_BN = self._gather(state.call_BT, state.index_BW)
        free_BN, length = known_BN == schedule.FREE, known_BN.shape[1]
        drawn_BN = free_BN & (np.asarray(state.index_BW)[: len(known_BN), :length] < state.context_BT.shape[1])
        call_BN = np.where(drawn_BN, made_BN, np.where(free_BN | (known_BN == schedule.ABSENT), -1, 0))
        return collect(
            known_BN,
            self._gather(state.context_BT, state.index_BW),
            self._gather(state.log_prob_BT, state.index_BW),
            schedule.order_of_calls(known_BN, call_BN),
            call_BN,
            int(state.call),
            self._request.ends,
            in_order=False,
            streams=self._streams,
        )


def _missing(plan: Schedule, state: ChosenState) -> jax.Array:
    """int32 [B]: how many places of each row are still free."""
    return plan.num_evidence + plan.free_B - state.at_B


@functools.partial(jax.jit, static_argnames=("config", "streams"), donate_argnames="state")
def _advance(
    params: Params,
    config: ModelConfig,
    plan: Schedule,
    state: ChosenState,
    draw: Draw,
    ending: Ending,
    until: jax.Array,
    free_BW: jax.Array,
    places_BCS: jax.Array | None,
    last_B: jax.Array,
    max_entropy: jax.Array,
    streams: int,
) -> ChosenState:
    """Draws blocks until all places are filled, or at least `until` calls (int32 scalar) have been made.

    last_B: int32, the place of each row up to which an end-of-text has its bias.
    """

    def unfinished(state: ChosenState) -> jax.Array:
        return (state.call < until) & jnp.any(_missing(plan, state) > 0)

    def step(state: ChosenState) -> ChosenState:
        if places_BCS is None:
            cache, places_BS = _look(params, config, plan, state, free_BW, max_entropy, streams)
            # The keys and values of X are the ones that the second call would write; the sum must not count them twice.
            cache = dataclasses.replace(cache, aggregate=state.cache.aggregate)
            state = dataclasses.replace(state, cache=cache, call=state.call + 1)
        else:
            places_BS = jax.lax.dynamic_index_in_dim(places_BCS, state.blocks, axis=1, keepdims=False)
        return _block(params, config, plan, state, draw, ending, last_B, places_BS)

    return jax.lax.while_loop(unfinished, step, state)


def _rows(
    plan: Schedule,
    state: ChosenState,
    streams: int,
    active_B: jax.Array,
    places_BG: jax.Array,
    g_len_BG: jax.Array,
    g_valid_BG: jax.Array | None = None,
    g_own_BG: jax.Array | None = None,
) -> Rows:
    """The block before as rows of X, and targets at natural places as rows of G, whose keys begin behind it.

    active_B: bool, False at rows with nothing left to draw, whose last block must not be counted again and again.
    """
    start_B1 = (state.at_B - state.size_B + 1)[:, None]
    x_index_BS = start_B1 + jnp.arange(streams)
    strict_BG = jnp.broadcast_to(state.at_B[:, None] + 1, places_BG.shape)
    beside = [neighbours(state.context_BT, state.index_BW, places_BG + offset, strict_BG) for offset in (-1, 1)]
    return Rows(
        x_tokens_BX=values_at(state.context_BT, x_index_BS),
        x_positions_BX=values_at(state.positions_BT, x_index_BS),
        x_len_BX=jnp.broadcast_to(state.at_B[:, None] + 1, x_index_BS.shape),
        g_positions_BG=places_BG + 1,
        g_strict_len_BG=strict_BG,
        g_previous_len_BG=jnp.broadcast_to(start_B1, places_BG.shape),
        g_len_BG=g_len_BG,
        g_left_BG=beside[0],
        g_right_BG=beside[1],
        x_start=start_B1[:, 0],
        g_start=state.at_B,  # keys of G have no start token
        x_valid_BX=(x_index_BS <= state.at_B[:, None]) & active_B[:, None],
        g_valid_BG=g_valid_BG,
        first_B=plan.first_B,
        g_own_BG=g_own_BG,
    )


def _look(
    params: Params,
    config: ModelConfig,
    plan: Schedule,
    state: ChosenState,
    free_BW: jax.Array,
    max_entropy: jax.Array,
    streams: int,
) -> tuple[Cache, jax.Array]:
    """The cache after a call with all places, and the places [B, S] of the next block, in natural order and then -1."""
    batch, width = free_BW.shape
    places_BW = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    own_BW = state.at_B[:, None] + jnp.arange(width)
    # A target sees the keys of G of all earlier blocks, and its own.
    seen_BW = jnp.broadcast_to(state.at_B[:, None], (batch, width))
    active_B = _missing(plan, state) > 0
    rows = _rows(plan, state, streams, active_B, places_BW, seen_BW, g_own_BG=own_BW)
    h_BWD, cache = network.forward(params, config, rows, state.cache)
    assert cache is not None
    candidate_BW = free_BW & (state.index_BW >= state.context_BT.shape[1])
    entropy_BW = jnp.where(candidate_BW, _entropies(params, config, h_BWD), jnp.inf)
    negative_BS, at_BS = jax.lax.top_k(-entropy_BW, min(streams, width))
    taken_BS = (-negative_BS <= max_entropy) | (jnp.arange(at_BS.shape[1]) == 0)
    taken_BS &= jnp.isfinite(negative_BS)
    places_BS = jnp.sort(jnp.where(taken_BS, at_BS, width), axis=1)
    places_BS = jnp.pad(places_BS, ((0, 0), (0, streams - at_BS.shape[1])), constant_values=width)
    return cache, jnp.where(places_BS == width, -1, places_BS).astype(jnp.int32)


def _entropies(params: Params, config: ModelConfig, h_BWD: jax.Array) -> jax.Array:
    """The entropy of the model's law at each place [B, W] in nats. Logits exist for one chunk of places at a time."""
    batch, places, width = h_BWD.shape
    size = min(config.loss_chunk, places) or objective.loss_chunk(batch * padded_vocab(config), places)
    num_chunks = -(-places // size)
    padded = jnp.pad(h_BWD, ((0, 0), (0, num_chunks * size - places), (0, 0)))

    def entropy(h_BcD: jax.Array) -> jax.Array:
        log_BcV = jax.nn.log_softmax(network.head_logits(params, config, h_BcD), axis=-1)
        return -jnp.sum(jnp.where(jnp.isfinite(log_BcV), jnp.exp(log_BcV) * log_BcV, 0), axis=-1)

    found = jax.lax.map(entropy, jnp.moveaxis(padded.reshape(batch, num_chunks, size, width), 1, 0))
    return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :places]


def _block(
    params: Params,
    config: ModelConfig,
    plan: Schedule,
    state: ChosenState,
    draw: Draw,
    ending: Ending,
    last_B: jax.Array,
    places_BS: jax.Array,
) -> ChosenState:
    """Draws the block at natural places [B, S], of which those that are not -1 come first."""
    batch, streams = places_BS.shape
    valid_BS = places_BS >= 0
    count_B = valid_BS.sum(axis=1, dtype=jnp.int32)
    g_len_BS = jnp.broadcast_to((state.at_B + count_B)[:, None], places_BS.shape)
    rows = _rows(plan, state, streams, count_B > 0, jnp.maximum(places_BS, 0), g_len_BS, valid_BS)
    h_BSD, cache = network.forward(params, config, rows, state.cache)
    assert cache is not None
    logits_BSV = network.head_logits(params, config, h_BSD)
    at_end_BSV = (places_BS < last_B[:, None])[..., None] & (jnp.arange(logits_BSV.shape[-1]) == ending.token)
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.blocks)
    tokens_BS = draw(key_B, logits_BSV + jnp.where(at_end_BSV, ending.bias, 0))
    chosen_BS = jnp.take_along_axis(logits_BSV, tokens_BS[..., None], axis=-1)[..., 0]
    log_prob_BS = chosen_BS - jax.nn.logsumexp(logits_BSV, axis=-1)
    behind_B, put = state.at_B + 1, jax.vmap(put_at, (0, 0, 0, None, 0))
    index_BS = behind_B[:, None] + jnp.arange(streams)
    # A place outside of the row takes what is not valid, and drops it.
    where_BS = jnp.where(valid_BS, places_BS, state.index_BW.shape[1])
    return ChosenState(
        cache=cache,
        context_BT=put(state.context_BT, tokens_BS, behind_B, 0, valid_BS),
        positions_BT=put(state.positions_BT, places_BS + 1, behind_B, 0, valid_BS),
        index_BW=state.index_BW.at[jnp.arange(batch)[:, None], where_BS].set(index_BS, mode="drop"),
        log_prob_BT=put(state.log_prob_BT, log_prob_BS, behind_B, 0, valid_BS),
        call_BT=put(state.call_BT, jnp.full_like(tokens_BS, state.call + 1), behind_B, 0, valid_BS),
        at_B=state.at_B + count_B,
        size_B=jnp.where(count_B > 0, count_B, state.size_B),
        blocks=state.blocks + 1,
        call=state.call + 1,
        ended_B=state.ended_B,
        key_B=state.key_B,
    )

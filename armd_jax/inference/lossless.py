"""Lossless parallel decoding: several tokens are drafted at once, checked left to right, and kept as far as they agree.

A call has the X rows of the newest token and of the tokens that are drafted behind it, each in a block of its own, and
G rows of two sorts: those that check the drafts and predict the token after the last, from which the law of
left-to-right decoding comes, and those that draft tokens whose predecessors are not known yet. With S = 3 and drafts
d, e:

    X rows      c    d    e            c is certain
    G rows      d?   e?   f            the laws p of the tokens behind c, d and e
                -    d+1  d+2          drafts if d is refused: the token at its place comes from this call, so that
                                       what follows it is predicted without having seen it
                -    f+1  f+2          drafts if d and e are kept, behind f, likewise

If d is kept and e is refused, nothing is drafted, and the next call draws one token. Rows for all such cases would cost
more than they bring.

A draft is kept with probability min(1, p / q), where q is the law that it was drawn from. The first that is not kept
is drawn anew from (p - q)+, and all behind it are thrown away; if all are kept, one more token is drawn from p. Tokens
then have the law p, whatever q is (Leviathan et al. 2023, Chen et al. 2023). The X rows of what was thrown away lie
behind the prefix that the next call sees, and the next call writes over them.

A drafted token whose left neighbour is unknown gets it in retrospect: see `network.with_left_neighbour`.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core import network
from armd_jax.core.cache import Cache, put_at
from armd_jax.core.parameters import Params
from armd_jax.core.rows import UNSEEN, Rows, neighbours
from armd_jax.core.sizes import padded_vocab
from armd_jax.inference import sampler, schedule
from armd_jax.inference.decoding import Decoding, Request, Weights
from armd_jax.inference.draw import Draw, categorical, noise
from armd_jax.inference.generation import Generation, collect
from armd_jax.inference.sampler import Ending, values_at
from armd_jax.inference.schedule import Schedule

_STREAMS_TO_TRY = (1, 2, 3, 4, 6, 8)  # by `fastest`
_CALLS_OF_A_TRIAL = 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LosslessState:
    """What the loop carries, S - 1 = D.

    context_BT: int32, as in the schedule, with what was drawn and, behind it, drafts.
    log_prob_BT: float32. call_BT: int32, the number (from 1) of the call that made each token, 0: none.
    at_B: int32, context index of the newest token that is certain; its row of X is in no cache yet.
    drafts_B: int32, how many tokens behind it are drafted. law_BDV: float32, the log-probabilities of their laws q.
    call: int32 scalar, how many calls were made. ended_B: bool. key_B: random keys, one per row.
    checked_B, kept_B: int32, how many drafts were checked, and how many were kept.
    """

    cache: Cache
    context_BT: jax.Array
    log_prob_BT: jax.Array
    call_BT: jax.Array
    at_B: jax.Array
    drafts_B: jax.Array
    law_BDV: jax.Array
    call: jax.Array
    ended_B: jax.Array
    key_B: jax.Array
    checked_B: jax.Array
    kept_B: jax.Array


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The G rows of a call with S streams; a case j is that the token at place j behind the newest is the next one.

    case_R, depth_R: int [R], of every drafting row its case (from 0), and how far behind that token it is (from 1).
    first_S, count_S: int [S], by case the number of its first drafting row, and how many there are.
    """

    case_R: np.ndarray
    depth_R: np.ndarray
    first_S: np.ndarray
    count_S: np.ndarray

    @classmethod
    def make(cls, streams: int) -> "_Layout":
        count_S = np.zeros((streams,), int)
        count_S[[0, -1]] = streams - 1
        case_R = np.repeat(np.arange(streams), count_S)
        first_S = np.cumsum(count_S) - count_S
        return cls(case_R, 1 + np.arange(len(case_R)) - first_S[case_R], first_S, count_S)

    @property
    def rows(self) -> int:
        """How many G rows a call has."""
        return len(self.first_S) + len(self.case_R)


class Lossless(Decoding[LosslessState]):
    """Texts written left to right, several tokens per call if the drafts are good."""

    in_order = True

    def __init__(self, weights: Weights, config: ModelConfig, request: Request) -> None:
        """Reads the evidence."""
        streams, known_BN = request.streams, request.known_BN
        layout = _Layout.make(streams)
        self._order, _ = schedule.order_of(known_BN, 1)
        plan = schedule.strided(known_BN, 1, config.max_length, spare=2 * streams + layout.rows)
        rows = len(plan.first_B)
        began = sampler.start(weights.layers, config, plan, request.seed_B, request.stream_B)
        zero_B = np.zeros((rows,), np.int32)
        numbers = jax.device_put(
            dict(
                call_BT=np.zeros(plan.context_BT.shape, np.int32),
                at_B=np.full((rows,), int(plan.num_evidence), np.int32),
                drafts_B=zero_B,
                law_BDV=np.zeros((rows, streams - 1, padded_vocab(config)), np.float32),
                checked_B=zero_B.copy(),
                kept_B=zero_B.copy(),
            )
        )
        state = LosslessState(
            cache=began.cache, context_BT=began.context_BT, log_prob_BT=began.log_prob_BT, call=began.call,
            ended_B=began.ended_B, key_B=began.key_B, **numbers,
        )  # fmt: skip
        self._streams = streams
        self._head = weights.loop(2 * rows, rows)  # drafts are drawn one after another
        params = weights.loop(rows * (streams + layout.rows), rows * layout.rows)
        super().__init__(config, request, plan, params, state)

    def _advance(self, until: int) -> LosslessState:
        return _advance(
            self._params, self._head, self._config, self._plan, self._state, self._draw, self._ending,
            np.int32(until), streams=self._streams,
        )  # fmt: skip

    @property
    def finished(self) -> bool:
        """Whether every text is complete or has ended."""
        return not bool(np.asarray(_going_on(self._plan, self._state)).any())

    def _collect(self) -> Generation:
        known_BN, state, index_BW = self._request.known_BN, self._state, self._plan.index_BW
        made_BN = self._gather(state.call_BT, index_BW)
        out = collect(
            known_BN,
            self._gather(state.context_BT, index_BW),
            self._gather(state.log_prob_BT, index_BW),
            self._order,
            np.where((known_BN == schedule.FREE) & (made_BN == 0), -1, made_BN),
            int(state.call),
            self._request.ends,
            in_order=True,
            streams=self._streams,
        )
        batch = len(known_BN)
        return dataclasses.replace(
            out, drafted=int(state.checked_B[:batch].sum()), accepted=int(state.kept_B[:batch].sum())
        )


def fastest(weights: Weights, config: ModelConfig, request: Request) -> int:
    """The number of streams that writes the beginning of a request at the most tokens per second, by trying each.

    A short run, whose result depends on what else the machine does. The first one of a size compiles its programs.
    """
    speed = {}
    for streams in _STREAMS_TO_TRY:
        tried = dataclasses.replace(request, streams=streams)
        Lossless(weights, config, tried).advance(1)  # compiles
        decoding = Lossless(weights, config, tried)
        began = time.perf_counter()
        made = decoding.advance(_CALLS_OF_A_TRIAL)
        speed[streams] = (made.call_BN > 0).sum() / (time.perf_counter() - began)
    return max(speed, key=lambda streams: speed[streams])


def _going_on(plan: Schedule, state: LosslessState) -> jax.Array:
    """bool [B]: which rows have something left to do."""
    return ~state.ended_B & (state.at_B < plan.num_evidence + plan.free_B)


@functools.partial(jax.jit, static_argnames=("config", "streams"), donate_argnames="state")
def _advance(
    params: Params,
    head: Params,
    config: ModelConfig,
    plan: Schedule,
    state: LosslessState,
    draw: Draw,
    ending: Ending,
    until: jax.Array,
    streams: int,
) -> LosslessState:
    """Calls the network until every row is complete, or `until` calls (int32 scalar) have been made.

    params, head: in the layouts for the rows of a call, and for one row of each text.
    """

    def unfinished(state: LosslessState) -> jax.Array:
        return (state.call < until) & jnp.any(_going_on(plan, state))

    def step(state: LosslessState) -> LosslessState:
        return _call(params, head, config, plan, state, draw, ending, _Layout.make(streams))

    return jax.lax.while_loop(unfinished, step, state)


def _rows(plan: Schedule, state: LosslessState, layout: _Layout) -> Rows:
    """The rows of a call: S of X, and the S that check and then those that draft of G."""
    streams = len(layout.first_S)
    at_B1 = state.at_B[:, None]
    x_index_BS = at_B1 + jnp.arange(streams)
    # How many tokens behind the newest each target is, and how many of them it sees.
    ahead_G = jnp.asarray(np.concatenate([np.arange(streams), layout.case_R + layout.depth_R]))
    seen_G = jnp.asarray(np.concatenate([np.arange(streams), layout.case_R]))
    strict_BG = at_B1 + 1 + seen_G
    g_positions_BG = values_at(plan.positions_BT, at_B1 + 1 + ahead_G)
    beside = [neighbours(state.context_BT, plan.index_BW, g_positions_BG - 1 + offset, strict_BG) for offset in (-1, 1)]
    return Rows(
        x_tokens_BX=values_at(state.context_BT, x_index_BS),
        x_positions_BX=values_at(plan.positions_BT, x_index_BS),
        x_len_BX=x_index_BS + 1,
        g_positions_BG=g_positions_BG,
        g_strict_len_BG=strict_BG,
        g_previous_len_BG=strict_BG - 1,
        g_len_BG=strict_BG,  # a checking row and all before it, of G too
        g_left_BG=beside[0],
        g_right_BG=beside[1],
        x_start=state.at_B,
        g_start=state.at_B,  # keys of G have no start token: a target at index i has key i - 1
        first_B=plan.first_B,
        g_own_BG=at_B1 + jnp.arange(layout.rows),
    )


def _call(
    params: Params,
    head: Params,
    config: ModelConfig,
    plan: Schedule,
    state: LosslessState,
    draw: Draw,
    ending: Ending,
    layout: _Layout,
) -> LosslessState:
    """Checks the drafts of the call before, draws the token behind those that are kept, and drafts what may follow."""
    streams = len(layout.first_S)
    rows = _rows(plan, state, layout)
    h_BGD, cache = network.residual_stream(params, config, rows, state.cache)
    assert cache is not None
    vocab, batch = padded_vocab(config), len(state.at_B)
    # One draw of noise serves the whole call: a token behind those that are kept, the drafts, and whether each is kept.
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.call)
    noise_BSN = noise(key_B, (batch, streams), vocab, more=1)
    logits_BSV = network.head_logits(params, config, network.normed(params, config, h_BGD[:, :streams]))
    kept_B, next_B1 = _check(noise_BSN, state, draw.law(logits_BSV), draw.greedy)
    # The new tokens: those that are kept, the next one, and behind it the drafts of its case.
    old_BD = values_at(state.context_BT, state.at_B[:, None] + 1 + jnp.arange(streams - 1))
    drafts_BD, law_BDV = _draft(head, config, rows, h_BGD, noise_BSN, kept_B, next_B1, draw, layout)
    going_on_B = _going_on(plan, state)
    window = jnp.arange(2 * streams - 1)
    fresh_BW = values_at(jnp.concatenate([next_B1, drafts_BD], axis=1), window - kept_B[:, None])
    kept_BW = jnp.pad(old_BD, ((0, 0), (0, streams)))
    tokens_BW = jnp.where(window < kept_B[:, None], kept_BW, fresh_BW)
    certain_BS = going_on_B[:, None] & (window[:streams] <= kept_B[:, None])
    tokens_BS = tokens_BW[:, :streams]
    chosen_BS = jnp.take_along_axis(logits_BSV, tokens_BS[..., None], axis=-1)[..., 0]
    log_prob_BS = chosen_BS - jax.nn.logsumexp(logits_BSV, axis=-1)
    ended_B = state.ended_B | jnp.any(certain_BS & (tokens_BS == ending.token), axis=1)
    at_B = jnp.where(going_on_B, state.at_B + 1 + kept_B, state.at_B)
    room_B = plan.num_evidence + plan.free_B - at_B
    accepted = dataclasses.replace(rows, x_valid_BX=going_on_B[:, None] & (jnp.arange(streams) <= kept_B[:, None]))
    put = jax.vmap(put_at, (0, 0, 0, None, 0))
    behind_B = state.at_B + 1
    return LosslessState(
        cache=dataclasses.replace(
            cache, aggregate=network.aggregate_after(params, config, accepted, state.cache.aggregate)
        ),
        context_BT=put(
            state.context_BT, tokens_BW, behind_B, 0, jnp.broadcast_to(going_on_B[:, None], tokens_BW.shape)
        ),
        log_prob_BT=put(state.log_prob_BT, log_prob_BS, behind_B, 0, certain_BS),
        call_BT=put(state.call_BT, jnp.full_like(tokens_BS, state.call + 1), behind_B, 0, certain_BS),
        at_B=at_B,
        drafts_B=jnp.clip(jnp.asarray(layout.count_S)[kept_B], 0, room_B).astype(jnp.int32),
        law_BDV=law_BDV,
        call=state.call + 1,
        ended_B=ended_B,
        key_B=state.key_B,
        checked_B=state.checked_B + jnp.where(going_on_B, state.drafts_B, 0),
        kept_B=state.kept_B + jnp.where(going_on_B, kept_B, 0),
    )


def _check(noise_BSN: jax.Array, state: LosslessState, law_BSV: jax.Array, greedy: bool) -> tuple[jax.Array, jax.Array]:
    """How many drafts are kept [B], and the token behind them [B, 1]. law_BSV: the log-probabilities p."""
    num_drafts = law_BSV.shape[1] - 1
    place_D = jnp.arange(num_drafts)
    drafted_BD = place_D < state.drafts_B[:, None]
    tokens_BD = values_at(state.context_BT, state.at_B[:, None] + 1 + place_D)
    take = lambda law: jnp.take_along_axis(law, tokens_BD[..., None], axis=-1)[..., 0]  # noqa: E731
    ratio_BD = take(law_BSV[:, :num_drafts]) - take(state.law_BDV)
    # If g is Gumbel noise, exp(-exp(-g)) is uniform.
    passes_BD = drafted_BD & (-jnp.exp(-noise_BSN[:, :num_drafts, -1]) < ratio_BD)
    kept_B = jnp.sum(jnp.cumprod(passes_BD, axis=1, dtype=jnp.int32), axis=1)
    at_B11 = kept_B[:, None, None]
    p_B1V = jnp.take_along_axis(law_BSV, at_B11, axis=1)
    if not num_drafts:
        residual_B1V = p_B1V
    else:
        q_B1V = jnp.take_along_axis(state.law_BDV, jnp.minimum(at_B11, num_drafts - 1), axis=1)
        refused_B11 = (kept_B < state.drafts_B)[:, None, None]
        rest_B1V = jnp.maximum(jnp.exp(p_B1V) - jnp.where(refused_B11, jnp.exp(q_B1V), 0), 0)
        # Rounding may leave nothing of two laws that are all but equal.
        some_B11 = jnp.sum(rest_B1V, axis=-1, keepdims=True) > 0
        residual_B1V = jnp.where(some_B11 & refused_B11, jnp.log(rest_B1V), p_B1V)
    if greedy:
        return kept_B, jnp.argmax(residual_B1V, axis=-1).astype(jnp.int32)
    return kept_B, categorical(noise_BSN[:, :1], residual_B1V)


def _draft(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    h_BGD: jax.Array,
    noise_BSN: jax.Array,
    kept_B: jax.Array,
    next_B1: jax.Array,
    draw: Draw,
    layout: _Layout,
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, D] behind the next one, and the log-probabilities [B, D, V] that they were drawn with."""
    streams = len(layout.first_S)
    drafts, laws, previous_B1 = [], [], next_B1
    for number in range(streams - 1):
        at_B1 = streams + jnp.asarray(layout.first_S)[kept_B][:, None] + number
        h_B1D = jnp.take_along_axis(h_BGD, at_B1[..., None], axis=1, mode="clip")
        seen_B1 = jnp.take_along_axis(rows.g_left_BG, at_B1, axis=1, mode="clip") != UNSEEN
        known_B1D = network.with_left_neighbour(params, config, h_B1D, previous_B1)
        h_B1D = jnp.where(seen_B1[..., None], h_B1D, known_B1D)
        law_B1V = draw.law(network.head_logits(params, config, network.normed(params, config, h_B1D)))
        if draw.greedy:
            previous_B1 = jnp.argmax(law_B1V, axis=-1).astype(jnp.int32)
        else:
            previous_B1 = categorical(noise_BSN[:, number + 1 : number + 2], law_B1V)
        drafts.append(previous_B1)
        laws.append(law_B1V)
    if not drafts:
        batch, vocab = len(kept_B), padded_vocab(config)
        return jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, vocab), jnp.float32)
    return jnp.concatenate(drafts, axis=1), jnp.concatenate(laws, axis=1)

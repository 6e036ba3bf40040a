"""`LanguageModel`: parameters, config and tokenizer with the operations a user wants of them."""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax import typed
from armd_jax.config import ModelConfig, check_model
from armd_jax.core import parameters
from armd_jax.core.kernels.panels import few_rows
from armd_jax.core.order import Order
from armd_jax.core.parameters import Params
from armd_jax.core.sizes import activation_dtype
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.inference import denoise, likelihood, requests, schedule
from armd_jax.inference import sampler as strided
from armd_jax.inference.draw import Draw
from armd_jax.inference.requests import Ids, PerRow
from armd_jax.names import DenoisingSampler

NO_END = -1  # in place of an end-of-text token, if there is none

# Each compiled as one program, and not as one for every shape of a parameter.
_unstack = jax.jit(parameters.unstack)
_in_panels = jax.jit(parameters.in_panels, static_argnums=(1, 2))


@flax.struct.dataclass
class Generation:
    """What `LanguageModel.generate` returns. Arrays are at natural positions.

    tokens_BN: int32.
    log_prob_BN: float32, the model's log-probability of each token given all earlier blocks, at evidence positions too,
        and 0 where there is no token (`call_BN` is -1). It is the model's own, before temperature and truncation, and
        equal to `lm.log_prob(tokens_BN, order)` up to rounding, because a cache adds up the same numbers in another
        order: measured differences are up to 3e-6 nats in float32 and up to 0.022 nats if activations are bfloat16 (the
        default on accelerators). None for a denoiser, which gives no probability to a text.
    order: the order that was used; None for a denoiser, whose calls `call_BN` tells.
    num_calls: the number of function evaluations (NFE), that is of network calls that drew tokens. Evidence is read
        before them, in calls of many tokens, which are not counted.
    call_BN: int32, the number (from 1) of the call that made each token; 0 at evidence, -1 where no token was asked for
        or made: behind the end of a shorter row, and in one stream behind an end-of-text.
    end_B: int32, where each text ends: the position of the first end-of-text that was generated, and the row's length
        if there is none. Tokens behind it are no part of the text.
    """

    tokens_BN: np.ndarray
    log_prob_BN: np.ndarray | None
    order: Order | None
    num_calls: int
    call_BN: np.ndarray
    end_B: np.ndarray


def _lengths(known_BN: np.ndarray) -> np.ndarray:
    """int32 [B]: how many positions each row has."""
    return (known_BN != schedule.ABSENT).sum(axis=1).astype(np.int32)


def _ends(tokens_BN: np.ndarray, known_BN: np.ndarray, end: int) -> np.ndarray:
    """int32 [B]: the position of the first generated end-of-text of each row, or its length."""
    ends_BN = (known_BN == schedule.FREE) & (tokens_BN == end)
    return np.where(ends_BN.any(axis=1), ends_BN.argmax(axis=1), _lengths(known_BN)).astype(np.int32)


def _generation(
    known_BN: np.ndarray,
    tokens_BN: np.ndarray,
    log_prob_BN: np.ndarray,
    order: Order,
    call_BN: np.ndarray,
    num_calls: int,
    end: int,
    streams: int,
) -> Generation:
    """What was generated, all at natural positions, with what the fields say at places where nothing was."""
    end_B = _ends(tokens_BN, known_BN, end)
    absent_BN = known_BN == schedule.ABSENT
    if streams == 1:
        # What an end in one stream left undrawn. With several streams, all places are drawn.
        absent_BN = absent_BN | (known_BN == schedule.FREE) & (np.arange(known_BN.shape[1]) > end_B[:, None])
    return Generation(
        np.where(absent_BN, max(end, 0), tokens_BN).astype(np.int32),
        np.where(absent_BN, np.float32(0), log_prob_BN),
        order,
        num_calls,
        np.where(absent_BN, -1, call_BN),
        end_B,
    )


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model that is ready to score and to generate. `params` is the plain nested dict of `core.parameters.init`."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None

    @classmethod
    def create(cls, config: ModelConfig, seed: int = 0) -> "LanguageModel":
        """An untrained model. Raises UserError if the config is impossible."""
        check_model(config)
        if config.vocab_size < 1:
            raise UserError(f"model.vocab_size={config.vocab_size}: must be at least 1")
        return cls(config, jax.jit(parameters.init, static_argnums=1)(jax.random.key(seed), config))

    def replace(self, params: Params) -> "LanguageModel":
        """A copy with other parameters."""
        return dataclasses.replace(self, params=params)

    @functools.cached_property
    def _layers(self) -> Params:
        return _unstack(self.params)

    @functools.cached_property
    def _panels(self) -> dict[tuple[bool, bool], Params]:
        """What `parameters.in_panels` gave, by its switches.

        A plain dict: a cached function of `self` would be a circle, which keeps all arrays until Python looks for such.
        """
        return {}

    def _loop_params(self, rows: int) -> Params | None:
        """Parameters in the layout for calls with this many rows of each stream; None: the ordinary layout."""
        few = few_rows(2 * rows), few_rows(rows)
        in_float32 = activation_dtype(self.config) == jnp.float32
        if not (any(few) and in_float32 and jax.default_backend() == "cpu"):
            return None
        if few not in self._panels:
            self._panels[few] = _in_panels(self.params, *few)
        return self._panels[few]

    def logits(self, tokens_BN: np.ndarray | jax.Array, order: Order) -> jax.Array:
        """Logits [B, N, V] float32 at natural positions: row j scores the token at position j given earlier blocks.

        Raises UserError if the model is a denoiser.
        """
        self._check_has_orders("logits")
        return self._score(likelihood.logits, tokens_BN, order)

    def log_prob(self, tokens_BN: np.ndarray | jax.Array, order: Order) -> jax.Array:
        """[B, N] float32, nats, at natural positions. The sum over a row is log p(tokens) under the order.

        Raises UserError if the model is a denoiser.
        """
        self._check_has_orders("log_prob")
        return self._score(likelihood.log_prob, tokens_BN, order)

    def generate(
        self,
        batch: int | None = None,
        length: PerRow | None = None,
        streams: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        prompt: Ids | None = None,
        evidence_BN: Ids | None = None,
        seed: PerRow = 0,
        sampler: DenoisingSampler | None = None,
        steps: int | None = None,
        max_new_tokens: PerRow | None = None,
        stop_at_end: bool = True,
    ) -> Generation:
        """Samples a batch of texts, each of which may have a prompt, known places and a length of its own.

        The result of a row does not depend on the other rows, up to rounding. Sizes are rounded up to a few, so that
        texts of other lengths need no new compilation.

        batch: number of texts; default: as many as the other arguments have rows.
        length: tokens of each text, with what is known; a number, or one per text. Default: that of `evidence_BN`, or
            the model's max_length.
        streams: number of parallel streams S of an ARMD. R tokens are drawn by S + ceil(R / S) - 1 network calls. If a
            text has fewer free places than S, it has as many streams as places.
        temperature: 0 takes the likeliest token. top_k, top_p: see `inference.draw`.
        prompt: token ids to begin with: [P] for all texts, or a list of ids for each.
        evidence_BN: known ids, and -1 where to generate: [N] for all texts, or such a list for each.
        seed: a number, or one per text. With one number, text b has the b-th random numbers of it; a text with a seed
            of its own is what `generate` with one text and this seed gives.
        sampler, steps: of a denoiser, see `inference.denoise`; by default first_hitting, and one step per token. All
            texts have to know the same places.
        max_new_tokens: instead of a length, how many tokens follow each prompt.
        stop_at_end: whether the end-of-text token ends a text (see `Generation.end_B`); in one stream, nothing is drawn
            after it.
        Raises UserError if the arguments do not fit one another.
        """
        config = self.config
        draw = Draw.make(temperature, top_k, top_p)
        asked = (batch, length, prompt, evidence_BN, max_new_tokens, seed)
        known_BN = requests.known_rows(config.max_length, config.vocab_size, *asked)
        seed_B, stream_B = requests.seeds(seed, len(known_BN))
        end = self.tokenizer.end_of_text if stop_at_end and self.tokenizer is not None else NO_END
        if not config.has_orders:
            if streams != 1:
                raise UserError(f"streams={streams}: a denoiser has no streams; choose sampler and steps instead")
            if np.ndim(seed):
                raise UserError("seed: a denoiser (model.kind) takes one number for all texts")
            return self._denoise(known_BN, draw, int(seed_B[0]), sampler or "first_hitting", steps, end)
        if sampler is not None or steps is not None:
            raise UserError("sampler and steps belong to a denoiser (model.kind); choose streams instead")
        if streams < 1:
            raise UserError(f"streams={streams}: must be at least 1")
        order, call_BN = schedule.order_of(known_BN, streams)
        if not call_BN.any():  # nothing to generate: no call, only the score that every position is promised
            tokens_BN = np.maximum(known_BN, 0).astype(np.int32)
            log_prob_BN = np.asarray(self.log_prob(tokens_BN, order))
            return _generation(known_BN, tokens_BN, log_prob_BN, order, call_BN, 0, end, streams)
        plan = schedule.strided(known_BN, streams, config.max_length)
        rows = len(plan.first_B)
        pad = (0, rows - len(known_BN))
        state = strided.begin(self._layers, config, plan, np.pad(seed_B, pad), np.pad(stream_B, pad))
        loop_params = self._loop_params(rows * streams) or self._layers
        state = strided.advance(loop_params, config, plan, state, draw, np.int32(end), plan.num_calls)
        batch, length = known_BN.shape
        index_BN = np.minimum(np.asarray(plan.index_BW)[:batch, :length], plan.context_BT.shape[1] - 1)
        tokens_BN, log_prob_BN = (
            np.take_along_axis(np.asarray(a)[:batch], index_BN, axis=1) for a in (state.context_BT, state.log_prob_BT)
        )
        return _generation(known_BN, tokens_BN, log_prob_BN, order, call_BN, int(state.call), end, streams)

    def _denoise(
        self,
        known_BN: np.ndarray,
        draw: Draw,
        seed: int,
        sampler: DenoisingSampler,
        steps: int | None,
        end: int,
    ) -> Generation:
        typed.check_choice(DenoisingSampler, sampler, "sampler")
        known_N = known_BN[0] >= 0
        if ((known_BN >= 0) != known_N).any() or (known_BN == schedule.ABSENT).any():
            raise UserError("a denoiser (model.kind) takes texts of one length that know the same places")
        tokens_BN = np.maximum(known_BN, 0).astype(np.int32)
        key = jax.random.key(seed)
        out = denoise.generate(self._layers, self.config, key, tokens_BN, known_N, draw, sampler, steps)
        return Generation(out.tokens_BN, None, None, out.num_calls, out.call_BN, _ends(out.tokens_BN, known_BN, end))

    def _check_has_orders(self, what: str) -> None:
        if not self.config.has_orders:
            raise UserError(f"{what}: a denoiser (model.kind) scores no order; armd eval reports its bound (ELBO)")

    def _score(self, score: Callable[..., jax.Array], tokens_BN: np.ndarray | jax.Array, order: Order) -> jax.Array:
        """A function of `likelihood` for tokens and an order, whose sizes are rounded up so that few are compiled.

        Positions that are added come last in the order, where no other sees them.
        """
        tokens_BN = requests.whole_numbers("tokens", tokens_BN)
        if tokens_BN.ndim != 2:
            raise UserError(f"tokens: expected [B, N], got shape {tokens_BN.shape}")
        if tokens_BN.shape != order.shape:
            raise UserError(f"tokens have shape {tokens_BN.shape}, but the order was made for {order.shape}")
        if tokens_BN.shape[1] > self.config.max_length:
            raise UserError(f"length {tokens_BN.shape[1]} exceeds the model's max_length={self.config.max_length}")
        requests.check_ids("tokens", tokens_BN, low=0, vocab_size=self.config.vocab_size)
        batch, length = tokens_BN.shape
        rows, width = schedule.round_up(batch), schedule.round_up(length, self.config.max_length)
        padded = schedule.pad(order, rows, width)
        tokens = np.pad(tokens_BN.astype(np.int32), ((0, rows - batch), (0, width - length)))
        return score(self.params, self.config, tokens, padded)[:batch, :length]

"""`LanguageModel`: parameters, config and tokenizer with the operations a user wants of them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypedDict, TypeVar, Unpack, assert_never

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
from armd_jax.inference import denoise, generation, likelihood, requests, schedule
from armd_jax.inference.chosen import Chosen
from armd_jax.inference.decoding import Decoding, Request, Weights
from armd_jax.inference.draw import Draw
from armd_jax.inference.generation import NO_END, Ends, Generation
from armd_jax.inference.lossless import Lossless, fastest
from armd_jax.inference.requests import Ids, PerRow
from armd_jax.inference.strided import Strided
from armd_jax.names import DecodingMode, DenoisingSampler

MAX_ENTROPY = 1.0  # nats
_T = TypeVar("_T")

# Each compiled as one program, and not as one for every shape of a parameter.
_unstack = jax.jit(parameters.unstack)
_in_panels = jax.jit(parameters.in_panels, static_argnums=(1, 2))


class How(TypedDict, total=False):
    """How `LanguageModel.generate` draws texts.

    prompt: token ids to begin with: [P] for all texts, or a list of ids for each.
    evidence_BN: known ids, and -1 where to generate: [N] for all texts, or such a list for each.
    max_new_tokens: instead of a length, how many tokens follow each prompt.
    mode: "strided" (default): S streams side by side, at equal distances (paper section on SBP). "lossless": left to
        right, with the probabilities of one stream, but several tokens per call if drafts of them prove right (see
        `inference.lossless`). "confident": in each step the places whose entropy is at most `max_entropy`, and at least
        one; a step takes two calls (see `inference.chosen`).
    streams: S of the mode, 1 by default. Strided: R tokens are drawn by S + ceil(R / S) - 1 network calls. If a text
        has fewer free places than S, it has as many streams as places. Lossless: S - 1 tokens at most are drafted;
        "auto" takes the fastest S of a short run at the first use, which `Generation.streams` tells.
        Confident: at most S tokens are drawn in a step.
    starts: with mode strided, in place of `streams`: the free positions where streams begin, for all texts or for each;
        "gaps": a stream for each gap. The first free position always begins one. A stream goes up to the next.
    max_entropy: of mode confident, in nats; default: 1.
    temperature: 0 takes the likeliest token. top_k, top_p: see `inference.draw`. Temperature and top_p may be one
        number per text.
    seed: a number, or one per text. With one number, text b has the b-th random numbers of it; a text with a seed of
        its own is what `generate` with one text and this seed gives.
    stop_at_end: whether the end-of-text token ends a text (see `Generation.end_B`); default: yes. If texts are written
        left to right, as in one stream, nothing is drawn after it. With several streams, all places are drawn, and an
        end inside a stream ends the text there, however good the streams behind it are.
    end_bias: nats that are added to the logit of the end-of-text token in all streams but the last, where an end would
        cut off what the others write, and in mode confident at all places but the last; -inf bans it there.
        `log_prob_BN` stays the model's own.
    stop: strings that end a text, if they occur in a stretch of generated tokens. Left to right, nothing more is drawn
        then.
    sampler, steps: of a denoiser, see `inference.denoise`; by default first_hitting, and one step per token. All texts
        have to know the same places.
    """

    prompt: Ids | None
    evidence_BN: Ids | None
    max_new_tokens: PerRow | None
    mode: DecodingMode
    streams: int | Literal["auto"]
    starts: Literal["gaps"] | Ids | None
    max_entropy: float
    temperature: float | Sequence[float]
    top_k: int | None
    top_p: float | Sequence[float] | None
    seed: PerRow
    stop_at_end: bool
    end_bias: float
    stop: str | Sequence[str]
    sampler: DenoisingSampler | None
    steps: int | None


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

    @functools.cached_property
    def _fastest(self) -> dict[str, int]:
        """What `lossless.fastest` found, by number of texts and how they are drawn."""
        return {}

    def _loop_params(self, rows: int, g_rows: int) -> Params:
        """The layout for calls with so many rows in both streams together, and in stream G."""
        few = few_rows(rows), few_rows(g_rows)
        in_float32 = activation_dtype(self.config) == jnp.float32
        if not (any(few) and in_float32 and jax.default_backend() == "cpu"):
            return self._layers
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

    def log_prob_and_greedy(self, tokens_BN: np.ndarray | jax.Array, order: Order) -> tuple[jax.Array, jax.Array]:
        """`log_prob`, and bool [B, N]: whether each token is the likeliest one given all earlier blocks.

        If it is, greedy decoding in this order draws it after the same tokens. Raises UserError if the model is a
        denoiser.
        """
        self._check_has_orders("log_prob_and_greedy")
        return self._score(likelihood.log_prob_and_greedy, tokens_BN, order)

    def log_prob_and_hidden(self, tokens_BN: np.ndarray | jax.Array, order: Order) -> tuple[jax.Array, jax.Array]:
        """`log_prob`, and [B, N, D] float32: the final hidden state that each token is predicted from.

        Raises UserError if the model is a denoiser.
        """
        self._check_has_orders("log_prob_and_hidden")
        return self._score(likelihood.log_prob_and_hidden, tokens_BN, order)

    def generate(self, batch: int | None = None, length: PerRow | None = None, **how: Unpack[How]) -> Generation:
        """Samples a batch of texts, each of which may have a prompt, known places and a length of its own.

        The result of a row does not depend on the other rows, up to rounding. Sizes are rounded up to a few, so that
        texts of other lengths need no new compilation.

        batch: number of texts; default: as many as the other arguments have rows.
        length: tokens of each text, with what is known; a number, or one per text. Default: that of `evidence_BN`, or
            the model's max_length.
        how: see `How`.
        Raises UserError if the arguments do not fit one another.
        """
        made = self._begin(batch, length, how)
        return made if isinstance(made, Generation) else made.advance()

    def generate_stream(
        self, batch: int | None = None, length: PerRow | None = None, **how: Unpack[How]
    ) -> Iterator[Generation]:
        """What `generate` returns, after every network call: what there is then, with `call_BN` -1 at what is missing.

        The last item is what `generate` returns; only with `stop`, which is looked for after every call here and after
        every 16th there, its `num_calls` may be smaller. Tokens of the newest call are those whose `call_BN` is
        `num_calls`. With a denoiser, whose calls are one program, there is one item. Whoever stops asking saves the
        calls that are left. Raises UserError, before the first item, if the arguments do not fit one another.
        """
        made = self._begin(batch, length, how)

        def items() -> Iterator[Generation]:
            if isinstance(made, Generation):
                yield made
                return
            while not made.finished:
                yield made.advance(1)

        return items()

    def texts(self, made: Generation) -> list[str]:
        """The text of every row up to its end, what was given included, without a stop string that ended it.

        Raises UserError if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("texts: this model has no tokenizer")
        return generation.texts(made, self.tokenizer)

    def _begin(self, batch: int | None, length: PerRow | None, how: How) -> Generation | Decoding[Any]:
        """Texts to be written call by call, or whole ones if there is nothing to write or a denoiser writes them."""
        config = self.config
        if unknown := set(how) - How.__annotations__.keys():
            raise TypeError(f"generate() has no argument {sorted(unknown)[0]!r}")
        requests.check_types(how)
        draw = Draw.make(how.get("temperature", 1.0), how.get("top_k"), how.get("top_p"))
        seed, mode, streams = how.get("seed", 0), how.get("mode", "strided"), how.get("streams", 1)
        asked = (batch, length, how.get("prompt"), how.get("evidence_BN"), how.get("max_new_tokens"), seed)
        known_BN = requests.known_rows(config.max_length, config.vocab_size, *asked)
        requests.check_rows(draw, len(known_BN))
        seed_B, stream_B = requests.seeds(seed, len(known_BN))
        ends = self._ends(how)
        if not config.has_orders:
            if streams != 1:
                raise UserError(f"streams={streams}: a denoiser has no streams; choose sampler and steps instead")
            for name in ("starts", "end_bias"):
                if how.get(name):
                    raise UserError(f"{name}={how.get(name)}: belongs to an ARMD; a denoiser has no streams")
            if mode != "strided":
                raise UserError(f"mode={mode!r}: a denoiser has no modes; choose sampler and steps instead")
            if np.ndim(seed):
                raise UserError("seed: a denoiser (model.kind) takes one number for all texts")
            sampler = how.get("sampler") or "first_hitting"
            return self._denoise(known_BN, draw, int(seed_B[0]), sampler, how.get("steps"), ends)
        if how.get("sampler") is not None or how.get("steps") is not None:
            raise UserError("sampler and steps belong to a denoiser (model.kind); choose streams instead")
        typed.check_choice(DecodingMode, mode, "mode")
        if streams != "auto" and streams < 1:
            raise UserError(f"streams={streams}: must be at least 1")
        if streams == "auto" and mode != "lossless":
            raise UserError("streams='auto': belongs to mode='lossless'; other modes write other texts with other S")
        number = 1 if streams == "auto" else streams
        if not (known_BN == schedule.FREE).any():  # no call, only the score that every position is promised
            order, call_BN = schedule.order_of(known_BN, 1)
            tokens_BN = np.maximum(known_BN, 0).astype(np.int32)
            log_prob_BN = np.asarray(self.log_prob(tokens_BN, order))
            return generation.collect(known_BN, tokens_BN, log_prob_BN, order, call_BN, 0, ends, True, number)
        weights = Weights(self._layers, self._loop_params)
        bias, max_entropy = how.get("end_bias", 0.0), how.get("max_entropy", MAX_ENTROPY)
        request = Request(known_BN, seed_B, stream_B, number, draw, ends, bias, max_entropy)
        if streams == "auto":
            # The speed depends on how many texts there are, and on how often drafts are kept.
            case = f"{schedule.round_up(len(known_BN))} {jax.device_get(draw)}"
            if case not in self._fastest:
                self._fastest[case] = fastest(weights, config, request)
            request = dataclasses.replace(request, streams=self._fastest[case])
        starts = how.get("starts")
        if starts is not None and (mode != "strided" or "streams" in how):
            raise UserError("starts: belongs to mode='strided', in place of a number of streams")
        match mode:
            case "strided" if starts is not None:
                return Chosen(weights, config, request, requests.stream_starts(known_BN, starts))
            case "strided":
                return Strided(weights, config, request)
            case "lossless":
                return Lossless(weights, config, request)
            case "confident":
                return Chosen(weights, config, request)
            case _:
                assert_never(mode)

    def _ends(self, how: How) -> Ends:
        """What ends a text."""
        stop = how.get("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if stop and self.tokenizer is None:
            raise UserError("stop: this model has no tokenizer, so that there is no text to look for it")
        if not all(stop):
            raise UserError("stop: an empty text would end every text")
        stops_at_end = how.get("stop_at_end", True) and self.tokenizer is not None
        return Ends(self.tokenizer.end_of_text if stops_at_end and self.tokenizer else NO_END, stop, self.tokenizer)

    def _denoise(
        self,
        known_BN: np.ndarray,
        draw: Draw,
        seed: int,
        sampler: DenoisingSampler,
        steps: int | None,
        ends: Ends,
    ) -> Generation:
        typed.check_choice(DenoisingSampler, sampler, "sampler")
        known_N = known_BN[0] >= 0
        if ((known_BN >= 0) != known_N).any() or (known_BN == schedule.ABSENT).any():
            raise UserError("a denoiser (model.kind) takes texts of one length that know the same places")
        tokens_BN = np.maximum(known_BN, 0).astype(np.int32)
        key = jax.random.key(seed)
        out = denoise.generate(self._layers, self.config, key, tokens_BN, known_N, draw, sampler, steps)
        made = out.tokens_BN, None, None, out.call_BN, out.num_calls
        return generation.collect(known_BN, *made, ends, in_order=False)

    def _check_has_orders(self, what: str) -> None:
        if not self.config.has_orders:
            raise UserError(f"{what}: a denoiser (model.kind) scores no order; armd eval reports its bound (ELBO)")

    def _score(self, score: Callable[..., _T], tokens_BN: np.ndarray | jax.Array, order: Order) -> _T:
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
        found = score(self.params, self.config, tokens, padded)
        return jax.tree.map(lambda each: each[:batch, :length], found)

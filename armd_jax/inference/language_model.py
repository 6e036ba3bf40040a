"""`LanguageModel`: parameters, config and tokenizer with the operations a user wants of them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax import typed
from armd_jax.config import ModelConfig, check_model
from armd_jax.core import objective, parameters
from armd_jax.core import order as orders
from armd_jax.core.kernels.panels import few_rows
from armd_jax.core.order import Order
from armd_jax.core.parameters import Params
from armd_jax.core.sizes import activation_dtype
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.inference import denoise, likelihood, schedule
from armd_jax.inference import sampler as strided
from armd_jax.inference.draw import Draw
from armd_jax.names import DenoisingSampler

_in_panels = jax.jit(parameters.in_panels, static_argnums=(1, 2))


@flax.struct.dataclass
class Generation:
    """What `LanguageModel.generate` returns. Arrays are at natural positions.

    tokens_BN: int32.
    log_prob_BN: float32, the model's log-probability of each token given all earlier blocks, at evidence positions too.
        It is the model's own, before temperature and truncation, and equal to `lm.log_prob(tokens_BN, order)` up to
        rounding, because a cache adds up the same numbers in another order: measured differences are up to 3e-6 nats in
        float32 and up to 0.022 nats if activations are bfloat16 (the default on accelerators). None for a denoiser,
        which gives no probability to a text.
    order: the order that was used; None for a denoiser, whose calls `call_BN` tells.
    num_calls: the number of function evaluations (NFE), that is of network calls.
    call_BN: int32, the number (from 1) of the call that made each token; 0 at evidence.
    """

    tokens_BN: np.ndarray
    log_prob_BN: np.ndarray | None
    order: Order | None
    num_calls: int
    call_BN: np.ndarray


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
        return parameters.unstack(self.params)

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
        return likelihood.logits(self.params, self.config, self._check(tokens_BN, order), order)

    def log_prob(self, tokens_BN: np.ndarray | jax.Array, order: Order) -> jax.Array:
        """[B, N] float32, nats, at natural positions. The sum over a row is log p(tokens) under the order.

        Raises UserError if the model is a denoiser.
        """
        self._check_has_orders("log_prob")
        return likelihood.log_prob(self.params, self.config, self._check(tokens_BN, order), order)

    def generate(
        self,
        batch: int = 1,
        length: int | None = None,
        streams: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        prompt: Sequence[int] | np.ndarray | None = None,
        evidence_BN: np.ndarray | None = None,
        seed: int = 0,
        sampler: DenoisingSampler | None = None,
        steps: int | None = None,
    ) -> Generation:
        """Samples `batch` sequences of `length` tokens (default: the model's max_length).

        streams: number of parallel streams S of an ARMD. The number of network calls is S + N/S - 1, or
            S + ceil(R/S) - 1 with evidence and R positions to generate.
        sampler, steps: of a denoiser, see `inference.denoise`; by default first_hitting, and one step per token.

        prompt: token ids [P] or [B, P].
        evidence_BN: int32 [B, length] (or [length]), known ids, and -1 where to generate; the same places in every row.
        temperature: 0 takes the likeliest token.
        Raises UserError if the arguments do not fit one another.
        """
        length = self.config.max_length if length is None else length
        self.check_shape(batch, length, seed)
        draw = Draw.make(temperature, top_k, top_p)
        known_BN = self._evidence(batch, length, prompt, evidence_BN)
        known_N = known_BN[0] >= 0
        if ((known_BN >= 0) != known_N).any():
            raise UserError("evidence_BN: the places to generate (-1) must be the same in every row")
        if not self.config.has_orders:
            if streams != 1:
                raise UserError(f"streams={streams}: a denoiser has no streams; choose sampler and steps instead")
            return self._denoise(known_BN, draw, seed, sampler or "first_hitting", steps)
        if sampler is not None or steps is not None:
            raise UserError("sampler and steps belong to a denoiser (model.kind); choose streams instead")
        orders.check_streams(length, streams, int((~known_N).sum()))
        plan = schedule.strided(batch, length, streams, known_N)
        order = plan.order
        if plan.num_evidence == length:  # nothing to generate: no call, only the score that every position is promised
            tokens_BN = known_BN.astype(np.int32)
            log_prob_BN = np.asarray(self.log_prob(tokens_BN, order))
            return Generation(tokens_BN, log_prob_BN, order, 0, np.zeros_like(tokens_BN))
        generated_BN = jnp.take_along_axis(jnp.asarray(np.maximum(known_BN, 0), jnp.int32), order.positions_BN, axis=1)
        loop_params = self._loop_params(batch * streams)
        key = jax.random.key(seed)
        state = strided.generate(self._layers, self.config, key, generated_BN, plan, draw, loop_params)
        tokens_BN, log_prob_BN, call_BN = (
            np.asarray(objective.to_natural(order, a)) for a in (state.tokens_BN, state.log_prob_BN, plan.call_BN)
        )
        return Generation(tokens_BN, log_prob_BN, order, int(state.num_calls), call_BN)

    def _denoise(
        self, known_BN: np.ndarray, draw: Draw, seed: int, sampler: DenoisingSampler, steps: int | None
    ) -> Generation:
        typed.check_choice(DenoisingSampler, sampler, "sampler")
        tokens_BN, known_N = np.maximum(known_BN, 0).astype(np.int32), known_BN[0] >= 0
        key = jax.random.key(seed)
        out = denoise.generate(self._layers, self.config, key, tokens_BN, known_N, draw, sampler, steps)
        return Generation(out.tokens_BN, None, None, out.num_calls, out.call_BN)

    def _check_has_orders(self, what: str) -> None:
        if not self.config.has_orders:
            raise UserError(f"{what}: a denoiser (model.kind) scores no order; armd eval reports its bound (ELBO)")

    @staticmethod
    def _whole_numbers(name: str, ids: Sequence[Any] | np.ndarray | jax.Array) -> np.ndarray:
        try:
            ids = np.asarray(ids)
        except ValueError as error:
            raise UserError(f"{name}: its rows differ in length") from error
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise UserError(
                f"{name}: expected token ids, whole numbers (lm.tokenizer.encode gives a text's), got {ids.dtype}"
            )
        return ids.astype(np.int64)

    def _check(self, tokens_BN: np.ndarray | jax.Array, order: Order) -> jax.Array:
        tokens_BN = self._whole_numbers("tokens", tokens_BN)
        if tokens_BN.ndim != 2:
            raise UserError(f"tokens: expected [B, N], got shape {tokens_BN.shape}")
        if tokens_BN.shape != order.shape:
            raise UserError(f"tokens have shape {tokens_BN.shape}, but the order was made for {order.shape}")
        if tokens_BN.shape[1] > self.config.max_length:
            raise UserError(f"length {tokens_BN.shape[1]} exceeds the model's max_length={self.config.max_length}")
        self._check_ids("tokens", tokens_BN, low=0)
        return jnp.asarray(tokens_BN, jnp.int32)

    def _check_ids(self, name: str, ids: np.ndarray, low: int) -> None:
        wrong = (ids < low) | (ids >= self.config.vocab_size)
        if wrong.any():
            raise UserError(f"{name}: id {ids[wrong][0]} is outside the vocabulary of {self.config.vocab_size}")

    def check_shape(self, batch: int, length: int, seed: int) -> None:
        """Raises UserError if `generate` could not take these."""
        if batch < 1:
            raise UserError(f"batch={batch}: must be at least 1")
        if not 1 <= length <= self.config.max_length:
            raise UserError(f"length={length}: must be in 1 .. {self.config.max_length}, the model's max_length")
        if not 0 <= seed < 2**31:
            raise UserError(f"seed={seed}: must be in [0, 2**31)")

    def _evidence(
        self,
        batch: int,
        length: int,
        prompt: Sequence[int] | np.ndarray | None,
        evidence_BN: np.ndarray | None,
    ) -> np.ndarray:
        """Known ids [B, N] int64, and -1 at positions that are to be generated."""
        known_BN = np.full((batch, length), -1, np.int64)
        if prompt is not None and evidence_BN is not None:
            raise UserError("prompt and evidence_BN: give one of the two; a prompt can be written into the evidence")
        if prompt is not None:
            ids = self._whole_numbers("prompt", prompt)
            if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[0] != batch):
                raise UserError(f"prompt: expected ids [P] or [{batch}, P], got shape {ids.shape}")
            if ids.shape[-1] > length:
                raise UserError(f"prompt: {ids.shape[-1]} tokens are longer than length={length}")
            self._check_ids("prompt", ids, low=0)
            known_BN[:, : ids.shape[-1]] = ids
        if evidence_BN is not None:
            ids = self._whole_numbers("evidence_BN", evidence_BN)
            if ids.shape not in ((batch, length), (length,)):
                raise UserError(f"evidence_BN: expected shape {(batch, length)}, got {ids.shape}")
            self._check_ids("evidence_BN", ids, low=-1)
            known_BN[:] = ids
        return known_BN

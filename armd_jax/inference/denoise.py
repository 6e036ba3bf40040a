"""Samplers of a denoiser: every network call reads the whole text, and some of the masked tokens are filled in.

    first_hitting   one token per call, at a masked position drawn uniformly (Zheng et al. 2024)
    ancestral       T steps from time 1 to time 0; each step fills in every masked token with the probability that the
                    diffusion was reversed at it (MDLM, Sahoo et al. 2024)
    confidence      the k positions per call whose likeliest tokens are most probable

The network is not told the time. So only the sequence in which positions are filled in matters, and the first two
samplers draw it beforehand: no times are compared in floating point, and `draw` alone decides about tokens. An
ancestral step in which nothing is filled in leaves the text as it was and needs no network call, because the output of
the last one still holds. A call is a network call for the whole batch, so a step is left out only if it fills in
nothing in any row.
"""

import functools
from typing import assert_never

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core import network, objective
from armd_jax.core.parameters import Params
from armd_jax.core.sizes import padded_vocab
from armd_jax.errors import UserError
from armd_jax.inference.draw import Draw
from armd_jax.names import DenoisingSampler


@flax.struct.dataclass
class Denoised:
    """What `generate` returns, at natural positions.

    tokens_BN: int32. call_BN: int32, the number (from 1) of the network call that made each token; 0 at evidence.
    num_calls: network calls that were made (NFE).
    """

    tokens_BN: np.ndarray
    call_BN: np.ndarray
    num_calls: int


def number_of_steps(sampler: DenoisingSampler, num_free: int, steps: int | None) -> int:
    """The number of steps that a sampler takes for this many tokens: `steps`, or by default one per token.

    Raises UserError if the sampler has no choice, or if the number is below 1.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps}: must be at least 1")
    match sampler:
        case "first_hitting" if steps is not None:
            raise UserError(f"steps={steps}: sampler='first_hitting' takes one step per token; leave steps out")
        case "first_hitting" | "ancestral" | "confidence":
            return num_free if steps is None else steps
        case _:
            assert_never(sampler)


def generate(
    params: Params,
    config: ModelConfig,
    key: jax.Array,
    tokens_BN: np.ndarray,
    known_N: np.ndarray,
    draw: Draw,
    sampler: DenoisingSampler,
    steps: int | None = None,
) -> Denoised:
    """Fills in every position that is not known.

    params: `unstack`ed. tokens_BN: int32, with the evidence filled in. known_N: bool, True at evidence.
    steps: ancestral: T. confidence: the number of network calls that the tokens are spread over. None: one per token.
    Raises UserError if the sampler takes no such number of steps.
    """
    num_free = int((~known_N).sum())
    steps = number_of_steps(sampler, num_free, steps)
    if not num_free:
        return Denoised(tokens_BN, np.zeros_like(tokens_BN), 0)
    plan_key, token_key = jax.random.split(key)
    batch = tokens_BN.shape[0]
    match sampler:
        case "first_hitting":
            calls_BR = _one_per_call(plan_key, batch, num_free)
        case "ancestral":
            calls_BR = _by_steps(plan_key, batch, num_free, steps)
        case "confidence":
            per_call = -(-num_free // steps)
            num_calls = -(-num_free // per_call)
            given = jnp.asarray(tokens_BN), jnp.asarray(known_N), num_calls
            filled_BN, call_BN = _by_confidence(params, config, token_key, *given, draw, per_call)
            return Denoised(np.asarray(filled_BN), np.asarray(call_BN), num_calls)
        case _:
            assert_never(sampler)
    call_BN = np.zeros_like(tokens_BN)
    call_BN[:, ~known_N] = calls_BR
    num_calls = int(calls_BR.max())
    # A power of two, so that few programs are compiled, however many tokens a call happens to fill in.
    most = max(int(np.bincount(row).max()) for row in calls_BR)
    width = min(1 << (most - 1).bit_length(), tokens_BN.shape[1])
    plan = jnp.asarray(tokens_BN), jnp.asarray(call_BN), num_calls
    return Denoised(np.asarray(_as_planned(params, config, token_key, *plan, draw, width)), call_BN, num_calls)


def _one_per_call(key: jax.Array, batch: int, num_free: int) -> np.ndarray:
    """Calls [B, R] from 1 of first-hitting sampling: a random permutation in every row.

    Times at which tokens are unmasked are independent and uniform, so that their ranks are such a permutation.
    """
    numbers_BR = jnp.broadcast_to(jnp.arange(1, num_free + 1, dtype=jnp.int32), (batch, num_free))
    return np.asarray(jax.random.permutation(key, numbers_BR, axis=1, independent=True))


def _by_steps(key: jax.Array, batch: int, num_free: int, steps: int) -> np.ndarray:
    """Calls [B, R] from 1 of ancestral sampling: steps that fill in nothing in any row make no call.

    With the log-linear schedule, step i of T (from T down to 1) fills in a token that is still masked with probability
    1 / i. Each token is thus filled in at a step that is uniform in 1 .. T and independent of all others.
    """
    step_BR = np.asarray(jax.random.randint(key, (batch, num_free), 0, steps))
    _, rank = np.unique(step_BR, return_inverse=True)
    return 1 + rank.reshape(step_BR.shape).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "width"))
def _as_planned(
    params: Params,
    config: ModelConfig,
    key: jax.Array,
    tokens_BN: jax.Array,
    call_BN: jax.Array,
    num_calls: jax.Array,
    draw: Draw,
    width: int,
) -> jax.Array:
    """Tokens [B, N], each filled in by its call. width: at least the tokens that one call fills in in one row."""
    valid_BN = jnp.ones_like(call_BN, bool)

    def step(call: jax.Array, tokens_BN: jax.Array) -> jax.Array:
        h_BND = network.denoise(params, config, tokens_BN, call_BN >= call, valid_BN)
        # Logits are made at the positions of this call only: the head costs as much as several layers.
        now_BN = call_BN == call
        at_BW = jnp.argsort(~now_BN, axis=1, stable=True)[:, :width]
        h_BWD = jnp.take_along_axis(h_BND, at_BW[..., None], axis=1)
        new_BW, _ = _predict(params, config, jax.random.fold_in(key, call), h_BWD, draw)
        take = functools.partial(jnp.take_along_axis, indices=at_BW, axis=1)
        kept_BW = jnp.where(take(now_BN), new_BW, take(tokens_BN))
        return jnp.put_along_axis(tokens_BN, at_BW, kept_BW, axis=1, inplace=False)

    return jax.lax.fori_loop(1, num_calls + 1, step, tokens_BN)


@functools.partial(jax.jit, static_argnames=("config", "per_call"))
def _by_confidence(
    params: Params,
    config: ModelConfig,
    key: jax.Array,
    tokens_BN: jax.Array,
    known_N: jax.Array,
    num_calls: jax.Array,
    draw: Draw,
    per_call: int,
) -> tuple[jax.Array, jax.Array]:
    """Tokens and their calls [B, N]: every call fills in the `per_call` positions that it is most confident of.

    Confidence is the probability of a position's likeliest token. It does not depend on the token that is drawn there,
    which would favour likely tokens beyond their probability.
    """
    valid_BN = jnp.ones_like(tokens_BN, bool)

    def step(call: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens_BN, call_BN = state
        masked_BN = (call_BN == 0) & ~known_N
        h_BND = network.denoise(params, config, tokens_BN, masked_BN, valid_BN)
        new_BN, confidence_BN = _predict(params, config, jax.random.fold_in(key, call), h_BND, draw)
        _, at_BW = jax.lax.top_k(jnp.where(masked_BN, confidence_BN, -jnp.inf), per_call)
        chosen_BN = jnp.put_along_axis(jnp.zeros_like(masked_BN), at_BW, True, axis=1, inplace=False)
        now_BN = chosen_BN & masked_BN  # the last call may have fewer positions left
        return jnp.where(now_BN, new_BN, tokens_BN), jnp.where(now_BN, call, call_BN)

    return jax.lax.fori_loop(1, num_calls + 1, step, (tokens_BN, jnp.zeros_like(tokens_BN)))


def _predict(
    params: Params, config: ModelConfig, key: jax.Array, h_BQD: jax.Array, draw: Draw
) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn from final hidden states, and the log-probability of the likeliest token there; both [B, Q].

    Logits exist for one chunk of positions at a time.
    """
    batch, queries, width = h_BQD.shape
    size = min(config.loss_chunk, queries) or objective.loss_chunk(batch * padded_vocab(config), queries)
    num_chunks = -(-queries // size)
    padded = jnp.pad(h_BQD, ((0, 0), (0, num_chunks * size - queries), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, num_chunks, size, width), 1, 0)

    def predict(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, h_BcD = inputs
        logits_BcV = network.head_logits(params, config, h_BcD)
        tokens_Bc = draw(jax.random.fold_in(key, number), logits_BcV)
        return tokens_Bc, logits_BcV.max(axis=-1) - jax.nn.logsumexp(logits_BcV, axis=-1)

    found = jax.lax.map(predict, (jnp.arange(num_chunks), chunks))
    tokens_BQ, confidence_BQ = (jnp.moveaxis(a, 0, 1).reshape(batch, -1)[:, :queries] for a in found)
    return tokens_BQ, confidence_BQ

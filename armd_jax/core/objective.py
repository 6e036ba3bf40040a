"""Losses and likelihoods of a task: one forward pass, then cross-entropy over chunks of positions.

The task of an ARMD is a generation order:

    loss = sum over n of gamma(n) * -log p(x_n | every x_i in an earlier block)

With gamma = 1, the sum is the exact negative log-likelihood if every block is a single token. If the blocks are drawn,
its mean bounds the negative log-likelihood of the process that draws them first: by Jensen's inequality, -log of a mean
over orders is at most the mean of -log. With blocks from the masking times of a diffusion (paper section 3), the mean
is the negative ELBO of a reverse process that remembers in which steps its tokens were filled in. Only in a network of
one layer is it the sum over the time steps of an ordinary masked diffusion, which sees nothing but the set of known
tokens: in a deeper one, the vectors of known tokens depend on the blocks that they came in. Contiguous blocks are drawn
in training only: a model that is trained on them has an exact likelihood left to right, and is scored by that.

The task of a denoiser is a corruption (`core.corruption`):

    loss = sum over masked n of weight(n) * -log p(x_n | every x_i that is not masked)

Its mean is the negative ELBO of a masked diffusion in continuous time.
"""

from collections.abc import Callable
from typing import assert_never

import flax.struct
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core import axes, block_mask, network
from armd_jax.core import order as orders
from armd_jax.core.context import PLAIN, Context
from armd_jax.core.corruption import Corruption
from armd_jax.core.order import Order
from armd_jax.core.parameters import Params
from armd_jax.core.rows import rows_for_training
from armd_jax.core.sizes import padded_vocab
from armd_jax.errors import UserError

Task = Order | Corruption  # what is predicted, and from what
# (logits [B, C, V], targets [B, C]) -> arrays [B, C], for C of the N positions
OfLogits = Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]

_LOGIT_BYTES = 64 * 2**20


@flax.struct.dataclass
class LossSums:
    """Sums over a batch, float32 scalars.

    Every mean is a quotient of two of them, which holds over microbatches and processes too.

    weighted_nll: sum of gamma nll, in nats. weight: sum of gamma. nll: sum of nll, in nats. tokens: how many tokens
    were counted. z: sum of the squared log-partition of the logits over the counted tokens.

    Of a corruption, nll is the estimate of the negative ELBO and thus equals weighted_nll. Weight and tokens both count
    all valid tokens, masked or not, because that many share the ELBO. z is weighted like the loss.
    """

    weighted_nll: jax.Array
    weight: jax.Array
    nll: jax.Array
    tokens: jax.Array
    z: jax.Array


def loss_chunk(logits_per_position: int, length: int) -> int:
    """How many of `length` positions can have float32 logits at the same time within 64 MiB; at least 1."""
    return max(1, min(length, _LOGIT_BYTES // (4 * logits_per_position)))


def by_chunks(
    of_logits: OfLogits,
    params: Params,
    config: ModelConfig,
    h_BND: jax.Array,
    targets_BN: jax.Array,
    context: Context = PLAIN,
) -> tuple[jax.Array, ...]:
    """What a function makes of the logits and the target of each position; arrays [B, N].

    Logits exist for one chunk of positions at a time, in the backward pass too.
    """
    batch, length, width = h_BND.shape

    def of_chunk(h: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        return of_logits(context.constrain(network.head_logits(params, config, h), axes.LOGITS), targets)

    size = min(config.loss_chunk, length) or loss_chunk(batch * padded_vocab(config), length)
    if size == length:
        return of_chunk(h_BND, targets_BN)
    # The head is gathered once and not for every chunk.
    head = "embedding" if config.tie_embeddings else "head"
    params = params | {head: context.constrain(params[head], axes.PARAMETERS[head])}
    num_chunks = -(-length // size)
    missing = num_chunks * size - length
    h = jnp.pad(h_BND, ((0, 0), (0, missing), (0, 0))).reshape(batch, num_chunks, size, width)
    targets = jnp.pad(targets_BN, ((0, 0), (0, missing))).reshape(batch, num_chunks, size)
    step = jax.checkpoint(lambda carry, inputs: (carry, of_chunk(*inputs)))
    _, found = jax.lax.scan(step, None, (jnp.moveaxis(h, 1, 0), jnp.moveaxis(targets, 1, 0)))
    return tuple(jnp.moveaxis(part, 0, 1).reshape(batch, -1)[:, :length] for part in found)


def of_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of each target, and the log-partition of its logits."""
    log_partition = jax.nn.logsumexp(logits_BCV, axis=-1)
    return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0] - log_partition, log_partition


def token_log_probs(
    params: Params,
    config: ModelConfig,
    h_BND: jax.Array,
    targets_BN: jax.Array,
    context: Context = PLAIN,
) -> tuple[jax.Array, jax.Array]:
    """log p of each target, and the log-partition of its logits; both [B, N] float32, computed by chunks."""
    log_probs_BN, partitions_BN = by_chunks(of_target, params, config, h_BND, targets_BN, context)
    return log_probs_BN, partitions_BN


def generation_log_probs(
    params: Params,
    config: ModelConfig,
    tokens_BN: jax.Array,
    order: Order,
    context: Context = PLAIN,
) -> tuple[jax.Array, jax.Array]:
    """log p of every token given all earlier blocks, and the log-partitions; [B, N] float32 in GENERATION order.

    tokens_BN: int32 at natural positions.
    """
    rows = rows_for_training(tokens_BN, order, block_mask.build(order))
    h_BND, _ = network.forward(params, config, rows, context=context)
    targets_BN = jnp.take_along_axis(tokens_BN, order.positions_BN, axis=1)
    return token_log_probs(params, config, h_BND, targets_BN, context)


def task_log_probs(
    params: Params,
    config: ModelConfig,
    tokens_BN: jax.Array,
    task: Task,
    context: Context = PLAIN,
) -> tuple[jax.Array, jax.Array]:
    """log p of every token in the task, and the log-partitions; [B, N] float32, arranged as the task's arrays are.

    Those of an order are in generation order, those of a corruption at natural positions. At tokens that a corruption
    does not mask, they mean nothing.
    """
    match task:
        case Order():
            return generation_log_probs(params, config, tokens_BN, task, context)
        case Corruption():
            h_BND = network.denoise(params, config, tokens_BN, task.masked_BN, task.valid_BN, context)
            return token_log_probs(params, config, h_BND, tokens_BN, context)
        case _:
            assert_never(task)


def token_nats(
    params: Params, config: ModelConfig, tokens_BN: jax.Array, task: Task, context: Context = PLAIN
) -> jax.Array:
    """[B, N] float32: what each token adds to the `nll` of `LossSums`, at natural positions; 0 if it is not counted."""
    log_probs_BN, _ = task_log_probs(params, config, tokens_BN, task, context)
    nll_BN = jnp.where(task.weight_BN > 0, -log_probs_BN, 0.0)
    match task:
        case Order():
            return to_natural(task, nll_BN)
        case Corruption():
            return task.weight_BN * nll_BN
        case _:
            assert_never(task)


def totals(task: Task) -> tuple[jax.Array, jax.Array]:
    """The `weight` and the `tokens` of `LossSums`, float32 scalars, which depend on the task alone."""
    match task:
        case Order():
            return jnp.sum(task.weight_BN), jnp.sum((task.weight_BN > 0).astype(jnp.float32))
        case Corruption():
            tokens = jnp.sum(task.valid_BN.astype(jnp.float32))
            return tokens, tokens
        case _:
            assert_never(task)


def loss_sums(
    params: Params,
    config: ModelConfig,
    tokens_BN: jax.Array,
    task: Task,
    context: Context = PLAIN,
) -> LossSums:
    """The sums that losses and metrics are made of. Positions of weight 0 are left out of all sums over nats and z."""
    log_probs_BN, partitions_BN = task_log_probs(params, config, tokens_BN, task, context)
    counted_BN = task.weight_BN > 0
    nll_BN = jnp.where(counted_BN, -log_probs_BN, 0.0)
    z_BN = jnp.where(counted_BN, jnp.square(partitions_BN), 0.0)
    weighted_nll = jnp.sum(task.weight_BN * nll_BN)
    match task:
        case Order():
            nll, z = jnp.sum(nll_BN), jnp.sum(z_BN)
        case Corruption():
            nll, z = weighted_nll, jnp.sum(task.weight_BN * z_BN)
        case _:
            assert_never(task)
    weight, tokens = totals(task)
    return LossSums(weighted_nll=weighted_nll, weight=weight, nll=nll, tokens=tokens, z=z)


def to_natural(task: Task, values_BN: jax.Array) -> jax.Array:
    """Values in the arrangement of the task's arrays [B, N, ...] moved to natural positions."""
    match task:
        case Order():
            order = task
        case Corruption():
            return values_BN
        case _:
            assert_never(task)
    back_BN = jnp.argsort(order.positions_BN, axis=1)
    return jnp.take_along_axis(values_BN, back_BN.reshape(back_BN.shape + (1,) * (values_BN.ndim - 2)), axis=1)


def per_token_logps(
    params: Params,
    config: ModelConfig,
    tokens_BN: jax.Array,
    mask_BN: jax.Array,
    order: Order | None = None,
    context: Context = PLAIN,
) -> jax.Array:
    """log p of every token under an order [B, N] float32, in nats, at natural positions: what RL trainers ask for.

    It can be differentiated in `params`, and traced with everything but `config` and `context` as data. It is exact if
    each block of the order is one token: the sum over a row is then log p of its tokens given those that come before.
    Logits [B, N, V] never exist at once: they are made, and made again for the gradient, `loss_chunk` positions at a
    time.

    tokens_BN: int32, at natural positions, prompts included.
    mask_BN: bool, or numbers that are 0 where False is meant: which log-probabilities are wanted. The others are 0 and
        contribute nothing to any gradient. A token that is left out is still seen by those behind it in the order, as a
        prompt has to be; padding that nobody may see belongs to the end of the order, which is to the right of the text
        if the order is left to right.
    order: default: left to right.
    context: how the call is carried out, as in training: on which devices, with which dropout (none by default).
    Raises UserError if the shapes differ, if N exceeds the model's max_length, or if the model is a denoiser.
    """
    if not config.has_orders:
        raise UserError("per_token_logps: a denoiser (model.kind) scores no order, and has a bound only (ELBO)")
    batch, length = tokens_BN.shape
    if length > config.max_length:
        raise UserError(f"per_token_logps: length {length} exceeds the model's max_length={config.max_length}")
    order = orders.left_to_right(batch, length) if order is None else order
    if mask_BN.shape != (batch, length) or order.shape != (batch, length):
        raise UserError(
            f"per_token_logps: tokens have shape {(batch, length)}, but the mask {mask_BN.shape} and the order"
            f" {order.shape}"
        )
    log_probs_BN, _ = generation_log_probs(params, config, tokens_BN, order, context)
    return jnp.where(mask_BN.astype(bool), to_natural(order, log_probs_BN), 0.0)

"""The update rule from Optax (clipping, optimizer, learning-rate schedule), and the moving average of the weights."""

import dataclasses
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from armd_jax.config import Config, OptimizerConfig
from armd_jax.core.parameters import Params

# Weight decay applies to matrices that multiply activations, by the last part of the parameter's name.
DECAYED = {"query", "key_value", "attention_out", "mlp_in", "mlp_gate", "mlp_out", "left", "right", "head"}
# The vectors of tokens, whose learning rate is `optimizer.embedding_rate` times that of all others.
TOKEN_VECTORS = {"embedding", "start", "unseen_left", "unseen_right"}
# The matrices of the layers, which Muon orthogonalises: which axes are summed over and which are the result, counted
# from the last. All others (stacked layers, keys beside values) are matrices of their own.
MUON_AXES = {
    "query": MuonDimensionNumbers((-3,), (-2, -1)),
    "key_value": MuonDimensionNumbers((-4,), (-2, -1)),
    "attention_out": MuonDimensionNumbers((-3, -2), (-1,)),
    "mlp_in": MuonDimensionNumbers((-2,), (-1,)),
    "mlp_gate": MuonDimensionNumbers((-2,), (-1,)),
    "mlp_out": MuonDimensionNumbers((-2,), (-1,)),
    "left": MuonDimensionNumbers((-2,), (-1,)),
    "right": MuonDimensionNumbers((-2,), (-1,)),
}
# The root mean square of Muon's updates. Adam's are about as large, so that one learning rate serves both (Liu et al.
# 2025).
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class Rewarm:
    """A second warm-up, of a run that is continued: from `step` on, for `steps` steps, the rate rises from `rate`."""

    step: int
    steps: int
    rate: float


def peak_rate(config: Config) -> float:
    """The largest learning rate: `optimizer.learning_rate`, made for the model's width if there is a base width.

    Adam changes every weight by about the rate, and a sum over D inputs by D times as much. A rate in inverse
    proportion to D is therefore as good at one width as at another (for matrices: Yang et al. 2022, Tensor Programs V).
    """
    base = config.optimizer.base_width
    return config.optimizer.learning_rate * (base / config.model.width if base else 1.0)


def learning_rate(config: Config, rewarm: Rewarm | None = None) -> optax.Schedule:
    """The rate at each step: linear warm-up, then constant, cosine, or constant with a linear end (WSD).

    Steps are batches consumed, as they are for orders and for the average of the weights. Updates that were skipped or
    rolled back count, so that every schedule reaches its end at the last step.
    """
    settings, num_steps = config.optimizer, config.training.num_steps
    peak, warmup = peak_rate(config), settings.warmup_steps
    rest = max(num_steps - warmup, 1)
    match settings.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=settings.final_fraction)
        case "wsd":
            decay = min(max(round(settings.decay_fraction * num_steps), 1), rest)
            end = optax.linear_schedule(peak, peak * settings.final_fraction, decay)
            after = optax.join_schedules([optax.constant_schedule(peak), end], [max(rest - decay, 0)])
        case _:
            assert_never(settings.schedule)
    # The first update already has a rate above zero: step t of the warm-up takes (t + 1) / warmup of the peak.
    plain = optax.join_schedules([lambda step: peak * (step + 1) / max(warmup, 1), after], [warmup])
    if rewarm is None:
        return plain

    def rewarmed(step: jax.typing.ArrayLike) -> jax.Array:
        risen = (jnp.asarray(step) - rewarm.step + 1) / rewarm.steps
        rising = (risen > 0) & (risen < 1)
        return jnp.where(rising, rewarm.rate + risen * (plain(step) - rewarm.rate), plain(step))

    return rewarmed


def make(config: Config, rewarm: Rewarm | None = None) -> optax.GradientTransformation:
    """The whole update rule."""
    settings = config.optimizer

    def decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    def orthogonalised(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: MUON_AXES.get(path[-1].key), params)

    def of_tokens(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in TOKEN_VECTORS, params)

    def labels(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "matrix" if path[-1].key in MUON_AXES else "other", params
        )

    rate = learning_rate(config, rewarm)
    adamw = optax.adamw(
        rate,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=decayed,
    )
    match settings.kind:
        case "adamw":
            update = adamw
        case "muon":
            # Embeddings, head, norms, biases and single vectors keep AdamW. Optax's muon has an Adam of its own for
            # them, whose weight decay cannot leave some of them out.
            matrices = muon(
                rate,
                ns_steps=settings.muon_iterations,
                # Each row is scaled by itself before the first iteration, so that singular values start closer to 1
                # than if the matrix is divided by its norm, and one iteration less is enough (Boissin et al. 2025).
                preconditioning="aol",
                beta=settings.muon_momentum,
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
                muon_weight_dimension_numbers=orthogonalised,
                consistent_rms=MUON_RMS,
            )
            update = optax.partition({"matrix": matrices, "other": adamw}, labels)
        case _:
            assert_never(settings.kind)
    if settings.embedding_rate != 1:
        update = optax.chain(update, optax.masked(optax.scale(settings.embedding_rate), of_tokens))
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update) if settings.clip_norm else update


def at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The optimizer's state with its schedules at `step` (int32).

    By themselves they count the updates that were applied, and after a rollback a cosine would not reach its end. Muon
    has one schedule for the matrices and one for the rest. Adam's own count, by which its moments are corrected, stays.
    """
    return optax.tree_utils.tree_set(opt_state, _is_schedule, count=step)


def _is_schedule(path: tuple[Any, ...], _: Any) -> bool:
    return any(getattr(key, "tuple_name", None) == "ScaleByScheduleState" for key in path)


def update_ema(config: OptimizerConfig, ema: Params, params: Params, step: jax.Array) -> Params:
    """The average after `step` (from 0). With the decay min(ema_decay, (1 + t) / (10 + t)) it forgets the start."""
    decay = jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, new: average * decay + new * (1.0 - decay), ema, params)

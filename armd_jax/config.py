"""The configuration of a run: frozen dataclasses that the whole package reads.

An experiment file's `get_config(arg)` starts from `default_config_dict()`, an `ml_collections.ConfigDict`, and changes
fields; the command line changes more (`--config.model.width=512`); `from_config_dict` turns the result into the frozen
`Config`. Unknown names, wrong types and impossible values are `UserError`s of one line each.

The closed sets of names that fields take are in `armd_jax.names`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, TypeGuard, assert_never

import ml_collections

from armd_jax import data_config, files, names, order_config, remote, typed
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.order_config import OrderConfig

_LARGEST = 2**31 - 1  # steps, sizes and seeds are int32 on devices

_field = typed.field
# The field decides which weights a model has or what they mean: weights made with another value cannot be used.
_weights = functools.partial(typed.field, shapes_weights=True)
# The field may differ when a run is continued. Every other field is part of what the run is.
_free = functools.partial(typed.field, may_change=True)
_place = functools.partial(typed.field, check=remote.check_place)  # or a folder in object storage


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two-stream network (paper section 4), or the denoiser of a masked diffusion.

    An ordinary autoregressive transformer is `two_stream_layers=0, aggregator="shift"`, trained with left-to-right
    orders.
    """

    # armd: the two-stream network, trained on orders. denoiser: the bidirectional network of a masked diffusion (MDLM,
    # Sahoo et al. 2024); two_stream_layers, aggregator, positional_width and the `order` section then mean nothing.
    kind: names.ModelKind = _weights("armd")
    # Vocabulary size, counting real tokens only. 0: taken from the tokenizer of the data.
    vocab_size: int = _field(0, at_least=0)
    max_length: int = _field(1024, at_least=1)  # N, tokens per row
    num_layers: int = _weights(12, at_least=1)  # L, two-stream and causal layers together
    two_stream_layers: int = _weights(6, at_least=0)  # M, the first M of the L layers
    width: int = _weights(768, at_least=1)  # D
    num_heads: int = _weights(12, at_least=1)  # H
    # Heads of keys and values, each for as many neighbouring query heads (grouped-query attention). 0: num_heads.
    num_kv_heads: int = _weights(0, at_least=0)
    head_dim: int = _weights(0, at_least=0)  # K. 0: width / num_heads
    # F. 0: 4 D for gelu, 8/3 D rounded up to a multiple of 64 for swiglu (about as many parameters).
    mlp_width: int = _weights(0, at_least=0)
    mlp: names.MlpKind = _weights("gelu")
    norm: names.NormKind = _weights("layernorm")
    norm_epsilon: float = _weights(1e-5, above=0)  # of all norms but those of qk_norm and of the aggregator
    qkv_bias: bool = _weights(False)  # biases of queries, keys and values, …
    attention_out_bias: bool = _weights(False)  # … of what attention adds to the residual stream, …
    mlp_bias: bool = _weights(False)  # … and of every matrix of the MLP
    aggregator: names.AggregatorKind = _weights("neighbours")  # positional is the paper's
    # With aggregator "neighbours": the token before the target alone, or also the one after it.
    neighbours: names.Neighbours = _weights("left")
    # With aggregator "neighbours": the gain at which its positional sum starts. 0: it has no such sum.
    positional_gain: float = _weights(0.3, at_least=0)
    positional_width: int = _weights(128)  # P, width of the aggregator's sinusoidal embedding
    embedding_scale: names.EmbeddingScale = _weights("sqrt_width")  # by which looked-up embeddings are multiplied
    qk_norm: bool = _weights(False)  # RMS norm of the queries and keys of every head
    logit_cap: float = _weights(0.0, at_least=0)  # logits are cap tanh(logits / cap); 0: they are not capped
    # How projections into the residual stream start; depth_scaled: smaller by the factor (2 L)^-1/2.
    residual_init: names.ResidualInit = "unscaled"
    tie_embeddings: bool = _weights(True)  # the output head is the embedding table, transposed
    dropout: float = _field(0.0, fraction="open")  # on embeddings, attention outputs and MLP outputs
    rope_base: float = _weights(10_000.0, above=1)
    # How RoPE is stretched for longer rows. linear: all angles are divided by rope_factor. llama3: those that turn less
    # than rope_low times in rope_original_length positions are, those that turn more than rope_high times are not, and
    # between them the divisor goes over from one to the other.
    rope_scaling: names.RopeScaling = _weights("none")
    rope_factor: float = _weights(1.0, at_least=1)
    rope_low: float = _weights(1.0, above=0)
    rope_high: float = _weights(4.0, above=0)
    rope_original_length: int = _weights(8192, at_least=1)
    # Positions of a learned table that is added to both streams in place of RoPE, as in GPT-2. 0: RoPE.
    learned_positions: int = _weights(0, at_least=0)
    # Where the row that predicts a token stands: at its position, or one earlier, as in an autoregressive model.
    prediction_position: names.PredictionPosition = _weights("own")
    dtype: names.Dtype = "auto"  # of activations. auto: bfloat16 on accelerators, float32 on CPU
    # What the backward pass computes again instead of keeping: nothing, all but matrix products, or whole layers.
    remat: names.Remat = _free("none")
    # Compile one layer and loop over it, so that compile time does not grow with depth. auto: on accelerators.
    scan_layers: names.Switch = _free("auto")
    # auto: flash on GPU and splash on TPU for training, if the orders allow it; otherwise chosen by size.
    attention: names.AttentionKind = _free("auto")
    # Queries and keys per step of chunked attention. 0: 128 on CPU, 512 on accelerators.
    attention_chunk: int = _free(0, at_least=0)
    # Positions whose logits exist at the same time. 0: as many as keep them below 64 MiB.
    loss_chunk: int = _free(0, at_least=0)

    @property
    def head_width(self) -> int:
        """K."""
        return self.head_dim or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def has_orders(self) -> bool:
        """Whether the model is trained on generation orders, and scored and sampled under them."""
        return self.kind in typed.choices(names.OrderModel)

    @property
    def plain_attention(self) -> names.PlainAttention:
        """The attention of calls that no kernel serves, such as decoding: chosen by size if the config names one."""
        return self.attention if _is_plain(self.attention) else "auto"

    def for_platform(self, platform: str) -> "ModelConfig":
        """This config with every `auto` decided for a platform ("cpu", "gpu", "tpu"), whichever backend runs now.

        `attention` stays `auto` if no kernel of the platform fits; then sizes decide between dense and chunked.
        """
        accelerated = platform != "cpu"
        kernels: tuple[Any, ...] = {"tpu": typed.choices(names.TpuKernel), "gpu": typed.choices(names.GpuKernel)}.get(
            platform, ()
        )
        fitting = [kind for kind in kernels if not names.kernel_fault(kind, self.max_length, self.head_width)]
        decided: dict[str, Any] = {
            "dtype": "bfloat16" if accelerated else "float32",
            "scan_layers": "on" if accelerated else "off",
            "attention": fitting[0] if fitting else "auto",
        }
        decided = {name: value for name, value in decided.items() if getattr(self, name) == "auto"}
        # A chunk of scores should fit a CPU core's cache; an accelerator prefers few and large steps.
        decided["attention_chunk"] = self.attention_chunk or (512 if accelerated else 128)
        return dataclasses.replace(self, **decided)


def _is_plain(kind: names.AttentionKind) -> TypeGuard[names.PlainAttention]:
    return kind in typed.choices(names.PlainAttention)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. The defaults are the paper's protocol, which follows SEDD and MDLM."""

    kind: names.OptimizerKind = "adamw"  # muon: orthogonalised updates for the matrices of layers, AdamW for the rest
    learning_rate: float = _field(3e-4, above=0)
    # The width for which `learning_rate` is meant; at others it is base_width / width times as large. 0: it is for any.
    base_width: int = _field(0, at_least=0)
    schedule: names.LearningRateSchedule = "constant"  # after the warm-up
    warmup_steps: int = _field(2500, at_least=0)
    decay_fraction: float = _field(0.2, fraction="closed")  # wsd: the last part of training, in which the rate falls
    final_fraction: float = _field(0.0, fraction="closed")  # cosine, wsd: last learning rate divided by the peak
    embedding_rate: float = _field(1.0, above=0)  # learning rate of the vectors of tokens, as a multiple of the others'
    muon_momentum: float = _field(0.95, fraction="open")  # muon: of the matrices it updates; Adam's betas for the rest
    muon_iterations: int = _field(4, at_least=1)  # muon: Newton-Schulz iterations that orthogonalise an update
    beta1: float = _field(0.9, fraction="open")
    beta2: float = _field(0.999, fraction="open")
    epsilon: float = _field(1e-8, above=0)
    weight_decay: float = _field(0.0, at_least=0)  # on matrices only: not on norms, biases, embeddings or start token
    clip_norm: float = _field(1.0, at_least=0)  # of the global gradient norm; 0: no clipping
    # Decay of the exponential moving average (EMA) of the weights; at step t it is min(ema_decay, (1 + t) / (10 + t)).
    # 0: no average is kept.
    ema_decay: float = _field(0.9999, fraction="open")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    num_steps: int = _free(400_000, at_least=1)
    batch_size: int = _field(512, at_least=1)  # rows per step, over all devices
    microbatches: int = _field(1, at_least=1)  # gradient accumulation: the batch is cut into this many parts
    gradient_sums: names.GradientSums = _free("float32")  # of matrices, over rows and devices: their dtype
    z_loss: float = _field(0.0, at_least=0)  # weight of the squared log-partition of the logits in the loss
    seed: int = _field(0, at_least=0)
    log_every: int = _free(50, at_least=1)
    eval_every: int = _free(1000, at_least=0)  # 0: never
    eval_batches: int = _free(16, at_least=0)  # 0: the whole validation split
    checkpoint_every: int = _free(1000, at_least=1)
    # How many of the newest checkpoints are kept. The newest one of the interval is always kept.
    keep_checkpoints: int = _free(2, at_least=1)
    keep_every: int = _free(0, at_least=0)  # keep one checkpoint per this many steps; 0: none
    # An update is skipped if its loss or gradient is not finite, or if the loss spikes. If more than this many are
    # skipped in a row, `after_skipped` says what happens: go back to the last checkpoint and past the batches that
    # failed (rollback), or stop.
    max_skipped: int = _free(10, at_least=1)
    after_skipped: names.AfterSkipped = _free("rollback")
    # Likewise if its loss exceeds the average of its phase and number of streams by so many nats per token; 0: never.
    spike_nats: float = _field(0.0, at_least=0)
    init_from: str = _place("", optional=True)  # fine-tuning: a run or an export whose weights training starts from
    profile: tuple[int, ...] = _free((), check=typed.check_span)  # (first, count): steps that jax.profiler traces
    tensorboard: bool = _free(True)  # write TensorBoard files if tensorboardX is installed
    wandb_project: str = _free("", optional=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. One axis may be -1: all devices that are left."""

    data: int = _free(-1)
    fsdp: int = _free(1)
    tensor: int = _free(1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    order: OrderConfig = OrderConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()


# --- in and out -----------------------------------------------------------------------------------------------------


# What holds for the model of a stored config that has no such field, because it is older than the field.
_BEFORE = {"embedding_scale": "one", "residual_init": "depth_scaled"}


def default_config_dict() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict, which experiment files start from."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def from_config_dict(config: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Builds and checks the frozen `Config`. Raises UserError if a field, a type or a value is wrong."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    built = typed.build(Config, values, largest=_LARGEST)
    check(built)
    return built


def to_json(config: Config) -> str:
    """The resolved config as it is stored in the `config.json` of a run or an export."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def describe(config: Config) -> str:
    """The resolved config for people, one line per section."""
    lines = ["resolved config"]
    for name, section in dataclasses.asdict(config).items():
        lines.append(f"  {name:<10} " + ", ".join(f"{field}={value!r}" for field, value in section.items()))
    return "\n".join(lines)


def read(folder: pathlib.Path) -> Config:
    """The resolved config of a run or an export. Raises UserError if the folder has none that can be used."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: neither a training run nor an export (it has no config.json)")
    values = files.read_json(file)
    if isinstance(values, dict) and "model_type" in values and "model" not in values:
        raise UserError(f"{folder}: is a folder of Hugging Face; armd import --from={folder} makes an export of it")
    if isinstance(values, dict) and isinstance(model := values.get("model"), dict):
        values = values | {"model": _BEFORE | model}
    try:
        return from_config_dict(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def weight_fields() -> list[str]:
    """Names of the `ModelConfig` fields that decide which weights a model has or what they mean."""
    return [field.name for field in dataclasses.fields(ModelConfig) if field.metadata.get("shapes_weights")]


def differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any, bool]]:
    """(dotted name, old value, new value, whether it may change in a run that is continued) of fields that differ."""
    for section in dataclasses.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before):
            was, now = getattr(before, field.name), getattr(after, field.name)
            if was != now:
                yield f"{section.name}.{field.name}", was, now, bool(field.metadata.get("may_change"))


# --- checks ---------------------------------------------------------------------------------------------------------


def check_model(model: ModelConfig, where: str = "model") -> None:
    """Raises UserError if no model of this config could be built."""
    typed.check(model, where)
    if model.has_orders and model.two_stream_layers > model.num_layers:
        raise UserError(
            f"{where}.two_stream_layers={model.two_stream_layers}: cannot exceed {where}.num_layers={model.num_layers}"
        )
    if not model.head_dim and model.width % model.num_heads:
        raise UserError(
            f"{where}.width={model.width} is not divisible by {where}.num_heads={model.num_heads}:"
            " every head needs the same width"
        )
    if model.num_heads % model.kv_heads:
        raise UserError(
            f"{where}.num_heads={model.num_heads} is not divisible by {where}.num_kv_heads={model.num_kv_heads}:"
            " every head of keys serves the same number of queries"
        )
    if model.head_width % 2 and not model.learned_positions:
        raise UserError(f"{where}: heads of width {model.head_width}: it is odd, and RoPE rotates pairs")
    _check_positions(model, where)
    if model.positional_width < 2 or model.positional_width % 2:
        raise UserError(f"{where}.positional_width={model.positional_width}: must be even and at least 2")
    if fault := names.kernel_fault(model.attention, model.max_length, model.head_width, where):
        raise UserError(f"{where}.attention={model.attention!r}: {fault}")


def _check_positions(model: ModelConfig, where: str) -> None:
    if model.rope_low >= model.rope_high:
        raise UserError(f"{where}.rope_low={model.rope_low}: must be below {where}.rope_high={model.rope_high}")
    # The start token stands at position 0. With `previous`, the last token of a full row shares the last vector.
    match model.prediction_position:
        case "own":
            needed = model.max_length + 1 if model.has_orders else model.max_length
        case "previous":
            needed = model.max_length
        case _:
            assert_never(model.prediction_position)
    if 0 < model.learned_positions < needed:
        fault = f"rows of {model.max_length} tokens need {needed}"
        raise UserError(f"{where}.learned_positions={model.learned_positions}: {fault}")


def check(config: Config) -> None:
    """Raises UserError if the config could not be trained."""
    check_model(config.model)
    for section in dataclasses.fields(config):
        typed.check(getattr(config, section.name), section.name)
    order, training = config.order, config.training
    data_config.check(config.data)
    if config.model.has_orders:
        order_config.check(order, config.model.max_length, training.num_steps, config.model.attention)
    else:
        _check_without_orders(order)
    permute = order.permute if "progressive" in order_config.drawn_kinds(order) else None
    data_config.check_reset(config.data, config.model.kind, config.model.attention, permute)
    if training.seed >= 2**31:
        raise UserError(f"training.seed={training.seed}: must be in [0, 2**31)")
    if training.batch_size % training.microbatches:
        raise UserError(
            f"training.batch_size={training.batch_size} is not divisible by"
            f" training.microbatches={training.microbatches}"
        )
    axes = dataclasses.asdict(config.mesh)
    if sum(size == -1 for size in axes.values()) > 1:
        raise UserError("mesh: only one axis may be -1 (all devices that are left)")
    for name, size in axes.items():
        if size != -1 and size < 1:
            raise UserError(f"mesh.{name}={size}: must be at least 1, or -1 for all devices that are left")


def _check_without_orders(order: OrderConfig) -> None:
    """Raises UserError if a field asks for orders, of which a denoiser has none."""
    for name, value, none in (("sbp_steps", order.sbp_steps, "set it to 0"), ("mix", order.mix, "leave it empty")):
        if value:
            raise UserError(f"order.{name}={value}: model.kind='denoiser' is not trained on orders; {none}")


def check_new_run(config: Config) -> None:
    """Raises UserError if a new run should not be trained like this, although older runs that were can be read."""
    kinds = order_config.drawn_kinds(config.order)
    match config.order:
        case OrderConfig(weight="simple", noise_schedule="geometric") if "masked_diffusion" in kinds:
            raise UserError(
                "order.weight='simple' with order.noise_schedule='geometric': a rare step would weigh 100,000 times as"
                " much as others, and a single token would decide an update; use weight='elbo' or another schedule"
            )
        case _:
            pass

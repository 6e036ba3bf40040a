"""Configuration: frozen dataclasses inside, an `ml_collections.ConfigDict` at the edge.

An experiment file's `get_config(arg)` starts from `default_config_dict()` and changes fields; the command line
changes more (`--config.model.width=512`); `from_config_dict` turns the result into the frozen `Config` that the
rest of the package reads. Unknown names, wrong types and impossible values are `UserError`s of one line each.
"""

import dataclasses
import difflib
import json
import math
import re
import reprlib
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections


class UserError(ValueError):
    """A mistake in what the user gave. The command line prints it as one line `error: …` and exits with code 2."""


AGGREGATORS = ("positional", "mean", "shift")
NORMS = ("layernorm", "rmsnorm")
MLPS = ("gelu", "swiglu")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("auto", "dense", "chunked", "splash", "flash")
SPLASH_TILE = 128  # the TPU kernel works on tiles of so many rows
FLASH_WIDEST = 256  # the GPU kernel has tiles for heads up to this width
DTYPES = ("auto", "float32", "bfloat16")
SWITCHES = ("auto", "on", "off")
ORDER_KINDS = ("left_to_right", "progressive", "uniform", "strided", "masked_diffusion")
PERMUTES = ("scatter", "window", "reinsert")
NOISE_SCHEDULES = ("linear", "cosine", "geometric")
ORDER_WEIGHTS = ("elbo", "simple")
AFTER_SKIPPED = ("rollback", "stop")
LEARNING_RATE_SCHEDULES = ("constant", "cosine", "wsd")
DAMAGED = ("error", "skip")

_LARGEST = 2**31 - 1  # steps, sizes and seeds are int32 on devices
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 200


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two-stream network. AR is `two_stream_layers=0, aggregator="shift"` with the identity order."""

    vocab_size: int = 0  # real tokens only; 0: taken from the tokenizer of the data
    max_length: int = 1024  # N, tokens a row
    num_layers: int = 12  # L, two-stream and causal together
    two_stream_layers: int = 6  # M, the first M of them
    width: int = 768  # D
    num_heads: int = 12  # H
    mlp_width: int = 0  # F; 0: 4 D for gelu, 8/3 D rounded up to a multiple of 64 for swiglu
    mlp: str = "gelu"
    norm: str = "layernorm"
    aggregator: str = "positional"
    positional_width: int = 128  # P, width of the sinusoidal embedding in the aggregator
    tie_embeddings: bool = True
    dropout: float = 0.0  # on embeddings, attention outputs and MLP outputs
    rope_base: float = 10_000.0
    dtype: str = "auto"  # of activations; auto: bfloat16 on accelerators, float32 on CPU
    remat: str = "none"  # what the backward pass recomputes: nothing, all but matrix products, whole layers
    scan_layers: str = "auto"  # one compiled layer body (flat compile time); auto: on accelerators
    attention: str = "auto"  # auto: in training flash on GPU, splash on TPU (masks known when tracing); else by size
    attention_chunk: int = 0  # queries and keys a step of the chunked attention path; 0: 128 on CPU, else 512
    loss_chunk: int = 0  # positions whose logits exist at once; 0: as many as keep them below 64 MiB

    def for_platform(self, platform: str) -> "ModelConfig":
        """The same with what is `auto` decided for a platform ("cpu", "gpu", "tpu"), whatever backend runs here.

        `attention` stays `auto` where the sizes decide between dense and chunked. Splash attention asks for rows of
        whole 128-token tiles, flash attention for heads that are not too wide.
        """
        accelerated = platform != "cpu"
        splash = platform == "tpu" and self.max_length % SPLASH_TILE == 0
        flash = platform == "gpu" and self.width // self.num_heads <= FLASH_WIDEST
        choices = {"dtype": "bfloat16" if accelerated else "float32", "scan_layers": "on" if accelerated else "off"}
        choices["attention"] = "splash" if splash else "flash" if flash else "auto"
        chosen = {name: value for name, value in choices.items() if getattr(self, name) == "auto"}
        # A core's cache holds the smaller block of scores; an accelerator wants few and large steps.
        chunk = self.attention_chunk or (512 if accelerated else 128)
        return dataclasses.replace(self, **chosen, attention_chunk=chunk)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    path: str = ""  # a file, folder or glob; "tfds:NAME" for a TFDS dataset; empty: the embedded corpus
    text_field: str = "text"  # of .jsonl objects and TFDS examples
    tfds_data_dir: str = ""  # where TFDS datasets are kept; empty: TFDS's own default
    tokenizer: str = "sentencepiece"  # "sentencepiece" (trained), "bytes", or a folder of vocabulary files
    vocab_size: int = 2048  # of a trained tokenizer
    valid_fraction: float = 0.05  # of the documents, where the source brings no validation split
    test_fraction: float = 0.05
    shard_rows: int = 8192  # rows a file
    cache_dir: str = ""  # of prepared data; empty: <workdir>/data
    damaged: str = "error"  # what a document that is not text is: an error, or skipped and counted


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper's protocol (after SEDD and MDLM)."""

    learning_rate: float = 3e-4
    schedule: str = "constant"  # after the warm-up
    warmup_steps: int = 2500
    decay_fraction: float = 0.2  # wsd: the last part of training in which the rate falls linearly
    final_fraction: float = 0.0  # cosine, wsd: last rate over peak rate
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # on matrices only: norms, biases, embeddings and the start token never decay
    clip_norm: float = 1.0  # of the global gradient norm; 0: none
    ema_decay: float = 0.9999  # at step t: min(ema_decay, (1 + t) / (10 + t)); 0: no average is kept


@dataclasses.dataclass(frozen=True)
class OrderConfig:
    """The generation orders drawn in training (paper section on the curriculum; method choices named there)."""

    kind: str = "progressive"
    permute: str = "scatter"  # progressive: which tokens are shuffled
    ar_steps: int = 9_000  # progressive: identity order until here (i_AR)
    permute_steps: int = 48_000  # progressive: shuffled tokens rise linearly until here (i_perm)
    max_permuted: int = 32  # progressive: and stay at this number (rho)
    streams: tuple[int, ...] = (1, 2, 4)  # strided: S is drawn from these, one draw a step
    sbp_steps: int = 0  # the last steps of training use strided orders (SBP fine-tuning)
    diffusion_steps: int = 64  # masked_diffusion: T
    noise_schedule: str = "linear"
    weight: str = "elbo"  # masked_diffusion: gamma


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    num_steps: int = 400_000
    batch_size: int = 512  # rows a step, over all devices
    microbatches: int = 1  # the batch is cut into so many pieces, gradients summed
    z_loss: float = 0.0
    seed: int = 0
    log_every: int = 50
    eval_every: int = 1000
    eval_batches: int = 16
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2  # the newest so many, and always the newest of the interval
    keep_every: int = 0  # and one every so many steps for ever; 0: none
    max_skipped: int = 10  # updates skipped in a row (loss or gradient not finite, or a spike) before after_skipped
    after_skipped: str = "rollback"  # to the last checkpoint and past the batches that failed; or stop
    spike_nats: float = 0.0  # an update whose loss is so far above its running average is skipped too; 0: never
    init_from: str = ""  # a run or an export whose weights training starts from (fine-tuning)
    tensorboard: bool = True  # where tensorboardX is installed
    wandb_project: str = ""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    order: OrderConfig = OrderConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()


def default_config_dict() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict: what experiment files start from."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def resolve(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """What an experiment's `get_config(arg)` returns where `arg` is its plain form or `smoke`; UserError otherwise."""
    if arg not in ("", "smoke"):
        raise UserError(f"experiment argument {arg!r} is not known; it takes 'smoke' or what its docstring names")
    return smoke(config) if arg == "smoke" else config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks an experiment to a minute on two cores: embedded corpus, tiny model, 40 steps, a checkpoint every 10.

    The code path stays the experiment's own: its order kind, phases, optimizer and model choices are kept.
    """
    model, order, training = config.model, config.order, config.training
    config.data.update(path="", tokenizer="bytes")
    two_stream = min(model.two_stream_layers, 1)
    model.update(max_length=64, num_layers=2, two_stream_layers=two_stream, width=32, num_heads=2, mlp_width=0)
    model.update(positional_width=16, vocab_size=0)
    order.update(ar_steps=10, permute_steps=20, max_permuted=min(order.max_permuted, 8))
    order.update(sbp_steps=10 if order.sbp_steps else 0, streams=tuple(s for s in order.streams if 64 % s == 0))
    training.update(num_steps=40, batch_size=8, microbatches=min(training.microbatches, 2), log_every=1)
    training.update(eval_every=20, eval_batches=2, checkpoint_every=10)
    config.optimizer.update(warmup_steps=5, ema_decay=min(config.optimizer.ema_decay, 0.9))
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    return config


def from_config_dict(config: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Builds and validates the frozen `Config`. Raises UserError on a wrong field, type or value."""
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    built = _build(Config, values, "")
    validate(built)
    return built


def check_new_run(config: Config) -> None:
    """Raises UserError where a new run should not be trained like this, though runs that were can be read."""
    order = config.order
    if order.kind == "masked_diffusion" and order.weight == "simple" and order.noise_schedule == "geometric":
        raise UserError(
            "order.weight='simple' with order.noise_schedule='geometric': a rare step would weigh 100,000 times as much"
            " as others, and one token decide an update; take weight='elbo' or another schedule"
        )


def to_json(config: Config) -> str:
    """The resolved config as stored in a run's `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def shown(value: Any) -> str:
    """`repr(value)` for a message: cut where it is long or deep, so that an error stays one readable line."""
    return _shorten.repr(value)


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known where nothing is near."""
    close = difflib.get_close_matches(name[:200], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        got = type(values).__name__
        raise UserError(f"{where or 'config'}={shown(values)}: expected a section with fields, got {got}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            prefix = f"{where}." if where else ""
            close = difflib.get_close_matches(str(name)[:200], list(hints), n=1, cutoff=0.5)
            hint = f"; did you mean {prefix + close[0]!r}?" if close else f"; known: {', '.join(hints)}"
            raise UserError(f"unknown field {shown(prefix + str(name))}{hint}")
    built = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        hint = hints[name]
        built[name] = _build(hint, value, path) if dataclasses.is_dataclass(hint) else _coerce(hint, value, path)
    return cls(**built)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the field's type; int is accepted for float, a list or single number for a tuple."""
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(typing.get_args(hint)[0], item, where) for item in items)
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    if hint in (int, float) and isinstance(value, int) and abs(value) > _LARGEST:
        size = f"={value}" if value.bit_length() <= 256 else f": a number of {value.bit_length()} bits"
        raise UserError(f"{where}{size}: must be in -2**31 + 1 .. 2**31 - 1")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        fits, value = True, float(value)
    if not fits:
        raise UserError(f"{where}={shown(value)}: expected {hint.__name__}, got {type(value).__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where}={value!r}: must be a finite number")
    if hint is str and re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{where}={shown(value)}: holds a NUL or half a surrogate pair, which no name or path does")
    return value


def _choice(where: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{where}={shown(value)} is not known{nearest(value, known)}")


def _at_least(where: str, value: float, low: float) -> None:
    if value < low:
        raise UserError(f"{where}={value}: must be at least {low}")


def _fraction(where: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{where}={value}: must be in [0, 1)")


def validate_model(model: ModelConfig, where: str = "model") -> None:
    """Raises UserError where a model of this config could not be built."""
    for name in ("max_length", "num_layers", "width", "num_heads"):
        _at_least(f"{where}.{name}", getattr(model, name), 1)
    for name in ("vocab_size", "two_stream_layers", "mlp_width", "attention_chunk", "loss_chunk"):
        _at_least(f"{where}.{name}", getattr(model, name), 0)
    if model.two_stream_layers > model.num_layers:
        raise UserError(
            f"{where}.two_stream_layers={model.two_stream_layers}: cannot exceed {where}.num_layers={model.num_layers}"
        )
    if model.width % model.num_heads:
        raise UserError(
            f"{where}.width={model.width} is not divisible by {where}.num_heads={model.num_heads}:"
            " every head needs the same width"
        )
    if (model.width // model.num_heads) % 2:
        raise UserError(
            f"{where}.width / {where}.num_heads = {model.width // model.num_heads} is odd: RoPE rotates pairs"
        )
    if model.positional_width < 2 or model.positional_width % 2:
        raise UserError(f"{where}.positional_width={model.positional_width}: must be even and at least 2")
    if model.rope_base <= 1:
        raise UserError(f"{where}.rope_base={model.rope_base}: must be above 1")
    if model.attention == "splash" and model.max_length % SPLASH_TILE:
        raise UserError(
            f"{where}.attention='splash': {where}.max_length={model.max_length} must be a multiple of {SPLASH_TILE}"
        )
    if model.attention == "flash" and model.width // model.num_heads > FLASH_WIDEST:
        raise UserError(
            f"{where}.attention='flash': {where}.width / {where}.num_heads = {model.width // model.num_heads}"
            f" is more than {FLASH_WIDEST}; use auto or chunked"
        )
    _fraction(f"{where}.dropout", model.dropout)
    for name, known in (
        ("mlp", MLPS),
        ("norm", NORMS),
        ("aggregator", AGGREGATORS),
        ("dtype", DTYPES),
        ("remat", REMATS),
        ("scan_layers", SWITCHES),
        ("attention", ATTENTIONS),
    ):
        _choice(f"{where}.{name}", getattr(model, name), known)


def validate(config: Config) -> None:
    """Raises UserError where the config could not be trained."""
    validate_model(config.model)
    data, optimizer, order, training = config.data, config.optimizer, config.order, config.training
    _fraction("data.valid_fraction", data.valid_fraction)
    _fraction("data.test_fraction", data.test_fraction)
    if data.valid_fraction + data.test_fraction >= 1:
        raise UserError("data.valid_fraction + data.test_fraction: must leave something to train on")
    _choice("data.damaged", data.damaged, DAMAGED)
    _at_least("data.vocab_size", data.vocab_size, 1)
    _at_least("data.shard_rows", data.shard_rows, 1)

    _choice("optimizer.schedule", optimizer.schedule, LEARNING_RATE_SCHEDULES)
    if optimizer.learning_rate <= 0:
        raise UserError(f"optimizer.learning_rate={optimizer.learning_rate}: must be above 0")
    if optimizer.epsilon <= 0:
        raise UserError(f"optimizer.epsilon={optimizer.epsilon}: must be above 0")
    for name in ("warmup_steps", "weight_decay", "clip_norm"):
        _at_least(f"optimizer.{name}", getattr(optimizer, name), 0)
    for name in ("beta1", "beta2", "ema_decay"):
        _fraction(f"optimizer.{name}", getattr(optimizer, name))
    for name in ("decay_fraction", "final_fraction"):
        if not 0 <= getattr(optimizer, name) <= 1:
            raise UserError(f"optimizer.{name}={getattr(optimizer, name)}: must be in [0, 1]")

    _choice("order.kind", order.kind, ORDER_KINDS)
    _choice("order.permute", order.permute, PERMUTES)
    _choice("order.noise_schedule", order.noise_schedule, NOISE_SCHEDULES)
    _choice("order.weight", order.weight, ORDER_WEIGHTS)
    _at_least("order.ar_steps", order.ar_steps, 0)
    _at_least("order.permute_steps", order.permute_steps, order.ar_steps)
    _at_least("order.max_permuted", order.max_permuted, 1)
    _at_least("order.diffusion_steps", order.diffusion_steps, 1)
    if order.kind == "progressive" and order.max_permuted > config.model.max_length:
        raise UserError(
            f"order.max_permuted={order.max_permuted}: cannot exceed model.max_length={config.model.max_length}"
        )
    if config.model.attention == "splash" and order.kind == "masked_diffusion":
        raise UserError(
            "model.attention='splash': the blocks of order.kind='masked_diffusion' are drawn, no mask is known before;"
            " use auto or chunked"
        )
    if not 0 <= order.sbp_steps <= training.num_steps:
        raise UserError(f"order.sbp_steps={order.sbp_steps}: must be in [0, training.num_steps={training.num_steps}]")
    if not order.streams:
        raise UserError("order.streams=(): needs at least one number of streams")
    if order.kind == "strided" or order.sbp_steps:
        for streams in order.streams:
            _at_least("order.streams", streams, 1)
            if config.model.max_length % streams:
                raise UserError(
                    f"model.max_length={config.model.max_length} is not divisible by {streams} streams (order.streams)"
                )

    for name in ("num_steps", "batch_size", "microbatches", "log_every", "keep_checkpoints", "checkpoint_every"):
        _at_least(f"training.{name}", getattr(training, name), 1)
    _choice("training.after_skipped", training.after_skipped, AFTER_SKIPPED)
    _at_least("training.max_skipped", training.max_skipped, 1)
    for name in ("eval_every", "eval_batches", "keep_every", "z_loss", "spike_nats"):
        _at_least(f"training.{name}", getattr(training, name), 0)
    if not 0 <= training.seed < 2**31:
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

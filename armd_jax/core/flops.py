"""Analytic model FLOPs of a `ModelConfig`: what the mathematics needs, however it is computed.

A multiply-add is two FLOPs. Norms, softmax, rotations and the embedding lookup are not counted, and an attention
query counts the keys that it may see, (N + 1) / 2 on average, but no masked ones. Every token has one X row and one G
row, and the last two-stream layer leaves out the work on X that nobody reads. With `layer` = q + kv + o + mlp, the
weights of one layer:

    projections and MLP   L layer + (M - 1) (layer - kv)   for M >= 1, else L layer
    attention calls       L + M - 1                        for M >= 1, else L

With an MLP of 4 D, kv is a sixth of a layer, so an ARMD does the work of L + 5/6 (M - 1) layers and an autoregressive
model that of L. A denoiser has L layers and L attention calls, and each of its queries sees all N keys. Training costs
three times the forward pass, because the backward pass costs twice as much; what a backward pass computes again is not
counted.

An MFU from these FLOPs says how busy the devices are. It does not say how fast a model trains compared with others,
because a model that does more work per token has a higher one at the same speed. For that there are the FLOPs that an
autoregressive model of the same size would be said to need, `ar_training_flops_per_token`, by the convention of the
field (Chowdhery et al. 2022, PaLM, appendix B).
"""

import dataclasses
from typing import assert_never

from armd_jax.config import ModelConfig
from armd_jax.core import aggregation, peaks
from armd_jax.core.sizes import mlp_matrices, mlp_width, padded_vocab


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """FLOPs per token, by what they are spent on."""

    projections: float  # q, k, v, o and the MLP
    attention: float  # scores and weighted values
    aggregator: float
    head: float

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.aggregator + self.head

    def times(self, factor: float) -> "TokenFlops":
        return TokenFlops(*(factor * value for value in dataclasses.astuple(self)))


def _forward(config: ModelConfig, keys: float, two_stream_layers: int, aggregator: float) -> TokenFlops:
    """keys: how many of them a query sees on average."""
    width, mlp = config.width, mlp_width(config)
    heads_width = config.num_heads * config.head_width
    key_value = 4 * width * config.kv_heads * config.head_width
    layer = 4 * width * heads_width + key_value + 2 * mlp_matrices(config) * width * mlp
    extra = max(two_stream_layers - 1, 0)
    return TokenFlops(
        projections=config.num_layers * layer + extra * (layer - key_value),
        attention=(config.num_layers + extra) * 4 * heads_width * keys,
        aggregator=aggregator,
        head=2 * width * padded_vocab(config),
    )


def training_flops_per_token(config: ModelConfig, length: int | None = None) -> TokenFlops:
    """Forward and backward pass of one token in a row of `length` tokens (default: max_length)."""
    length = config.max_length if length is None else length
    return forward_flops_per_token(config, length).times(3)


def ar_training_flops_per_token(config: ModelConfig, length: int | None = None) -> float:
    """6 N + 12 L H K T: training FLOPs per token of an autoregressive model of the same size, as PaLM counts them.

    N: the weights of its matrices, those of the head included (`ar_parameters`). T: `length` (default: max_length); as
    in that convention, attention counts all T keys, also those that a causal mask hides.
    """
    length = config.max_length if length is None else length
    attention = 12 * config.num_layers * config.num_heads * config.head_width * length
    return 6.0 * ar_parameters(config) + attention


def ar_parameters(config: ModelConfig) -> int:
    """Weights in the matrices of L ordinary layers and of the head; norms, biases and an aggregator do not count."""
    heads, kv_heads = config.num_heads * config.head_width, config.kv_heads * config.head_width
    layer = config.width * (2 * heads + 2 * kv_heads + mlp_matrices(config) * mlp_width(config))
    return config.num_layers * layer + config.width * padded_vocab(config)


@dataclasses.dataclass(frozen=True)
class Utilization:
    """Shares of the devices' bfloat16 peak in training.

    model: the FLOPs of the model's own mathematics, both streams of an ARMD. autoregressive: those of an autoregressive
    model of the same size, by the convention of the field.
    """

    model: float
    autoregressive: float


def utilization(
    config: ModelConfig, tokens_per_second: float, device_kind: str, num_devices: int
) -> Utilization | None:
    """Model-FLOPs utilisations (MFU) of training.

    tokens_per_second: of all devices together.
    Returns None if the peak of the device is not known.
    """
    peak = peaks.peak_flops(device_kind)
    if peak is None:
        return None
    tokens_per_peak = tokens_per_second / (peak * num_devices)
    return Utilization(
        model=training_flops_per_token(config).total * tokens_per_peak,
        autoregressive=ar_training_flops_per_token(config) * tokens_per_peak,
    )


def forward_flops_per_token(config: ModelConfig, length: int | None = None) -> TokenFlops:
    """One token of a parallel forward pass, as in training and scoring."""
    length = config.max_length if length is None else length
    match config.kind:
        case "armd":
            keys = (length + 1) / 2
            return _forward(config, keys, config.two_stream_layers, aggregation.make(config).forward_flops(keys))
        case "denoiser":
            return _forward(config, length, 0, 0.0)
        case _:
            assert_never(config.kind)


def decoding_flops_per_token(config: ModelConfig, length: int | None = None) -> TokenFlops:
    """One token of an ARMD decoded with caches: its G row once and its X row once, whatever the number of streams.

    A denoiser has no caches: each of its network calls costs what a forward pass over the whole row costs.
    """
    length = config.max_length if length is None else length
    return _forward(config, (length + 1) / 2, config.two_stream_layers, aggregation.make(config).decoding_flops())

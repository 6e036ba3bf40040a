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


def utilization(config: ModelConfig, tokens_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model-FLOPs utilisation of training: the share of the devices' bfloat16 peak that goes into the mathematics.

    tokens_per_second: of all devices together.
    Returns None if the peak of the device is not known.
    """
    peak = peaks.peak_flops(device_kind)
    if peak is None:
        return None
    return training_flops_per_token(config).total * tokens_per_second / (peak * num_devices)


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

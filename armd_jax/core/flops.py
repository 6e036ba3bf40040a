"""Analytic model FLOPs of a `ModelConfig`: what the mathematics asks for, however it is computed.

A multiply-add is two FLOPs; norms, softmax, rotations and the embedding gather are left out, and an attention query is
charged for the keys that it may see, (N + 1) / 2 on average, not for masked ones. With one X row and one G row a token,
the dead work of the last two-stream layer left out, and `layer` = q + kv + o + mlp the weights of one layer:

    projections and MLP   L layer + (M - 1) (layer - kv)   for M >= 1, else L layer
    attention calls       L + M - 1                        for M >= 1, else L

With an MLP of 4 D, kv is a sixth of a layer: L + 5/6 (M - 1) layers of work against an autoregressive model's L.
Training costs three times the forward pass (the backward pass twice as much again), recomputation not counted.
"""

import dataclasses

from armd_jax.config import ModelConfig
from armd_jax.core import peaks
from armd_jax.core.network import mlp_width, padded_vocab


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


def _forward(config: ModelConfig, length: int, aggregator: float) -> TokenFlops:
    width, mlp = config.width, mlp_width(config)
    keys = (length + 1) / 2
    key_value = 4 * width**2
    layer = 4 * width**2 + key_value + (6 if config.mlp == "swiglu" else 4) * width * mlp
    extra = max(config.two_stream_layers - 1, 0)
    return TokenFlops(
        projections=config.num_layers * layer + extra * (layer - key_value),
        attention=(config.num_layers + extra) * 4 * width * keys,
        aggregator=aggregator,
        head=2 * width * padded_vocab(config),
    )


def training_flops_per_token(config: ModelConfig, length: int | None = None) -> TokenFlops:
    """Forward and backward pass of one token in a row of `length` tokens (default: max_length).

    Aggregation is attention without softmax: P and D multiply-adds for every visible token, and W PE.
    """
    length = config.max_length if length is None else length
    return forward_flops_per_token(config, length).times(3)


def utilization(config: ModelConfig, tokens_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model-FLOPs utilisation of training: the share of the devices' bfloat16 peak that goes into the mathematics.

    tokens_per_second: of all devices together. None where the peak of the device is not known.
    """
    peak = peaks.peak_flops(device_kind)
    if peak is None:
        return None
    return training_flops_per_token(config).total * tokens_per_second / (peak * num_devices)


def forward_flops_per_token(config: ModelConfig, length: int | None = None) -> TokenFlops:
    """One token of a parallel forward pass, as in training and scoring."""
    length = config.max_length if length is None else length
    width, code, keys = config.width, config.positional_width, (length + 1) / 2
    aggregator = {
        "positional": 2 * (code + width) * keys + 2 * code * width,
        "mean": 2 * width * keys + 2 * code * width,
    }.get(config.aggregator, 0)
    return _forward(config, length, aggregator)


def decoding_flops_per_token(config: ModelConfig, length: int | None = None) -> TokenFlops:
    """One token decoded with caches, whatever the number of streams: its G row once, its X row once.

    The aggregation state A [P, D] is read and updated once a token; the mean's state costs nothing worth counting.
    """
    length = config.max_length if length is None else length
    state = 2 * config.positional_width * config.width
    aggregator = {"positional": 3 * state, "mean": state}.get(config.aggregator, 0)
    return _forward(config, length, aggregator)

"""Which of our models are in the natural order exactly a Llama, a Qwen or a GPT-2, and their config.json.

Such a network has the aggregator `shift`. In the natural order, a row of G then begins as the vector of the token
before its target, as the row of an autoregressive model does. What it sees is the same, if it stands where that token
stands, or if there is no stream X to tell the difference (RoPE is relative, and learned positions can be moved by one).
"""

import dataclasses
from typing import Any, assert_never

import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core.sizes import embedding_scale, mlp_width, prediction_offset
from armd_jax.interop.readable import Readable
from armd_jax.names import HuggingFaceFamily


@dataclasses.dataclass(frozen=True)
class Native:
    """How a model is written for the code of transformers.

    family: whose names its weights get. fields: of its config.json. model: what the table of names is asked with.
    bos: the token whose vector is our start token. scale: by which the table of embeddings is multiplied, if it is no
    longer the head as well. first_position: row of our table of positions at which theirs begins.
    """

    family: HuggingFaceFamily
    fields: dict[str, Any]
    model: ModelConfig
    bos: int
    scale: float
    first_position: int


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """RoPE as a config.json has it."""
    found: dict[str, Any] = {"rope_theta": config.rope_base}
    match config.rope_scaling:
        case "none":
            return found | {"rope_type": "default"}
        case "linear":
            return found | {"rope_type": "linear", "factor": config.rope_factor}
        case "llama3":
            return found | {
                "rope_type": "llama3",
                "factor": config.rope_factor,
                "low_freq_factor": config.rope_low,
                "high_freq_factor": config.rope_high,
                "original_max_position_embeddings": config.rope_original_length,
            }
        case _:
            assert_never(config.rope_scaling)


def fit(source: Readable) -> Native | str:
    """How to write the model for transformers' own code, or why that is not possible."""
    config = source.config
    fault = _order_fault(config)
    if fault:
        return fault
    match config.norm:
        case "rmsnorm":
            found = _llama(config)
        case "layernorm":
            found = _gpt2(config)
        case _:
            assert_never(config.norm)
    if isinstance(found, str):
        return found
    family, fields = found
    scale = embedding_scale(config)
    bos = _row_of_start(source, scale)
    if bos is None:
        return "its start token is the vector of no token, so that no first token of a text could stand for it"
    # A scale cannot stay in a table that is the head too.
    tied = config.tie_embeddings and scale == 1.0
    fields |= {"tie_word_embeddings": tied, "bos_token_id": bos}
    first = 1 if config.learned_positions and not prediction_offset(config) else 0
    model = dataclasses.replace(config, tie_embeddings=tied)
    return Native(family, fields, model, bos, scale, first)


def _order_fault(config: ModelConfig) -> str:
    match config.aggregator:
        case "shift":
            pass
        case "positional" | "mean" | "neighbours":
            return f"aggregator={config.aggregator} is no part of those networks"
        case _:
            assert_never(config.aggregator)
    if config.two_stream_layers and not prediction_offset(config):
        return "with two-stream layers, rows that predict have to stand one position before their targets"
    return "logits are capped" if config.logit_cap else ""


def _llama(config: ModelConfig) -> tuple[HuggingFaceFamily, dict[str, Any]] | str:
    match config.mlp:
        case "swiglu":
            pass
        case "gelu":
            return "norm=rmsnorm with mlp=gelu is none of those networks"
        case _:
            assert_never(config.mlp)
    if config.learned_positions:
        return "norm=rmsnorm with learned positions is none of those networks"
    qkv, out = config.qkv_bias, config.attention_out_bias
    fields: dict[str, Any] = {}
    if config.qk_norm and qkv == out and not config.mlp_bias:
        if config.norm_epsilon != 1e-6:
            return "a Qwen3 has norms of queries and keys with the same epsilon as all others, and here it is 1e-6"
        name, fields = "Qwen3", {"attention_bias": qkv}
    elif qkv and not out and not config.qk_norm and not config.mlp_bias:
        name, fields = "Qwen2", {"use_sliding_window": False}
    elif qkv == out and not config.qk_norm:
        name, fields = "Llama", {"attention_bias": qkv, "mlp_bias": config.mlp_bias}
    else:
        return "none of those networks has norms of queries and keys and biases in this combination"
    return "llama", fields | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": mlp_width(config),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": (rope := rope_parameters(config)),
        "rope_theta": rope["rope_theta"],  # before version 5 of transformers, and for most other programs
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "attention_dropout": 0.0,
    }


def _gpt2(config: ModelConfig) -> tuple[HuggingFaceFamily, dict[str, Any]] | str:
    match config.mlp:
        case "gelu":
            pass
        case "swiglu":
            return "norm=layernorm with mlp=swiglu is none of those networks"
        case _:
            assert_never(config.mlp)
    if not (config.qkv_bias and config.attention_out_bias and config.mlp_bias):
        return "norm=layernorm without a bias in every matrix is none of those networks"
    if not config.learned_positions:
        return "norm=layernorm without learned positions is none of those networks"
    if config.qk_norm or config.kv_heads != config.num_heads or config.head_width * config.num_heads != config.width:
        return "a GPT-2 has no grouped queries, no heads of another width and no norms of queries and keys"
    return "gpt2", {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.learned_positions - 1 + prediction_offset(config),
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": mlp_width(config),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _row_of_start(source: Readable, scale: float) -> int | None:
    """The token whose vector is the start token, to the last bit; None if there is none."""
    table_VD = source.read("embedding")
    start_D = source.read("start")
    for token in np.flatnonzero(table_VD[:, 0] * np.float32(scale) == start_D[0]):
        if (table_VD[token] * np.float32(scale) == start_D).all():
            return int(token)
    return None

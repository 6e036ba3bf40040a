"""One table of weights for both directions: what each of ours is called and how it lies in Hugging Face's models.

Hugging Face keeps a linear layer as [out, in], GPT-2 as [in, out], and heads and their width as one axis. Ours are
[in, out] with an axis for each, and keys lie beside values. The table names ours as exports do (`layers.3.query`), so
that a model can be read and written one entry at a time.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import assert_never

import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.names import HuggingFaceFamily

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Weights of ours that correspond to weights of theirs.

    to_ours, to_theirs: give one side's arrays, in the sequence of its names, from the other's. They change layouts and
    never values.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]


def table(family: HuggingFaceFamily, config: ModelConfig) -> Iterator[Entry]:
    """All entries of a model. Those of llama and gpt2 leave out what only an ARMD has: start token and aggregator.

    armd: the names of Llama, as far as it has such weights.
    """
    match family:
        case "llama" | "armd":
            yield _same("embedding", "model.embed_tokens.weight")
            if family == "armd":
                yield from _armd_alone(config)
            for number in range(config.num_layers):
                yield from _llama_layer(config, f"layers.{number}.", f"model.layers.{number}.")
            yield from _norm(config, "final_norm", "model.norm")
        case "gpt2":
            yield _same("embedding", "transformer.wte.weight")
            yield _same("positions", "transformer.wpe.weight")
            for number in range(config.num_layers):
                yield from _gpt2_layer(config, f"layers.{number}.", f"transformer.h.{number}.")
            yield from _norm(config, "final_norm", "transformer.ln_f")
        case _:
            assert_never(family)
    if not config.tie_embeddings:
        yield _turned("head", "lm_head.weight")


def _armd_alone(config: ModelConfig) -> Iterator[Entry]:
    """Start token, learned positions and aggregator."""
    yield _same("start", "model.start")
    if config.learned_positions:
        yield _same("positions", "model.embed_positions.weight")
    ours, theirs = "aggregator.", "model.aggregator."
    match config.aggregator:
        case "positional" | "mean":
            yield from _prefix_sum(ours, theirs)
        case "neighbours":
            if config.positional_gain:
                yield from _prefix_sum(ours + "sum.", theirs + "sum.")
            else:
                yield from _position(ours, theirs)
            match config.neighbours:
                case "left":
                    sides = ["left"]
                case "both":
                    sides = ["left", "right"]
                case _:
                    assert_never(config.neighbours)
            for side in sides:
                yield _same(f"{ours}unseen_{side}", f"{theirs}unseen_{side}")
                yield _turned(ours + side, f"{theirs}{side}.weight")
        case "shift":
            pass
        case _:
            assert_never(config.aggregator)


def _prefix_sum(ours: str, theirs: str) -> Iterator[Entry]:
    yield _same(ours + "norm.scale", theirs + "norm.weight")
    yield from _position(ours, theirs)


def _position(ours: str, theirs: str) -> Iterator[Entry]:
    yield _turned(ours + "position.kernel", theirs + "position.weight")
    yield _same(ours + "position.bias", theirs + "position.bias")


def _llama_layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    width, heads, kv_heads, head_width = config.width, config.num_heads, config.kv_heads, config.head_width
    attention = theirs + "self_attn."
    yield from _norm(config, ours + "attention_norm", theirs + "input_layernorm")
    yield Entry(
        (ours + "query",),
        (attention + "q_proj.weight",),
        lambda a: (a[0].T.reshape(width, heads, head_width),),
        lambda a: (a[0].reshape(width, -1).T,),
    )
    yield Entry(
        (ours + "key_value",),
        (attention + "k_proj.weight", attention + "v_proj.weight"),
        lambda a: (np.stack([each.T.reshape(width, kv_heads, head_width) for each in a], axis=1),),
        lambda a: tuple(a[0][:, side].reshape(width, -1).T for side in (0, 1)),
    )
    yield Entry(
        (ours + "attention_out",),
        (attention + "o_proj.weight",),
        lambda a: (a[0].T.reshape(heads, head_width, width),),
        lambda a: (a[0].reshape(-1, width).T,),
    )
    if config.qkv_bias:
        yield Entry(
            (ours + "query_bias",),
            (attention + "q_proj.bias",),
            lambda a: (a[0].reshape(heads, head_width),),
            lambda a: (a[0].reshape(-1),),
        )
        yield Entry(
            (ours + "key_value_bias",),
            (attention + "k_proj.bias", attention + "v_proj.bias"),
            lambda a: (np.stack([each.reshape(kv_heads, head_width) for each in a]),),
            lambda a: tuple(a[0][side].reshape(-1) for side in (0, 1)),
        )
    if config.attention_out_bias:
        yield _same(ours + "attention_out_bias", attention + "o_proj.bias")
    if config.qk_norm:
        yield _same(ours + "query_norm.scale", attention + "q_norm.weight")
        yield _same(ours + "key_norm.scale", attention + "k_norm.weight")
    yield from _norm(config, ours + "mlp_norm", theirs + "post_attention_layernorm")
    matrices = [("mlp_in", "up_proj"), ("mlp_out", "down_proj")]
    match config.mlp:
        case "swiglu":
            matrices.insert(0, ("mlp_gate", "gate_proj"))
        case "gelu":
            pass
        case _:
            assert_never(config.mlp)
    for name, proj in matrices:
        yield _turned(ours + name, f"{theirs}mlp.{proj}.weight")
        if config.mlp_bias:
            yield _same(f"{ours}{name}_bias", f"{theirs}mlp.{proj}.bias")


def _gpt2_layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    width, heads, head_width = config.width, config.num_heads, config.head_width
    yield from _norm(config, ours + "attention_norm", theirs + "ln_1")
    yield Entry(
        (ours + "query", ours + "key_value"),
        (theirs + "attn.c_attn.weight",),
        lambda a: (
            a[0][:, :width].reshape(width, heads, head_width),
            a[0][:, width:].reshape(width, 2, heads, head_width),
        ),
        lambda a: (np.concatenate([each.reshape(width, -1) for each in a], axis=1),),
    )
    yield Entry(
        (ours + "query_bias", ours + "key_value_bias"),
        (theirs + "attn.c_attn.bias",),
        lambda a: (a[0][:width].reshape(heads, head_width), a[0][width:].reshape(2, heads, head_width)),
        lambda a: (np.concatenate([each.reshape(-1) for each in a]),),
    )
    yield Entry(
        (ours + "attention_out",),
        (theirs + "attn.c_proj.weight",),
        lambda a: (a[0].reshape(heads, head_width, width),),
        lambda a: (a[0].reshape(-1, width),),
    )
    yield _same(ours + "attention_out_bias", theirs + "attn.c_proj.bias")
    yield from _norm(config, ours + "mlp_norm", theirs + "ln_2")
    for name, proj in (("mlp_in", "c_fc"), ("mlp_out", "c_proj")):
        yield _same(ours + name, f"{theirs}mlp.{proj}.weight")
        yield _same(f"{ours}{name}_bias", f"{theirs}mlp.{proj}.bias")


def _same(ours: str, theirs: str) -> Entry:
    return Entry((ours,), (theirs,), lambda a: a, lambda a: a)


def _turned(ours: str, theirs: str) -> Entry:
    return Entry((ours,), (theirs,), lambda a: (a[0].T,), lambda a: (a[0].T,))


def _norm(config: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    yield _same(ours + ".scale", theirs + ".weight")
    match config.norm:
        case "layernorm":
            yield _same(ours + ".bias", theirs + ".bias")
        case "rmsnorm":
            pass
        case _:
            assert_never(config.norm)

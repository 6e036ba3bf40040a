"""Small pretrained models, written as Hugging Face's folders, and what they compute, written from their papers.

The forward passes share no code with the package: float64, one text at a time, attention without a cache.
"""

import functools
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers as library

from armd_jax.config import Config, ModelConfig
from armd_jax.core import parameters
from armd_jax.data import tokenizers
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import load

END = "<|endoftext|>"
WIDTH, HEADS, KV_HEADS, HEAD, MLP, LAYERS, POSITIONS = 24, 4, 2, 6, 40, 2, 40
TEXT = ["The old river moves slowly under a stone bridge.", "It's 1,234 degrees, we've seen 99% of them.", "naïve ½"]

Weights = dict[str, np.ndarray]


# --- configs ----------------------------------------------------------------------------------------------------------


def _llama(**changes: Any) -> dict[str, Any]:
    fields = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    }
    return fields | changes


def _gpt2(**changes: Any) -> dict[str, Any]:
    fields = {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
    return fields | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5} | changes


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "gpt2": _gpt2(),
    "gpt2 untied, of another MLP": _gpt2(tie_word_embeddings=False, n_inner=3 * WIDTH),
    "llama with grouped queries": _llama(),
    "llama with one head of keys": _llama(num_key_value_heads=1),
    "llama without groups, untied": _llama(num_key_value_heads=HEADS, tie_word_embeddings=False),
    "llama with all biases": _llama(attention_bias=True, mlp_bias=True),
    "llama with wide heads": _llama(head_dim=10),
    "llama with linear scaling": _llama(rope_scaling={"type": "linear", "factor": 2.5}),
    # At these factors one frequency is kept, one is divided, and one lies between.
    "llama 3": _llama(rope_scaling=_LLAMA3 | {"original_max_position_embeddings": 64}),
    "qwen2": _llama(model_type="qwen2"),
    "qwen3": _llama(model_type="qwen3", head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=False),
    "mistral": _llama(model_type="mistral", sliding_window=None, rope_theta=1e4),
}


# --- weights ----------------------------------------------------------------------------------------------------------


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights of a config, as Hugging Face's modules have them."""
    vocab = config["vocab_size"]
    if config["model_type"] == "gpt2":
        width, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
        shapes = {"transformer.wte.weight": (vocab, width), "transformer.wpe.weight": (config["n_positions"], width)}
        linear = {"attn.c_attn": 3 * width, "attn.c_proj": width, "mlp.c_fc": inner, "mlp.c_proj": width}
        norms = ["transformer.ln_f"]
        for i in range(config["n_layer"]):
            norms += [f"transformer.h.{i}.ln_1", f"transformer.h.{i}.ln_2"]
            for name, out in linear.items():
                into = inner if name == "mlp.c_proj" else width
                shapes |= {f"transformer.h.{i}.{name}.weight": (into, out), f"transformer.h.{i}.{name}.bias": (out,)}
        shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
        return shapes if config.get("tie_word_embeddings", True) else shapes | {"lm_head.weight": (vocab, width)}
    kind, width, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {layer + name + ".weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        linear = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width)}
        for name, shape in (linear | {"o_proj": (width, queries)}).items():
            shapes[f"{layer}self_attn.{name}.weight"] = shape
            if config.get("attention_bias") or (kind == "qwen2" and name != "o_proj"):
                shapes[f"{layer}self_attn.{name}.bias"] = shape[:1]
        for name, shape in {
            "gate_proj": (inner, width),
            "up_proj": (inner, width),
            "down_proj": (width, inner),
        }.items():
            shapes[f"{layer}mlp.{name}.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{layer}mlp.{name}.bias"] = shape[:1]
        if kind == "qwen3":
            shapes |= {f"{layer}self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (vocab, width)}


def _weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """Random float32 weights, none of them near 0 or 1 as a whole, so that nothing can be left out unnoticed."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        is_norm = len(shape) == 1 and name.endswith("weight")
        std = 0.3 if len(shape) == 1 else 0.5 if name.endswith(("wte.weight", "embed_tokens.weight")) else 0.25
        return (is_norm + std * rng.standard_normal(shape)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in _shapes(config).items()}


# --- what these models compute ----------------------------------------------------------------------------------------


def _softmax(a: np.ndarray) -> np.ndarray:
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _attend(q_QHK: np.ndarray, k_TJK: np.ndarray, v_TJK: np.ndarray) -> np.ndarray:
    """Causal attention [Q, H K]; a head of keys serves neighbouring heads of queries."""
    length, heads, size = q_QHK.shape
    out = np.zeros(q_QHK.shape)
    for head in range(heads):
        own = head * k_TJK.shape[1] // heads
        scores = np.where(np.tri(length, dtype=bool), q_QHK[:, head] @ k_TJK[:, own].T / size**0.5, -np.inf)
        out[:, head] = _softmax(scores) @ v_TJK[:, own]
    return out.reshape(length, -1)


def _frequencies(config: dict[str, Any], size: int) -> np.ndarray:
    """RoPE's angles per position, by the wave lengths of Llama 3's description."""
    base = config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    scaling = config.get("rope_scaling") or {}
    match scaling.get("rope_type", scaling.get("type")):
        case None:
            return base
        case "linear":
            return base / scaling["factor"]
    low, high, old = (
        scaling[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    out = []
    for one in base:
        wave = 2 * np.pi / one
        if wave < old / high:
            out.append(one)
        elif wave > old / low:
            out.append(one / scaling["factor"])
        else:
            smooth = (old / wave - low) / (high - low)
            out.append((1 - smooth) * one / scaling["factor"] + smooth * one)
    return np.asarray(out)


def _llama_logits(config: dict[str, Any], weights: Weights, ids: np.ndarray) -> np.ndarray:
    kind, eps, length = config["model_type"], config["rms_norm_eps"], len(ids)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turn = np.exp(1j * np.outer(np.arange(length), _frequencies(config, size)))[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[name + ".weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    def rotated(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    h = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        x = norm(h, layer + "input_layernorm")
        q, k, v = (linear(x, f"{layer}self_attn.{name}_proj").reshape(length, -1, size) for name in "qkv")
        if kind == "qwen3":
            q, k = norm(q, layer + "self_attn.q_norm"), norm(k, layer + "self_attn.k_norm")
        h = h + linear(_attend(rotated(q), rotated(k), v), layer + "self_attn.o_proj")
        x = norm(h, layer + "post_attention_layernorm")
        gate = linear(x, layer + "mlp.gate_proj")
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm(h, "model.norm") @ weights[head + ".weight"].T


def _gpt2_logits(config: dict[str, Any], weights: Weights, ids: np.ndarray) -> np.ndarray:
    length = len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_epsilon"])
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[name + ".weight"] + weights[name + ".bias"]

    h = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:length]
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}."
        qkv = linear(norm(h, layer + "ln_1"), layer + "attn.c_attn")
        q, k, v = (part.reshape(length, config["n_head"], -1) for part in np.split(qkv, 3, -1))
        h = h + linear(_attend(q, k, v), layer + "attn.c_proj")
        x = linear(norm(h, layer + "ln_2"), layer + "mlp.c_fc")
        x = x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
        h = h + linear(x, layer + "mlp.c_proj")
    tied = config.get("tie_word_embeddings", True)
    return norm(h, "transformer.ln_f") @ weights["transformer.wte.weight" if tied else "lm_head.weight"].T


def _log_probs(config: dict[str, Any], weights: Weights, tokens_BN: np.ndarray) -> np.ndarray:
    """The log-probabilities [B, N] of texts that follow the first token of the config, float64 nats."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    logits = _gpt2_logits if config["model_type"] == "gpt2" else _llama_logits
    rows = []
    for tokens_N in tokens_BN:
        found_NV = logits(config, weights, np.concatenate([[config["bos_token_id"]], tokens_N[:-1]]))
        rows.append(np.log(_softmax(found_NV))[np.arange(len(tokens_N)), tokens_N])
    return np.asarray(rows)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tokenizer.json: byte-level BPE with 270 tokens, the last but one of which ends a text."""
    parts = library.pre_tokenizers
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = parts.ByteLevel(add_prefix_space=False), library.decoders.ByteLevel()
    alphabet = parts.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=268, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_special_tokens([END, "<pad>"])
    file = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def pretrained(byte_level: pathlib.Path) -> types.SimpleNamespace:
    """configs (complete), weights, log_probs, write, and save_tensors."""
    special = {"vocab_size": 270, "bos_token_id": 268, "eos_token_id": 268}

    def write(folder: pathlib.Path, config: dict[str, Any], weights: Weights | None = None) -> pathlib.Path:
        """A folder as Hugging Face has it, with tokenizer.json as the only file of the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_bytes(byte_level.read_bytes())
        safetensors.numpy.save_file(_weights(config) if weights is None else weights, folder / "model.safetensors")
        return folder

    return types.SimpleNamespace(
        configs={name: config | special for name, config in CONFIGS.items()},
        weights=_weights,
        log_probs=_log_probs,
        write=write,
    )


# --- small models of ours ---------------------------------------------------------------------------------------------

_SIZES = {"vocab_size": 257, "max_length": 32, "num_layers": 3, "two_stream_layers": 2, "width": 32, "num_heads": 4}
# Together they have every kind of aggregator, norm, MLP, bias, head, scale and position.
_ARMD: dict[str, dict[str, Any]] = {
    "default": {},
    "positional": {"aggregator": "positional", "norm": "rmsnorm", "mlp": "swiglu", "num_kv_heads": 2},
    "mean": {"aggregator": "mean", "two_stream_layers": 0, "tie_embeddings": False, "logit_cap": 5.0},
    "shift": {"aggregator": "shift", "two_stream_layers": 3, "qk_norm": True, "head_dim": 16},
    "both neighbours": {
        "neighbours": "both",
        "positional_gain": 0.0,
        "rope_scaling": "llama3",
        "rope_factor": 4.0,
        "rope_original_length": 16,
        "prediction_position": "previous",
        "qkv_bias": True,
    },
    "learned positions": {
        "learned_positions": 33,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "embedding_scale": "one",
        "two_stream_layers": 1,
        "neighbours": "both",
    },
    "scaled RoPE": {"rope_scaling": "linear", "rope_factor": 3.0, "mlp": "swiglu", "mlp_bias": True, "mlp_width": 48},
}


@pytest.fixture(scope="session")
def small_armd() -> types.SimpleNamespace:
    """configs, model(name) and of(config): with weights nowhere zero, so that none can be left out unnoticed."""

    @functools.cache
    def model(name: str) -> LanguageModel:
        return of(ModelConfig(**(_SIZES | {"positional_width": 16} | _ARMD[name])))

    def of(config: ModelConfig) -> LanguageModel:
        rng = np.random.default_rng(0)

        def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            scale = 1.5 * leaf.shape[-1] ** -0.5 if leaf.ndim > 1 else 1
            return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

        params = jax.tree.map(draw, jax.eval_shape(lambda: parameters.init(jax.random.key(0), config)))
        return LanguageModel(config, load.without_padding(params, Config(model=config)), tokenizers.BytesTokenizer())

    return types.SimpleNamespace(configs=_ARMD, model=model, of=of)

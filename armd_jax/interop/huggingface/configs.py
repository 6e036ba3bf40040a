"""The config of a pretrained autoregressive model as a `ModelConfig`, or a refusal that names the field in the way."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from armd_jax import typed
from armd_jax.config import ModelConfig
from armd_jax.core.sizes import mlp_width
from armd_jax.errors import UserError, shown
from armd_jax.names import HuggingFaceFamily

LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ARMD_TYPE = "armd"
_EVERY_TOKEN = "full_attention"
_MISSING = object()

# The fields of an exported ARMD: ours, and what Hugging Face's programs call those that Llama has too. The rest of ours
# decide no weight, or follow from the section of RoPE.
ARMD_FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "two_stream_layers": "two_stream_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
}
ARMD_FIELDS |= {
    name: name
    for name in (
        *("mlp", "norm", "norm_epsilon", "qkv_bias", "attention_out_bias", "mlp_bias", "aggregator", "neighbours"),
        *("positional_gain", "positional_width", "embedding_scale", "qk_norm", "logit_cap", "learned_positions"),
        "prediction_position",
    )
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a source's config says.

    model: its network as an autoregressive model of ours, with rows of its longest length; of armd, the model itself.
    start: the id of the token that its texts begin with; None: it has a start token beside its vocabulary.
    """

    family: HuggingFaceFamily
    model: ModelConfig
    start: int | None


def read(config: Mapping[str, Any], where: str) -> Pretrained:
    """The model of a config. Raises UserError if a field asks for what our network does not have."""
    fields = _Fields(config, where)
    kind = fields.text("model_type")
    fields.must_be("quantization_config", None, absent=None)
    if kind == "gpt2":
        return _gpt2(fields)
    if kind in LLAMA_TYPES:
        return _llama(fields, kind)
    if kind == ARMD_TYPE:
        return _armd(fields)
    known = ", ".join((*LLAMA_TYPES, "gpt2", ARMD_TYPE))
    raise fields.refusal("model_type", f"known are {known}")


class _Fields:
    """The fields of a config, read with errors that name them."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = values, where

    def refusal(self, name: str, reason: str) -> UserError:
        return UserError(f"{self.where}: {name}={shown(self._values.get(name))} cannot be imported: {reason}")

    def get(self, name: str, absent: Any = _MISSING) -> Any:
        value = self._values.get(name, absent)
        if value is _MISSING:
            raise UserError(f"{self.where}: has no field {name}")
        return value

    def must_be(self, name: str, *values: Any, absent: Any) -> None:
        if self.get(name, absent) not in values:
            raise self.refusal(name, f"expected {' or '.join(map(repr, values))}")

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.refusal(name, "expected a text")
        return value

    def count(self, name: str, absent: int | None = None) -> int:
        """A size. absent: what takes the place of none, which may be written as null."""
        value = self.get(name) if absent is None else self.get(name, None)
        if value is None and absent is not None:
            return absent
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise self.refusal(name, "expected a whole number from 1 to 2147483647")
        return value

    def number(self, name: str, absent: Any = _MISSING) -> float:
        value = self.get(name, absent)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.refusal(name, "expected a number above 0")
        return float(value)

    def flag(self, name: str, absent: bool) -> bool:
        value = self.get(name, absent)
        if not isinstance(value, bool):
            raise self.refusal(name, "expected true or false")
        return value

    def section(self, name: str) -> "_Fields | None":
        value = self.get(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refusal(name, "expected an object")
        return _Fields(value, f"{self.where}: {name}")

    def start(self) -> int:
        """The token that texts begin with: bos, or what ends a text if there is no bos."""
        for name in ("bos_token_id", "eos_token_id"):
            value = self.get(name, None)
            if isinstance(value, list) and value:
                value = value[0]
            if value is not None:
                if type(value) is not int or not 0 <= value < self.count("vocab_size"):
                    raise self.refusal(name, "expected an id of the vocabulary")
                return value
        raise UserError(f"{self.where}: has neither bos_token_id nor eos_token_id, one of which begins a text")


def _llama(fields: _Fields, kind: str) -> Pretrained:
    fields.must_be("hidden_act", "silu", absent="silu")
    fields.must_be("pretraining_tp", 1, absent=1)
    fields.must_be("partial_rotary_factor", 1, None, absent=None)
    length = fields.count("max_position_embeddings")
    # What transformers takes for a field that is absent. Only Mistral's window is there without a switch.
    window = fields.get("sliding_window", 4096 if kind == "mistral" else None)
    if window is not None and fields.flag("use_sliding_window", kind == "mistral"):
        raise fields.refusal("sliding_window", "every token attends to all earlier ones here; null is no window")
    layer_types = fields.get("layer_types", None)
    if layer_types is not None and (not isinstance(layer_types, list) or set(map(str, layer_types)) - {_EVERY_TOKEN}):
        raise fields.refusal("layer_types", "every layer attends to all earlier tokens here")
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_width = fields.count("head_dim", absent=128 if kind == "qwen3" else max(width // heads, 1))
    # Biases that the models of the other types have, or do not have, whatever their configs say.
    biases = kind in ("llama", "qwen3") and fields.flag("attention_bias", False)
    epsilon = fields.number("rms_norm_eps", 1e-6)
    if kind == "qwen3" and epsilon != 1e-6:
        raise fields.refusal("rms_norm_eps", "norms of queries and keys have an epsilon of 1e-6 here")
    model = ModelConfig(
        vocab_size=fields.count("vocab_size"),
        max_length=length,
        num_layers=fields.count("num_hidden_layers"),
        two_stream_layers=0,
        width=width,
        num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", absent=heads),
        head_dim=0 if head_width * heads == width else head_width,
        mlp_width=fields.count("intermediate_size"),
        mlp="swiglu",
        norm="rmsnorm",
        norm_epsilon=epsilon,
        qkv_bias=biases or kind == "qwen2",
        attention_out_bias=biases,
        mlp_bias=kind == "llama" and fields.flag("mlp_bias", False),
        qk_norm=kind == "qwen3",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        **_rope(fields, length),
        **_AS_SOURCES,
    )
    return Pretrained("llama", model, fields.start())


def _gpt2(fields: _Fields) -> Pretrained:
    fields.must_be("activation_function", "gelu_new", "gelu_pytorch_tanh", absent="gelu_new")
    fields.must_be("scale_attn_weights", True, absent=True)
    fields.must_be("scale_attn_by_inverse_layer_idx", False, absent=False)
    fields.must_be("add_cross_attention", False, absent=False)
    length, width = fields.count("n_positions"), fields.count("n_embd")
    model = ModelConfig(
        vocab_size=fields.count("vocab_size"),
        max_length=length,
        num_layers=fields.count("n_layer"),
        two_stream_layers=0,
        width=width,
        num_heads=fields.count("n_head"),
        mlp_width=fields.count("n_inner", absent=4 * width),
        mlp="gelu",
        norm="layernorm",
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        learned_positions=length,
        **_AS_SOURCES,
    )
    return Pretrained("gpt2", model, fields.start())


def _armd(fields: _Fields) -> Pretrained:
    values = {ours: fields.get(theirs) for ours, theirs in ARMD_FIELDS.items()}
    rope = _rope(fields, fields.count("max_position_embeddings"))
    try:
        model = typed.build(ModelConfig, values | rope, largest=2**31 - 1)
        typed.check(model, "model")
    except UserError as error:
        raise UserError(f"{fields.where}: {error}") from error
    # Sizes that follow from others are written out for Hugging Face's programs, and stay open in ours.
    open_sizes = dataclasses.replace(model, num_kv_heads=0, head_dim=0, mlp_width=0)
    same: dict[str, Any] = {}
    if model.num_kv_heads == model.num_heads:
        same["num_kv_heads"] = 0
    if model.head_dim * model.num_heads == model.width:
        same["head_dim"] = 0
    if model.mlp_width == mlp_width(open_sizes):
        same["mlp_width"] = 0
    return Pretrained("armd", dataclasses.replace(model, **same), None)


# What every autoregressive source has in common: token vectors as they lie in the table, and predictions made one place
# before the token that they are for.
_AS_SOURCES: dict[str, Any] = {"embedding_scale": "one", "prediction_position": "previous", "aggregator": "shift"}


def _rope(fields: _Fields, length: int) -> dict[str, Any]:
    """The fields of RoPE, which newer configs have in one section and older ones in two places."""
    newer, older = (fields.get(name, None) or None for name in ("rope_parameters", "rope_scaling"))
    if newer is not None and older is not None and newer != older:
        raise fields.refusal("rope_scaling", "rope_parameters says something else")
    section = fields.section("rope_scaling" if newer is None else "rope_parameters")
    found: dict[str, Any] = {"rope_base": fields.number("rope_theta", 10_000.0)}
    if section is None:
        return found
    if section.get("rope_theta", None) is not None:
        found["rope_base"] = section.number("rope_theta")
    section.must_be("partial_rotary_factor", 1, None, absent=None)
    name = "rope_type" if section.get("rope_type", None) is not None else "type"
    match section.get(name, "default"):
        case "default":
            pass
        case "linear":
            found |= {"rope_scaling": "linear", "rope_factor": section.number("factor")}
        case "llama3":
            found |= {
                "rope_scaling": "llama3",
                "rope_factor": section.number("factor"),
                "rope_low": section.number("low_freq_factor"),
                "rope_high": section.number("high_freq_factor"),
                "rope_original_length": section.count("original_max_position_embeddings", absent=length),
            }
        case _:
            raise section.refusal(name, "known are default, linear and llama3")
    return found

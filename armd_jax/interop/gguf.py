"""A GGUF file as a source of pretrained weights that looks like a folder of Hugging Face.

Architectures: `llama`, `qwen2`, `qwen3` (dense) and `gpt2`. Whatever such a file says that the config of Hugging Face's
model of that name cannot say is refused, so that no model is read as another one.

llama.cpp keeps the weights in its own layout: each tensor's name is shorter, matrices are [out, in] throughout, and for
`llama` the rows of queries and keys are interleaved, because its rotary embedding turns neighbours rather than halves.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, assert_never

import numpy as np

from armd_jax.errors import UserError, shown
from armd_jax.interop.gguf_file import GgufFile
from armd_jax.interop.gguf_tokenizer import special_token_ids, tokenizer_files

Architecture = Literal["llama", "qwen2", "qwen3", "gpt2"]
# How a tensor differs from Hugging Face's: not at all, it is transposed, or it has the rows of query heads or of key
# heads, which some architectures interleave.
Layout = Literal["same", "transposed", "query rows", "key rows"]


@dataclasses.dataclass(frozen=True)
class _Row:
    """One kind of tensor: its names there and at Hugging Face, and its shape at Hugging Face in terms of sizes."""

    theirs: str
    ours: str
    shape: tuple[str, ...]
    layout: Layout = "same"


@dataclasses.dataclass(frozen=True)
class _Family:
    """The tensors of an architecture.

    Attributes:
      outside: those outside the layers.
      layer: those of every layer.
      optional: groups of a layer that are there as a whole or not at all.
      prefix: what stands before the number of a layer at Hugging Face.
      interleaved: whether rows of query heads and key heads are.
    """

    architecture: Architecture
    outside: tuple[_Row, ...]
    layer: tuple[_Row, ...]
    optional: tuple[tuple[_Row, ...], ...]
    prefix: str = "model.layers"
    interleaved: bool = False


_LLAMA = (
    _Row("token_embd.weight", "model.embed_tokens.weight", ("vocab", "width")),
    _Row("output_norm.weight", "model.norm.weight", ("width",)),
)
_LLAMA_LAYER = (
    _Row("attn_norm.weight", "input_layernorm.weight", ("width",)),
    _Row("attn_q.weight", "self_attn.q_proj.weight", ("queries", "width"), "query rows"),
    _Row("attn_k.weight", "self_attn.k_proj.weight", ("keys", "width"), "key rows"),
    _Row("attn_v.weight", "self_attn.v_proj.weight", ("keys", "width")),
    _Row("attn_output.weight", "self_attn.o_proj.weight", ("width", "queries")),
    _Row("ffn_norm.weight", "post_attention_layernorm.weight", ("width",)),
    _Row("ffn_gate.weight", "mlp.gate_proj.weight", ("mlp", "width")),
    _Row("ffn_up.weight", "mlp.up_proj.weight", ("mlp", "width")),
    _Row("ffn_down.weight", "mlp.down_proj.weight", ("width", "mlp")),
)
_QKV_BIAS = (
    _Row("attn_q.bias", "self_attn.q_proj.bias", ("queries",), "query rows"),
    _Row("attn_k.bias", "self_attn.k_proj.bias", ("keys",), "key rows"),
    _Row("attn_v.bias", "self_attn.v_proj.bias", ("keys",)),
)
_OUTPUT_BIAS = (_Row("attn_output.bias", "self_attn.o_proj.bias", ("width",)),)
_MLP_BIAS = (
    _Row("ffn_gate.bias", "mlp.gate_proj.bias", ("mlp",)),
    _Row("ffn_up.bias", "mlp.up_proj.bias", ("mlp",)),
    _Row("ffn_down.bias", "mlp.down_proj.bias", ("width",)),
)
_QK_NORM = (
    _Row("attn_q_norm.weight", "self_attn.q_norm.weight", ("head",)),
    _Row("attn_k_norm.weight", "self_attn.k_norm.weight", ("head",)),
)
_GPT2 = (
    _Row("token_embd.weight", "transformer.wte.weight", ("vocab", "width")),
    _Row("position_embd.weight", "transformer.wpe.weight", ("positions", "width")),
    _Row("output_norm.weight", "transformer.ln_f.weight", ("width",)),
    _Row("output_norm.bias", "transformer.ln_f.bias", ("width",)),
)
_GPT2_LAYER = (
    _Row("attn_norm.weight", "ln_1.weight", ("width",)),
    _Row("attn_norm.bias", "ln_1.bias", ("width",)),
    _Row("attn_qkv.weight", "attn.c_attn.weight", ("width", "qkv"), "transposed"),
    _Row("attn_qkv.bias", "attn.c_attn.bias", ("qkv",)),
    _Row("attn_output.weight", "attn.c_proj.weight", ("width", "width"), "transposed"),
    _Row("attn_output.bias", "attn.c_proj.bias", ("width",)),
    _Row("ffn_norm.weight", "ln_2.weight", ("width",)),
    _Row("ffn_norm.bias", "ln_2.bias", ("width",)),
    _Row("ffn_up.weight", "mlp.c_fc.weight", ("width", "mlp"), "transposed"),
    _Row("ffn_up.bias", "mlp.c_fc.bias", ("mlp",)),
    _Row("ffn_down.weight", "mlp.c_proj.weight", ("mlp", "width"), "transposed"),
    _Row("ffn_down.bias", "mlp.c_proj.bias", ("width",)),
)
_HEAD = _Row("output.weight", "lm_head.weight", ("vocab", "width"))
_ATTENTION_BIAS = _QKV_BIAS + _OUTPUT_BIAS
_FAMILIES = {
    family.architecture: family
    for family in (
        _Family("llama", _LLAMA, _LLAMA_LAYER, (_ATTENTION_BIAS, _MLP_BIAS), interleaved=True),
        _Family("qwen2", _LLAMA, _LLAMA_LAYER + _QKV_BIAS, ()),
        _Family("qwen3", _LLAMA, _LLAMA_LAYER + _QK_NORM, (_ATTENTION_BIAS,)),
        _Family("gpt2", _GPT2, _GPT2_LAYER, (), prefix="transformer.h"),
    )
}
# Keys that change nothing if they have these values. Every other key of an architecture is read or refused.
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "attention.causal": True}


class GgufSource:
    """A GGUF file, seen as a folder of Hugging Face.

    Attributes:
      where: the file, for messages.
      config: the fields of the `config.json`; the base of the rotary embedding is `rope_theta`.
    """

    where: str
    config: Mapping[str, Any]

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the header. Raises UserError if the file is damaged, or if something in it is not supported."""
        self._file = GgufFile(path)
        self.where = self._file.where
        if self._file.whole("split.count", 1) != 1:
            raise self._file.wrong("split.count", "a whole model; merge the parts with llama-gguf-split")
        architecture = self._file.text("general.architecture")
        family = next((family for name, family in _FAMILIES.items() if name == architecture), None)
        if family is None:
            raise self._file.wrong("general.architecture", f"one of {', '.join(_FAMILIES)}")
        self._family = family
        self._keys: set[str] = set()  # those that have been read
        self._sizes = self._read_sizes()
        self._rows = self._read_rows()
        self.config = self._read_config() | special_token_ids(self._file)
        self._check_keys()

    @property
    def names(self) -> frozenset[str]:
        """The names of the tensors, as the modules of `transformers` call them."""
        return frozenset(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor at Hugging Face."""
        return tuple(self._sizes[size] for size in self._rows[name].shape)

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32, as Hugging Face has it. Raises UserError if there is none or it cannot be read."""
        if name not in self._rows:
            raise UserError(f"{self.where}: has no tensor {shown(name)}")
        row = self._rows[name]
        value = self._file.read(row.theirs)
        match row.layout:
            case "same":
                return value
            case "transposed":
                return np.ascontiguousarray(value.T)
            case "query rows":
                return _in_halves(value, self._sizes["heads"]) if self._family.interleaved else value
            case "key rows":
                return _in_halves(value, self._sizes["key heads"]) if self._family.interleaved else value
            case _:
                assert_never(row.layout)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer by name. Raises UserError if it is of a kind that is not supported."""
        return tokenizer_files(self._file, self._sizes["vocab"])

    def _key(self, key: str) -> str:
        """The full name of a key of the architecture, which is then one that has been read."""
        key = f"{self._family.architecture}.{key}"
        self._keys.add(key)
        return key

    def _read_sizes(self) -> dict[str, int]:
        """The sizes in which the shapes of tensors are given."""
        file, embedding = self._file, self._file.tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.where}: has no tensor 'token_embd.weight'")
        vocab, num_tensors = embedding.shape[0], len(file.tensors)
        names = {
            "width": "embedding_length",
            "heads": "attention.head_count",
            "mlp": "feed_forward_length",
            "positions": "context_length",
            "layers": "block_count",
        }
        sizes = {name: file.whole(self._key(key)) for name, key in names.items()}
        for name, key in names.items():
            if not sizes[name]:
                raise file.wrong(self._key(key), "a whole number above 0")
        if sizes["layers"] > num_tensors:  # checked before the names of all tensors are listed
            raise file.wrong(self._key("block_count"), f"fewer layers, as there are {num_tensors} tensors")
        heads, width = sizes["heads"], sizes["width"]
        key_heads = file.whole(self._key("attention.head_count_kv"), heads)
        head = file.whole(self._key("attention.key_length"), width // heads)
        if not key_heads or heads % key_heads:
            raise file.wrong(self._key("attention.head_count_kv"), f"a divisor of the {heads} heads")
        if not head or head % 2:  # the rotary embedding turns pairs
            key = self._key("attention.key_length")
            raise UserError(f"{self.where}: heads of {head} values ({key}): expected an even number")
        for key in ("attention.value_length", "rope.dimension_count"):
            if file.whole(self._key(key), head) != head:
                raise file.wrong(self._key(key), f"{head}, the width of a head; others are not supported")
        if file.whole(self._key("vocab_size"), vocab) != vocab:
            raise file.wrong(self._key("vocab_size"), f"{vocab}, as token_embd.weight has rows")
        queries, keys = heads * head, key_heads * head
        more = {"head": head, "key heads": key_heads, "vocab": vocab}
        return sizes | more | {"queries": queries, "keys": keys, "qkv": queries + 2 * keys}

    def _read_rows(self) -> dict[str, _Row]:
        """The tensors by Hugging Face's names. Raises UserError unless the file has exactly those of the model."""
        tensors, family = self._file.tensors, self._family
        rows = list(family.outside)
        layer = list(family.layer)
        for group in family.optional:
            layer += group if any(f"blk.0.{row.theirs}" in tensors for row in group) else ()
        for i in range(self._sizes["layers"]):
            for row in layer:
                theirs, ours = f"blk.{i}.{row.theirs}", f"{family.prefix}.{i}.{row.ours}"
                rows.append(dataclasses.replace(row, theirs=theirs, ours=ours))
        tied = "output.weight" not in tensors or self._file.are_equal("token_embd.weight", "output.weight")
        rows += [] if tied else [_HEAD]
        for row in rows:
            if row.theirs not in tensors:
                raise UserError(f"{self.where}: has no tensor {shown(row.theirs)}")
            sizes = tuple(self._sizes[name] for name in row.shape)
            wanted = sizes[::-1] if row.layout == "transposed" else sizes
            if tensors[row.theirs].shape != wanted:
                found = tensors[row.theirs].shape
                raise UserError(f"{self.where}: tensor {shown(row.theirs)} has shape {found}, expected {wanted}")
        extra = sorted(tensors.keys() - {row.theirs for row in rows} - {"output.weight"})
        if extra:
            raise UserError(
                f"{self.where}: tensor {shown(extra[0])} is none of a plain {family.architecture} model; models with"
                " others are not supported"
            )
        return {row.ours: row for row in rows}

    def _read_config(self) -> dict[str, Any]:
        """What the `config.json` says, without special tokens."""
        sizes, tied = self._sizes, "lm_head.weight" not in self._rows
        shared = {"vocab_size": sizes["vocab"], "tie_word_embeddings": tied}
        match self._family.architecture:
            case "gpt2":
                if not sizes["queries"] == sizes["keys"] == sizes["width"]:
                    raise self._file.wrong(
                        self._key("attention.head_count_kv"),
                        "the number of heads, which together are as wide as the model",
                    )
                return shared | {
                    "model_type": "gpt2",
                    "architectures": ["GPT2LMHeadModel"],
                    "n_embd": sizes["width"],
                    "n_layer": sizes["layers"],
                    "n_head": sizes["heads"],
                    "n_positions": sizes["positions"],
                    "n_inner": sizes["mlp"],
                    "activation_function": "gelu_new",
                    "layer_norm_epsilon": self._epsilon("attention.layer_norm_epsilon"),
                }
            case "llama":
                own: dict[str, Any] = {
                    "architectures": ["LlamaForCausalLM"],
                    "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._rows,
                    "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._rows,
                }
            case "qwen2":
                own = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
            case "qwen3":
                bias = "model.layers.0.self_attn.o_proj.bias" in self._rows
                own = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False, "attention_bias": bias}
            case _:
                assert_never(self._family.architecture)
        return shared | {
            "model_type": self._family.architecture,
            "hidden_size": sizes["width"],
            "intermediate_size": sizes["mlp"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["key heads"],
            "head_dim": sizes["head"],
            "max_position_embeddings": sizes["positions"],
            "hidden_act": "silu",
            "rms_norm_eps": self._epsilon("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._file.real(self._key("rope.freq_base"), 10_000.0),  # llama.cpp's default too
            "rope_scaling": None,
            **own,
        }

    def _epsilon(self, key: str) -> float:
        """A number that was written in float32, as it was before: 1e-5, not 9.99999974e-06."""
        return float(str(np.float32(self._file.real(self._key(key)))))

    def _check_keys(self) -> None:
        """Raises UserError if the file says something about its architecture that nobody has read."""
        for key, value in self._file.values.items():
            architecture, _, name = key.partition(".")
            if architecture == self._family.architecture and key not in self._keys:
                if name in _NEUTRAL and type(value) is type(_NEUTRAL[name]) and value == _NEUTRAL[name]:
                    continue
                raise UserError(f"{self.where}: {shown(key)}={shown(value)}: not supported")


def _in_halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads, [heads * K, ...], whose two halves llama.cpp has interleaved, as they were before."""
    pairs = value.reshape(heads, len(value) // heads // 2, 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)

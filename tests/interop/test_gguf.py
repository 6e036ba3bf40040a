"""GGUF files: weights, configs and tokenizers are those that were written. Damaged or foreign files are one line."""

import io
import json
import pathlib
import random
import struct
import sys
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers as library

from armd_jax.data import tokenizers
from armd_jax.errors import UserError
from armd_jax.interop import importing
from armd_jax.interop.gguf import GgufSource
from armd_jax.interop.gguf_file import GgufFile

gguf = pytest.importorskip("gguf")

WIDTH, MLP, HEADS, KEY_HEADS, HEAD, VOCAB, POSITIONS, LAYERS = 64, 96, 4, 2, 16, 40, 24, 2
ARCHITECTURES = ["llama", "llama with biases", "qwen2", "qwen3", "gpt2"]
END = "<|endoftext|>"
TEXTS = [
    "The old river moves slowly under a stone bridge",
    "It's 1,234.50 degrees, I'LL say; we've seen 99% of them",
    "Déjà vu: naïve façade, Straße; De\u0301ja\u0300 vu",
    "古い川がユックリと流れる \U0001f600\u2764\ufe0f",
    "def f(x):\n    return  x ** 2  # squared\n\n\n",
    "  leading and trailing  \r\n\ttabs",
    "\u00bd \u2167 \u0663\u0664 12345678 90",
    f"{END} is text <tool> and a<tool>b",
    "",
]


# --- files to read ----------------------------------------------------------------------------------------------------


def _interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head is row i of its first half, row 2i + 1 that of its second half."""
    out = np.empty_like(value)
    size = len(value) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = value[head * size + i]
            out[head * size + 2 * i + 1] = value[head * size + size // 2 + i]
    return out


def _llama_weights(name: str, draw: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights under the names of Hugging Face, and as llama.cpp keeps them."""
    ours, theirs = {}, {}

    def add(own: str, there: str, *shape: int, heads: int = 0) -> None:
        ours[own] = draw(*shape)
        theirs[there] = _interleaved(ours[own], heads) if heads and name.startswith("llama") else ours[own]

    queries, keys = HEADS * HEAD, KEY_HEADS * HEAD
    add("model.embed_tokens.weight", "token_embd.weight", VOCAB, WIDTH)
    add("model.norm.weight", "output_norm.weight", WIDTH)
    add("lm_head.weight", "output.weight", VOCAB, WIDTH)
    for i in range(LAYERS):
        own, there = f"model.layers.{i}.", f"blk.{i}."
        add(own + "input_layernorm.weight", there + "attn_norm.weight", WIDTH)
        add(own + "post_attention_layernorm.weight", there + "ffn_norm.weight", WIDTH)
        add(own + "self_attn.q_proj.weight", there + "attn_q.weight", queries, WIDTH, heads=HEADS)
        add(own + "self_attn.k_proj.weight", there + "attn_k.weight", keys, WIDTH, heads=KEY_HEADS)
        add(own + "self_attn.v_proj.weight", there + "attn_v.weight", keys, WIDTH)
        add(own + "self_attn.o_proj.weight", there + "attn_output.weight", WIDTH, queries)
        add(own + "mlp.gate_proj.weight", there + "ffn_gate.weight", MLP, WIDTH)
        add(own + "mlp.up_proj.weight", there + "ffn_up.weight", MLP, WIDTH)
        add(own + "mlp.down_proj.weight", there + "ffn_down.weight", WIDTH, MLP)
        if name in ("llama with biases", "qwen2"):
            add(own + "self_attn.q_proj.bias", there + "attn_q.bias", queries, heads=HEADS)
            add(own + "self_attn.k_proj.bias", there + "attn_k.bias", keys, heads=KEY_HEADS)
            add(own + "self_attn.v_proj.bias", there + "attn_v.bias", keys)
        if name == "llama with biases":
            add(own + "self_attn.o_proj.bias", there + "attn_output.bias", WIDTH)
            add(own + "mlp.gate_proj.bias", there + "ffn_gate.bias", MLP)
            add(own + "mlp.up_proj.bias", there + "ffn_up.bias", MLP)
            add(own + "mlp.down_proj.bias", there + "ffn_down.bias", WIDTH)
        if name == "qwen3":
            add(own + "self_attn.q_norm.weight", there + "attn_q_norm.weight", HEAD)
            add(own + "self_attn.k_norm.weight", there + "attn_k_norm.weight", HEAD)
    return ours, theirs


def _gpt2_weights(draw: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    ours, theirs = {}, {}

    def add(own: str, there: str, *shape: int) -> None:
        ours[own] = draw(*shape)
        theirs[there] = ours[own].T if len(shape) == 2 and ".h." in own else ours[own]

    add("transformer.wte.weight", "token_embd.weight", VOCAB, WIDTH)
    add("transformer.wpe.weight", "position_embd.weight", POSITIONS, WIDTH)
    norms = [("transformer.ln_f", "output_norm")]
    for i in range(LAYERS):
        own, there = f"transformer.h.{i}.", f"blk.{i}."
        norms += [(own + "ln_1", there + "attn_norm"), (own + "ln_2", there + "ffn_norm")]
        sizes = {
            ("attn.c_attn", "attn_qkv"): (WIDTH, 3 * WIDTH),
            ("attn.c_proj", "attn_output"): (WIDTH, WIDTH),
            ("mlp.c_fc", "ffn_up"): (WIDTH, MLP),
            ("mlp.c_proj", "ffn_down"): (MLP, WIDTH),
        }
        for (mine, their), shape in sizes.items():
            add(own + mine + ".weight", there + their + ".weight", *shape)
            add(own + mine + ".bias", there + their + ".bias", shape[1])
    for mine, their in norms:
        add(mine + ".weight", their + ".weight", WIDTH)
        add(mine + ".bias", their + ".bias", WIDTH)
    return ours, theirs


def _weights(name: str, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    return _gpt2_weights(draw) if name == "gpt2" else _llama_weights(name, draw)


def _keys(name: str) -> dict[str, Any]:
    architecture = name.split()[0]
    norm = "layer_norm_epsilon" if name == "gpt2" else "layer_norm_rms_epsilon"
    keys = {
        "block_count": LAYERS,
        "context_length": POSITIONS,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        f"attention.{norm}": 1e-6,
    }
    if name != "gpt2":
        keys |= {"attention.head_count_kv": KEY_HEADS, "rope.freq_base": 5e5}
    if name == "qwen3":
        keys |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _write(
    path: pathlib.Path, architecture: str, keys: dict[str, Any], tensors: dict[str, np.ndarray], kind: str = "F32"
) -> pathlib.Path:
    """A GGUF file. kind: the type of its matrices, whose names do not end in `norm.weight`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, value in tensors.items():
        chosen = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(value), chosen)
        writer.add_tensor(name, data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _file(path: pathlib.Path, name: str = "llama", kind: str = "F32") -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A file of an architecture, and its weights as Hugging Face has them."""
    ours, theirs = _weights(name)
    return _write(path / "model.gguf", name.split()[0], _keys(name), theirs, kind), ours


def _refused(path: pathlib.Path) -> str:
    """The line of the error about a file, whose tensors and tokenizer are read too."""
    with pytest.raises(UserError) as caught:
        source = GgufSource(path)
        for name in source.names:
            source.read(name)
        source.tokenizer_files()
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{path}: ")
    return line


# --- weights and config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_those_of_hugging_face(tmp_path, name):
    """Names, shapes and every value are those of the model that was converted."""
    path, ours = _file(tmp_path, name)
    source = GgufSource(path)
    assert source.where == str(path) and source.names == ours.keys()
    for key, value in ours.items():
        found = source.read(key)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, value, err_msg=key)
    with pytest.raises(UserError, match="has no tensor 'model.rotary'"):
        source.read("model.rotary")


def test_rows_of_heads_are_turned_in_halves(tmp_path):
    """Attention scores in the file's layout, where neighbours are turned, are those of halves in Hugging Face's."""
    path, _ = _file(tmp_path)
    source, x = GgufSource(path), np.random.default_rng(1).standard_normal((6, WIDTH))
    angles = np.arange(6)[:, None] * 5e5 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turned(heads: np.ndarray, first: Any, second: Any) -> np.ndarray:
        out = np.empty_like(heads)
        out[..., first] = heads[..., first] * cos - heads[..., second] * sin
        out[..., second] = heads[..., first] * sin + heads[..., second] * cos
        return out

    def scores(read: Any, query: str, key: str, first: Any, second: Any) -> np.ndarray:
        q = turned((x @ read(query).T).reshape(6, HEADS, HEAD), first, second)
        k = turned((x @ read(key).T).reshape(6, KEY_HEADS, HEAD), first, second)
        return np.einsum("qhk,thk->hqt", q, np.repeat(k, HEADS // KEY_HEADS, axis=1))

    there = {one.name: one.data for one in gguf.GGUFReader(path).tensors}
    own = [f"model.layers.1.self_attn.{one}_proj.weight" for one in "qk"]
    expected = scores(
        there.__getitem__, "blk.1.attn_q.weight", "blk.1.attn_k.weight", slice(0, None, 2), slice(1, None, 2)
    )
    found = scores(source.read, *own, slice(0, HEAD // 2), slice(HEAD // 2, None))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_float32(tmp_path, kind):
    """A tensor is what its quantised form stands for, near what was quantised; rows of heads are reordered after it."""
    path, ours = _file(tmp_path, kind=kind)
    source, chosen = GgufSource(path), gguf.GGMLQuantizationType[kind]
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        there = gguf.quants.dequantize(gguf.quants.quantize(ours[key], chosen), chosen)
        found = source.read(key)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, there)
        assert np.abs(found - ours[key]).max() < {"F16": 1e-2, "BF16": 1e-1}.get(kind, 0.6)


def test_config_is_that_of_hugging_face(tmp_path):
    """The fields by which Hugging Face's models are built, with epsilons as they were before float32."""
    path, _ = _file(tmp_path, "llama with biases")
    assert dict(GgufSource(path).config) == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
    _, theirs = _weights("gpt2")
    special = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4}
    path = _write(tmp_path / "gpt2.gguf", "gpt2", _keys("gpt2") | special, theirs)
    assert dict(GgufSource(path).config) == {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCAB,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": POSITIONS,
        "n_inner": MLP,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 3,
        "eos_token_id": 4,
    }


def test_a_head_that_repeats_the_embedding_is_tied(tmp_path):
    """Older files of GPT-2 have its embedding twice. A head of its own is a tensor."""
    _, theirs = _weights("gpt2")
    head = {"output.weight": theirs["token_embd.weight"].copy()}
    source = GgufSource(_write(tmp_path / "tied.gguf", "gpt2", _keys("gpt2"), theirs | head))
    assert source.config["tie_word_embeddings"] and "lm_head.weight" not in source.names
    head["output.weight"][-1, -1] += 1
    source = GgufSource(_write(tmp_path / "own.gguf", "gpt2", _keys("gpt2"), theirs | head))
    assert not source.config["tie_word_embeddings"]
    np.testing.assert_array_equal(source.read("lm_head.weight"), head["output.weight"])


def test_a_gpt2_with_other_heads_is_refused(tmp_path):
    """Hugging Face's GPT-2 has as many key heads as heads, however the file is laid out."""
    _, theirs = _weights("gpt2")
    for i in range(LAYERS):
        for end in ("weight", "bias"):
            theirs[f"blk.{i}.attn_qkv.{end}"] = theirs[f"blk.{i}.attn_qkv.{end}"][: 2 * WIDTH]
    keys = _keys("gpt2") | {"gpt2.attention.head_count_kv": KEY_HEADS}
    path = _write(tmp_path / "model.gguf", "gpt2", keys, theirs)
    assert "gpt2.attention.head_count_kv=2: expected the number of heads" in _refused(path)


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_type_is_read_or_refused(tmp_path, kind):
    """Bytes of any type are numbers in float32, or the error names the type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    header = (_start(tensors=1) + _tensor(256, 2, kind=kind)).ljust(96, b"\0")
    path = tmp_path / "model.gguf"
    path.write_bytes(header + np.random.default_rng(0).bytes(2 * 256 // block * size))
    file = GgufFile(path)
    if kind.name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0"):
        with pytest.raises(UserError, match=f"model.gguf: tensor 'a' has the unsupported type {kind.name}$"):
            file.read("a")
    else:
        assert file.read("a").shape == (2, 256) and file.read("a").dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_those_that_transformers_reads(tmp_path, name):
    """The config makes the model of `transformers`, whose own reader gives it the same tensors."""
    pytest.importorskip("accelerate")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path, _ = _file(tmp_path, name)
    source = GgufSource(path)
    config = transformers.AutoConfig.for_model(**source.config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, dtype=torch.float32
    )
    theirs = model.state_dict()
    assert source.names <= theirs.keys()
    for key in source.names:
        np.testing.assert_array_equal(source.read(key), theirs[key].numpy(), err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama with biases", "qwen3", "gpt2"])
def test_an_import_is_that_of_the_folder(tmp_path, name):
    """A file and the folder that it was converted from are imported as the same model, config and tokenizer."""
    keys = _bpe_keys(_trained("gpt-2"), "gpt-2")
    ours, theirs = _weights(name)
    rng = np.random.default_rng(1)
    for own, there in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("transformer.wte.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        if own in ours:
            ours[own] = theirs[there] = rng.standard_normal((len(keys["tokenizer.ggml.tokens"]), WIDTH), np.float32)
    file = GgufSource(_write(tmp_path / "model.gguf", name.split()[0], _keys(name) | keys, theirs))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(file.config)))
    safetensors.numpy.save_file(ours, folder / "model.safetensors")
    _trained("gpt-2").save(str(folder / "tokenizer.json"))
    for source in (one := importing.open_source(folder)), file:
        assert {each: source.shape(each) for each in source.names} == {each: a.shape for each, a in ours.items()}
    (first, config), (second, other_config) = importing.open_model(one), importing.open_model(file)
    lm, other = first.load(), second.load()
    assert config == other_config and lm.tokenizer.vocab_size == other.tokenizer.vocab_size == lm.config.vocab_size
    assert [lm.tokenizer.encode(text) for text in TEXTS] == [other.tokenizer.encode(text) for text in TEXTS]
    assert jax.tree.structure(lm.params) == jax.tree.structure(other.params)
    for a, b in zip(jax.tree.leaves(lm.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)


# --- tokenizers -------------------------------------------------------------------------------------------------------

CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _trained(pre: str) -> library.Tokenizer:
    """A tokenizer of the library that cuts text as the models of this name do, with an added token in text."""
    tokenizer, parts = library.Tokenizer(library.models.BPE(ignore_merges=pre == "llama-bpe")), library.pre_tokenizers
    in_bytes = parts.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    match pre:
        case "gpt-2":
            tokenizer.pre_tokenizer = in_bytes
        case "smollm":
            tokenizer.pre_tokenizer = parts.Sequence([parts.Digits(individual_digits=True), in_bytes])
        case "llama-bpe" | "qwen2":
            digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
            tokenizer.normalizer = library.normalizers.NFC() if pre == "qwen2" else None
            words = parts.Split(library.Regex(CASES + digits + REST), behavior="isolated")
            tokenizer.pre_tokenizer = parts.Sequence([words, in_bytes])
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END], initial_alphabet=parts.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([library.AddedToken("<tool>", normalized=False)])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _bpe_keys(tokenizer: library.Tokenizer, pre: str) -> dict[str, Any]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = {END: 3, "<tool>": 4}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab[END],
        "tokenizer.ggml.eos_token_id": vocab[END],
        "tokenizer.ggml.add_bos_token": False,
    }


def _with_tokenizer(path: pathlib.Path, keys: dict[str, Any]) -> GgufSource:
    _, theirs = _weights("gpt2")
    theirs["token_embd.weight"] = np.zeros((len(keys["tokenizer.ggml.tokens"]), WIDTH), np.float32)
    return GgufSource(_write(path / "model.gguf", "gpt2", _keys("gpt2") | keys, theirs))


def _loaded(source: GgufSource, folder: pathlib.Path) -> tokenizers.Tokenizer:
    folder.mkdir()
    for name, content in source.tokenizer_files().items():
        (folder / name).write_bytes(content)
    return tokenizers.load(folder)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_comes_back(tmp_path, pre):
    """Texts have the ids of the tokenizer that was converted, and are cut and given back."""
    original = _trained(pre)
    found = _loaded(_with_tokenizer(tmp_path, _bpe_keys(original, pre)), tmp_path / "tokenizer")
    assert found.vocab_size == original.get_vocab_size() and found.end_of_text == original.token_to_id(END)
    for text in TEXTS:
        assert found.encode(text) == original.encode(text, add_special_tokens=False).ids, text
    assert original.token_to_id("<tool>") in found.encode(TEXTS[-2]) and found.end_of_text not in found.encode(END)
    assert found.lossless == (pre != "qwen2")  # which brings combining accents into another form
    long = " ".join(TEXTS * 600)
    assert len(list(found.chunks(long))) > 1
    assert [token for part in found.chunks(long) for token in found.encode(part)] == found.encode(long)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(tmp_path, prefix):
    """Texts have the ids of the sentencepiece model that was converted, bytes that it has no piece for included."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:3] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=["<tool>"],
        control_symbols=["<pad>"],
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(original.vocab_size())
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<pad>": 3, "<tool>": 4}
    pieces = [original.id_to_piece(token) for token in ids]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [original.get_score(token) for token in ids],
        "tokenizer.ggml.token_type": [
            6 if original.is_byte(token) else kinds.get(piece, 1) for token, piece in zip(ids, pieces, strict=True)
        ],
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    found = _loaded(_with_tokenizer(tmp_path, keys), tmp_path / "tokenizer")
    assert found.kind == "sentencepiece" and found.vocab_size == len(pieces)
    assert found.end_of_text == original.eos_id()
    assert found.lossless == tokenizers.SentencePieceTokenizer(model.getvalue()).lossless
    for text in TEXTS:
        assert found.encode(text) == original.encode(text), text
        assert found.decode(found.encode(text)) == text


BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)],
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.merges": ["t 1"],
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": None}, "has no tokenizer.ggml.model"),
        ({"model": "bert"}, "tokenizer.ggml.model='bert': expected gpt2 or llama"),
        ({"model": 3}, "tokenizer.ggml.model=3: expected a text"),
        ({"model": "llama"}, "has no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores are not 40 finite numbers"),
        ({"model": "llama", "scores": [float("inf")] * VOCAB}, "tokenizer.ggml.scores are not 40 finite numbers"),
        ({"pre": None}, "has no tokenizer.ggml.pre"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken': expected gpt-2, smollm, llama-bpe or qwen2"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokens": ["a"] * VOCAB}, "tokenizer.ggml.tokens has 'a' twice"),
        ({"tokens": ["a"]}, "tokenizer.ggml.tokens has 1 tokens and tokenizer.ggml.token_type 40"),
        ({"token_type": [1] * (VOCAB - 1) + [9]}, "tokenizer.ggml.token_type of 't39' is 9: not supported"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
        ({"merges": ["a b", "a\nb"]}, r"tokenizer.ggml.merges: 'a\nb' is no pair of tokens"),
        ({"eos_token_id": VOCAB}, "tokenizer.ggml.eos_token_id=40: expected an id below 40"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token='yes': expected true or false"),
        ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix=True: expected false"),
    ],
)
def test_tokenizers_that_cannot_be_made_are_refused(tmp_path, change, message):
    """The error names the field."""
    keys = BPE | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    keys = _keys("gpt2") | {key: value for key, value in keys.items() if value is not None}
    assert message in _refused(_write(tmp_path / "model.gguf", "gpt2", keys, _weights("gpt2")[1]))


# --- files that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"general.architecture": "mamba"}, "general.architecture='mamba': expected one of llama, qwen2, qwen3, gpt2"),
        ({"split.count": 3}, "split.count=3: expected a whole model"),
        ({"llama.block_count": None}, "has no llama.block_count"),
        ({"llama.block_count": 2**32 - 1}, "llama.block_count=4294967295: expected fewer layers"),
        ({"llama.block_count": 0}, "llama.block_count=0: expected a whole number above 0"),
        ({"llama.block_count": 3}, "has no tensor 'blk.2.attn_norm.weight'"),
        ({"llama.block_count": 1}, "tensor 'blk.1.attn_k.weight' is none of a plain llama model"),
        ({"llama.embedding_length": 128}, "tensor 'token_embd.weight' has shape (40, 64), expected (40, 128)"),
        ({"llama.attention.head_count": "4"}, "llama.attention.head_count='4': expected a whole number"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count="),
        ({"llama.attention.head_count_kv": 3}, "llama.attention.head_count_kv=3: expected a divisor of the 4 heads"),
        ({"llama.attention.key_length": 15}, "heads of 15 values (llama.attention.key_length): expected an even"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length=8: expected 16"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8: expected 16"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base=nan: expected a number above 0"),
        ({"llama.rope.scaling.type": "yarn"}, "'llama.rope.scaling.type'='yarn': not supported"),
        ({"llama.rope.scaling.factor": 4.0}, "'llama.rope.scaling.factor'=4.0: not supported"),
        ({"llama.expert_count": 8}, "'llama.expert_count'=8: not supported"),
        ({"llama.attention.sliding_window": 4096}, "'llama.attention.sliding_window'=4096: not supported"),
        ({"llama.vocab_size": 41}, "llama.vocab_size=41: expected 40"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "has no llama.attention.layer_norm_rms_epsilon"),
        ({"general.alignment": 0}, "general.alignment=0: expected a whole number above 0"),
    ],
)
def test_what_hugging_faces_config_cannot_say_is_refused(tmp_path, change, message):
    """The error names the field, and a file that is not the architecture's plain model is not read as one."""
    keys = {key: value for key, value in (_keys("llama") | change).items() if value is not None}
    architecture = keys.pop("general.architecture", "llama")
    path = _write(tmp_path / "model.gguf", architecture, keys, _weights("llama")[1])
    assert message in _refused(path)


def test_keys_that_change_nothing_are_read(tmp_path):
    """Some programs write that there is no scaling and that there are no experts."""
    neutral = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "general.name": "a",
        "llama.vocab_size": VOCAB,
    }
    path = _write(tmp_path / "model.gguf", "llama", _keys("llama") | neutral, _weights("llama")[1])
    assert GgufSource(path).config["rope_scaling"] is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token_embd.weight": None}, "has no tensor 'token_embd.weight'"),
        ({"blk.1.ffn_up.weight": None}, "has no tensor 'blk.1.ffn_up.weight'"),
        ({"rope_freqs.weight": (HEAD // 2,)}, "tensor 'rope_freqs.weight' is none of a plain llama model"),
        ({"blk.0.ffn_gate_inp.weight": (8, WIDTH)}, "tensor 'blk.0.ffn_gate_inp.weight' is none of a plain"),
        ({"blk.0.ffn_gate_exps.weight": (8, MLP, WIDTH)}, "tensor 'blk.0.ffn_gate_exps.weight' is none of a plain"),
        ({"blk.0.attn_q_norm.weight": (HEAD,)}, "tensor 'blk.0.attn_q_norm.weight' is none of a plain llama"),
        ({"blk.0.attn_q.bias": (WIDTH,)}, "has no tensor 'blk.0.attn_k.bias'"),
        ({"blk.0.attn_k.weight": (WIDTH, 32)}, "tensor 'blk.0.attn_k.weight' has shape (64, 32), expected (32, 64)"),
        ({"output_norm.weight": "F64"}, "tensor 'output_norm.weight' has the unsupported type F64"),
        ({"line\nend": (1,)}, r"tensor 'line\nend' is none of a plain llama model"),
    ],
)
def test_tensors_of_other_models_are_refused(tmp_path, change, message):
    """The error names the tensor."""
    _, theirs = _weights("llama")
    for name, shape in change.items():
        match shape:
            case None:
                del theirs[name]
            case "F64":
                theirs[name] = theirs[name].astype(np.float64)
            case _:
                theirs[name] = np.ones(shape, np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in _keys("llama").items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, value in theirs.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert message in _refused(tmp_path / "model.gguf")


HUGE = 2**63 - 1


def _text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _start(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def _tensor(*shape: int, kind: int = 0, offset: int = 0, name: bytes = b"a") -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 a zip file", "is not a GGUF file"),
        (b"GGUF", "is cut short or damaged"),
        (_start(version=1), "has version 1 of GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "has version 50331648 of GGUF"),
        (_start(), "has no general.architecture"),
        (_start(values=HUGE), "is cut short or damaged: 'a key'"),
        (_start(tensors=HUGE), "is cut short or damaged: 'the name of a tensor'"),
        (_start(values=1) + _text(b"a", HUGE), "is cut short or damaged: 'a key'"),
        (_start(values=1) + _text(b"\xff") + struct.pack("<II", 4, 0), "a key is no UTF-8"),
        (_start(values=1) + _text(b"a") + struct.pack("<I", 99), "'a' has the unknown type 99"),
        (_start(values=1) + _text(b"a") + struct.pack("<IIQ", 9, 0, HUGE), "is cut short or damaged: 'a'"),
        (_start(values=1) + _text(b"a") + struct.pack("<IIQ", 9, 8, HUGE), "is cut short or damaged: 'a'"),
        (_start(values=1) + _text(b"a") + struct.pack("<IIQ", 9, 9, HUGE), "'a' is a list of the unsupported type 9"),
        (_start(values=2) + 2 * (_text(b"a\n") + struct.pack("<II", 4, 0)), r"has the key 'a\n' twice"),
        (_start(tensors=1) + _text(b"a") + struct.pack("<I", 2**32 - 1), "tensor 'a' has 4294967295 axes"),
        (_start(tensors=1) + _tensor(0), "tensor 'a' of type F32 cannot have the shape (0,)"),
        (_start(tensors=1) + _tensor(33, kind=8), "tensor 'a' of type Q8_0 cannot have the shape (33,)"),
        (_start(tensors=1) + _tensor(1, kind=77), "tensor 'a' has the unknown type 77"),
        (_start(tensors=1) + _tensor(HUGE, HUGE), "tensor 'a' would end behind the end of the file"),
        (_start(tensors=1) + _tensor(1, offset=HUGE), "tensor 'a' would end behind the end of the file"),
        (_start(tensors=2) + 2 * _tensor(1) + bytes(99), "has the tensor 'a' twice"),
    ],
)
def test_damaged_and_hostile_files_are_one_line(tmp_path, content, message):
    """A count or an offset that a file cannot have is found before anything of that size is read or listed."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert message in _refused(path)


def test_files_that_are_not_there(tmp_path):
    """The system's reason is told."""
    assert _refused(tmp_path / "none.gguf").endswith("cannot be read: No such file or directory")
    assert _refused(tmp_path).endswith("cannot be read: Is a directory")


def test_random_damage_is_one_line(tmp_path):
    """Whatever is cut off or overwritten in the header, a file is read or refused."""
    whole, rng, refused = _file(tmp_path)[0].read_bytes(), random.Random(0), 0
    header = gguf.GGUFReader(tmp_path / "model.gguf").data_offset
    path = tmp_path / "damaged.gguf"
    for turn in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header)] = rng.choice([0, 1, 127, 255])
        path.write_bytes(damaged if turn % 3 else damaged[: rng.randrange(len(damaged))])
        try:
            source = GgufSource(path)
            for name in source.names:
                source.read(name)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 150


def test_a_file_that_shrinks_is_one_line(tmp_path):
    """Tensors are read when they are asked for. A file that has become shorter by then is an error, and no crash."""
    path, _ = _file(tmp_path)
    source = GgufSource(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="became shorter while it was read"):
        for name in source.names:
            source.read(name)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    """The package is an extra."""
    path, _ = _file(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "armd-jax\[import\]"'):
        GgufSource(path)

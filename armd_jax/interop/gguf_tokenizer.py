"""The tokenizer in the metadata of a GGUF file, as the files that `armd_jax.data.tokenizers.load` reads.

A byte-level BPE becomes the `tokenizer.json` that Hugging Face has for it. GGUF names the way in which text is cut into
words, and does not describe it. A BPE of sentencepiece becomes the sentencepiece model that it was converted from.
"""

import json
from typing import Any

import numpy as np

from armd_jax.data.tokenizer_metadata import CONFIG_FILE
from armd_jax.data.vocabulary_building import LLAMA3_WORDS, QWEN2_WORDS
from armd_jax.data.vocabulary_settings import JSON_FILE, MODEL_FILE
from armd_jax.errors import UserError, shown
from armd_jax.interop.gguf_file import GgufFile

_ROLES = ("bos", "eos")
# The values of `tokenizer.ggml.token_type`, which are those of sentencepiece.
_NORMAL, _UNKNOWN, _CONTROL, _IN_TEXT, _UNUSED, _BYTE = range(1, 7)


def special_token_ids(file: GgufFile) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id` of a config, if the file names them. Raises UserError if one is no id."""
    keys = {role: f"tokenizer.ggml.{role}_token_id" for role in _ROLES}
    return {f"{role}_token_id": file.whole(key) for role, key in keys.items() if key in file.values}


def tokenizer_files(file: GgufFile, vocab_size: int) -> dict[str, bytes]:
    """The files of the tokenizer by name. Raises UserError if it is of a kind that is not supported, or damaged.

    vocab_size: the number of embeddings, which has to be that of the tokens.
    """
    tokens, kinds = file.texts("tokenizer.ggml.tokens"), file.numbers("tokenizer.ggml.token_type").astype(int).tolist()
    if not len(tokens) == len(kinds) == vocab_size:
        raise UserError(
            f"{file.where}: tokenizer.ggml.tokens has {len(tokens)} tokens and tokenizer.ggml.token_type {len(kinds)},"
            f" but token_embd.weight has {vocab_size} rows"
        )
    repeated = _first_repeated(tokens)
    if repeated is not None:
        raise UserError(f"{file.where}: tokenizer.ggml.tokens has {shown(repeated)} twice")
    config: dict[str, Any] = {}
    for name, token in special_token_ids(file).items():
        if token >= vocab_size:
            raise file.wrong(f"tokenizer.ggml.{name}", f"an id below {vocab_size}")
        config[name.removesuffix("_id")] = tokens[token]
    for role in _ROLES:
        key = f"tokenizer.ggml.add_{role}_token"
        if key in file.values:
            config[f"add_{role}_token"] = file.flag(key, False)
    files = {CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n"}
    model = file.text("tokenizer.ggml.model")
    if model == "gpt2":
        return files | {JSON_FILE: _tokenizer_json(file, tokens, kinds)}
    if model == "llama":
        return files | {MODEL_FILE: _sentencepiece_model(file, tokens, kinds)}
    raise file.wrong("tokenizer.ggml.model", "gpt2 or llama; other kinds of tokenizers are not supported")


def _first_repeated(tokens: list[str]) -> str | None:
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            return token
        seen.add(token)
    return None


def _tokenizer_json(file: GgufFile, tokens: list[str], kinds: list[int]) -> bytes:
    """A byte-level BPE as the `tokenizers` library writes it."""
    if file.flag("tokenizer.ggml.add_space_prefix", False):
        raise file.wrong("tokenizer.ggml.add_space_prefix", "false for a byte-level BPE")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _IN_TEXT, _UNUSED):
            raise UserError(f"{file.where}: tokenizer.ggml.token_type of {shown(token)} is {kind}: not supported")
    merges = [merge.split(" ") for merge in file.texts("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2:
            raise UserError(f"{file.where}: tokenizer.ggml.merges: {shown(' '.join(merge))} is no pair of tokens")
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _IN_TEXT,
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _IN_TEXT)
    ]
    words, normalizer, ignore_merges = _splitting(file)
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


def _splitting(file: GgufFile) -> tuple[dict[str, Any], dict[str, str] | None, bool]:
    """How text is cut into words, how it is normalised before, and whether a word that is a token is left whole."""
    match file.text("tokenizer.ggml.pre"):
        case "gpt-2":
            return _byte_level(use_regex=True), None, False
        case "smollm":
            return _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)), None, False
        case "llama-bpe":
            return _sequence(_split(LLAMA3_WORDS), _byte_level(use_regex=False)), None, True
        case "qwen2":
            return _sequence(_split(QWEN2_WORDS), _byte_level(use_regex=False)), {"type": "NFC"}, False
        case _:
            raise file.wrong("tokenizer.ggml.pre", "gpt-2, smollm, llama-bpe or qwen2; others are not supported")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _sentencepiece_model(file: GgufFile, tokens: list[str], kinds: list[int]) -> bytes:
    """The sentencepiece model, which takes text as it is: llama.cpp supports no other normalisation."""
    from sentencepiece import sentencepiece_model_pb2

    library: Any = sentencepiece_model_pb2  # its classes are made when it is imported, and have no types
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise UserError(f"{file.where}: tokenizer.ggml.scores are not {len(tokens)} finite numbers, one for each token")
    if "tokenizer.ggml.precompiled_charsmap" in file.values:
        raise UserError(f"{file.where}: tokenizer.ggml.precompiled_charsmap: not supported")
    model = library.ModelProto()
    for token, score, kind in zip(tokens, scores.tolist(), kinds, strict=True):
        if not _NORMAL <= kind <= _BYTE:
            raise UserError(f"{file.where}: tokenizer.ggml.token_type of {shown(token)} is {kind}: not supported")
        model.pieces.add(piece=token, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(tokens)
    trainer.byte_fallback = _BYTE in kinds
    for name, number in special_token_ids(file).items():
        role = name.removesuffix("_token_id")
        setattr(trainer, f"{role}_id", number)
        setattr(trainer, f"{role}_piece", tokens[number])
    if _UNKNOWN in kinds:
        trainer.unk_id = kinds.index(_UNKNOWN)
        trainer.unk_piece = tokens[trainer.unk_id]
    trainer.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = file.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    return model.SerializeToString()

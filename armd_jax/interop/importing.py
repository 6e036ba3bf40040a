"""`armd import`: a pretrained autoregressive model as an ARMD that gives the same likelihoods from left to right.

With the aggregator `neighbours`, whose map of the left neighbour starts as the identity, the first vector of a target
is the embedding of the token before it; what else the aggregator knows enters through scales and maps that are zero at
the start. The start token is the vector of the source's own first token, and rows that predict stand one position
before their targets (`model.prediction_position`). So in the natural order, every row of either stream is in every
layer what the source has there, whatever the number M of two-stream layers.
"""

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, assert_never

import numpy as np

from armd_jax import config as configs
from armd_jax import files
from armd_jax.config import Config, ModelConfig
from armd_jax.data import tokenizers
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError, shown
from armd_jax.interop import safetensors_format
from armd_jax.interop.gguf import GgufSource
from armd_jax.interop.huggingface import configs as huggingface_configs
from armd_jax.interop.huggingface import names
from armd_jax.interop.huggingface.configs import Pretrained
from armd_jax.interop.huggingface.names import Entry
from armd_jax.interop.huggingface.source import Folder, Source
from armd_jax.interop.readable import Readable, all_finite
from armd_jax.names import ImportAggregator
from armd_jax.order_config import OrderConfig

_HEAD = "lm_head.weight"
LONGEST_ROW = 1024  # of an import that names no length: many sources could have rows of 100,000 tokens
# Weights of a source that follow from its config, or are copies.
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def open_source(path: pathlib.Path) -> Source:
    """A Hugging Face folder or a GGUF file. Raises UserError if it is neither."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise UserError(f"--from={path}: there is no such file or folder")
    return GgufSource(path)


def open_model(
    source: Source,
    two_stream_layers: int | None = None,
    max_length: int | None = None,
    aggregator: ImportAggregator | None = None,
) -> tuple[Readable, Config]:
    """The model of a source, whose weights are read when they are asked for, and the config that is stored with it.

    two_stream_layers: M; None: half of the layers, as in the paper. max_length: N; None: the source's, at most 1,024.
    aggregator: `neighbours` (None), with which any order can be trained, or `shift`, with which the model stays an
        autoregressive one.
    An exported ARMD has all three already.
    Raises UserError if the source cannot be represented exactly, or if it is damaged as far as headers tell.
    """
    pretrained = huggingface_configs.read(source.config, source.where)
    model = _model(pretrained, two_stream_layers, max_length, aggregator)
    config = Config(model=model, order=OrderConfig(kind="left_to_right"))  # as the source was trained
    try:
        configs.check(config)
    except UserError as error:
        raise UserError(f"{source.where}: {error}") from error
    tokenizer = _tokenizer(source)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source.where}: its tokenizer has {tokenizer.vocab_size} tokens, its config says"
            f" vocab_size={model.vocab_size}"
        )
    return Readable(model, tokenizer, _weights(source, pretrained, model)), config


def _model(
    pretrained: Pretrained,
    two_stream_layers: int | None,
    max_length: int | None,
    aggregator: ImportAggregator | None,
) -> ModelConfig:
    theirs = pretrained.model
    if pretrained.start is None:
        for flag, value in (("two-stream", two_stream_layers), ("max-length", max_length), ("aggregator", aggregator)):
            if value is not None:
                raise UserError(f"--{flag}={value}: the source is an ARMD already, which is imported as it is")
        return theirs
    return with_arguments(theirs, two_stream_layers, max_length, aggregator)


def with_arguments(
    theirs: ModelConfig, two_stream_layers: int | None, max_length: int | None, aggregator: ImportAggregator | None
) -> ModelConfig:
    """The config of an autoregressive model with what `open_model` was given. Raises UserError if it is impossible."""
    if max_length is not None and not 1 <= max_length <= theirs.max_length:
        raise UserError(f"--max-length={max_length}: must be in 1 .. {theirs.max_length}, the source's")
    layers = theirs.num_layers // 2 if two_stream_layers is None else two_stream_layers
    if not 0 <= layers <= theirs.num_layers:
        raise UserError(f"--two-stream={layers}: must be in 0 .. {theirs.num_layers}, the layers of the source")
    changed: dict[str, Any] = dict(
        two_stream_layers=layers,
        aggregator=aggregator or "neighbours",
        max_length=max_length or min(theirs.max_length, LONGEST_ROW),
    )
    return dataclasses.replace(theirs, **changed)


def _weights(source: Source, pretrained: Pretrained, model: ModelConfig) -> Callable[[str], np.ndarray]:
    """What reads a weight by its export name. Raises UserError if one is missing, unknown or of another shape."""
    _check_size(source, model)
    shapes = safetensors_format.shapes(model)
    prefix = _prefix(source, pretrained)
    entries = [(entry, _names_there(entry, prefix)) for entry in names.table(pretrained.family, model)]
    # Everything that the headers tell is looked at before the first weight is read.
    unused = {name for name in source.names if not name.endswith(_DERIVED)}
    if model.tie_embeddings:
        unused.discard(_HEAD)
    entry_of: dict[str, tuple[Entry, list[str]]] = {}
    for entry, theirs in entries:
        entry_of |= dict.fromkeys(entry.ours, (entry, theirs))
        # What the layout changes do to empty arrays of our shapes are the shapes that theirs must have.
        expected = entry.to_theirs(tuple(np.broadcast_to(np.float32(0), shapes[name].shape) for name in entry.ours))
        for name, like in zip(theirs, expected, strict=True):
            if name not in source.names:
                raise UserError(f"{source.where}: has no weight {name}")
            if (found := source.shape(name)) != like.shape:
                raise UserError(f"{source.where}: {name} has the shape {found}, its config says {like.shape}")
            unused.discard(name)
    if unused:
        raise UserError(
            f"{source.where}: has a weight {shown(min(unused))} that a model of its config does not have"
            f" ({len(unused)} such weights)"
        )

    def read(name: str) -> np.ndarray:
        if name in entry_of:
            entry, theirs = entry_of[name]
            return entry.to_ours(tuple(_finite(source, one) for one in theirs))[entry.ours.index(name)]
        if name == "start":
            return read("embedding")[pretrained.start]
        if not name.startswith("aggregator."):
            raise ValueError(f"{name} is no weight of the model")
        return aggregator_weight(name, shapes[name].shape, lambda: read("embedding"))

    if model.tie_embeddings and _HEAD in source.names and not np.array_equal(source.read(_HEAD), read("embedding")):
        raise UserError(
            f"{source.where}: {_HEAD} is not the embedding, although its config says tie_word_embeddings; set it to"
            " false if the head is a table of its own"
        )
    return read


def _check_size(source: Source, model: ModelConfig) -> None:
    """Raises UserError if the model is larger than its source, before anything of its size is made."""
    num_values = sum(math.prod(source.shape(name)) for name in source.names)
    widest = max(model.vocab_size, model.learned_positions, model.num_heads * model.head_width, model.mlp_width)
    if model.num_layers > len(source.names) or model.width * widest > num_values:
        raise UserError(
            f"{source.where}: its config asks for {model.num_layers} layers of width {model.width}, with {widest} as"
            f" the longest other axis; its {len(source.names)} weights have {num_values} numbers in all"
        )


def _names_there(entry: Entry, prefix: str) -> list[str]:
    """The names of an entry's weights in a source that leaves a prefix out."""
    return [name if name == _HEAD else name.removeprefix(prefix) for name in entry.theirs]


def _finite(source: Source, name: str) -> np.ndarray:
    value = source.read(name)
    if not all_finite(value):
        raise UserError(f"{source.where}: {name} has numbers that are not finite")
    return value


def _prefix(source: Source, pretrained: Pretrained) -> str:
    """What a source leaves out of all names, because it was saved without its head."""
    match pretrained.family:
        case "gpt2":
            return "" if "transformer.wte.weight" in source.names else "transformer."
        case "llama" | "armd":
            return "" if "model.embed_tokens.weight" in source.names else "model."
        case _:
            assert_never(pretrained.family)


def aggregator_weight(name: str, shape: tuple[int, ...], embedding_VD: Callable[[], np.ndarray]) -> np.ndarray:
    """A weight of the aggregator `neighbours` that leaves the token before a target as the source has it.

    name: its export name. embedding_VD: gives the vectors that the source's layers get.
    """
    match name.split("."):
        case ["aggregator", "left"]:
            return np.eye(*shape, dtype=np.float32)
        case ["aggregator", "unseen_left"]:
            return embedding_VD().mean(axis=0)  # the source knows no unseen tokens; their mean is any of them
        case _:
            return np.zeros(shape, np.float32)


def _tokenizer(source: Source) -> Tokenizer:
    contents = source.tokenizer_files()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name, content in contents.items():
            files.write(folder / name, content)
        try:
            return tokenizers.load(folder)
        except UserError as error:
            raise UserError(str(error).replace(temporary, source.where)) from error

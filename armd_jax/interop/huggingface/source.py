"""A pretrained model as another program wrote it: its config, its weights one at a time, and its tokenizer's files."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import safetensors

from armd_jax import files
from armd_jax.errors import UserError, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = ("F32", "F16", "BF16")


class Source(Protocol):
    """What an import reads.

    where: the file or folder, for messages. config: the fields of a Hugging Face config.json.
    """

    @property
    def where(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def names(self) -> frozenset[str]:
        """The names of all weights, as Hugging Face's modules have them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one weight in Hugging Face's models, known without reading it."""

    def read(self, name: str) -> np.ndarray:
        """One weight, float32, in Hugging Face's shape. Raises UserError if it cannot be read."""

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer, by name."""


class Folder:
    """A Hugging Face folder: config.json and safetensors, in one file or in several with an index."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Reads the config and which weight lies in which file. Raises UserError if a part is missing or damaged."""
        self.where = str(folder)
        self._folder = folder
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(f"{folder}: has no config.json; give a Hugging Face folder or a .gguf file")
        config = files.read_json(file)
        if not isinstance(config, dict):
            raise UserError(f"{file}: expected an object of fields")
        self.config = config
        self._tensors = self._find()

    def _find(self) -> dict[str, "_Tensor"]:
        if (self._folder / SINGLE).is_file():
            return _tensors(self._folder / SINGLE)
        index = self._folder / INDEX
        if not index.is_file():
            other = next((file.name for file in sorted(self._folder.glob("*.bin"))), "")
            what = f"; {other} is a pickle, which can run code when it is read: convert it to safetensors"
            raise UserError(f"{self._folder}: has no {SINGLE} and no {INDEX}{what if other else ''}")
        values = files.read_json(index)
        file_of = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
            raise UserError(f"{index}: has no weight_map from names to files")
        found: dict[str, _Tensor] = {}
        for shard in sorted(set(file_of.values())):
            if pathlib.PurePath(shard).name != shard:
                raise UserError(f"{index}: {shown(shard)} is no file of this folder")
            if not (self._folder / shard).is_file():
                raise UserError(f"{index}: names {shown(shard)}, which is not there")
            of_shard = _tensors(self._folder / shard)
            if twice := sorted(found.keys() & of_shard.keys()):
                raise UserError(f"{index}: {shown(twice[0])} is in {shown(shard)} and in another of its files")
            found |= of_shard
        if missing := sorted(set(file_of) - set(found)):
            raise UserError(f"{index}: names {shown(missing[0])}, which no file has")
        return found

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        file, dtype = self._tensors[name].file, self._tensors[name].dtype
        if dtype not in _FLOATS:  # asked before it is read: jax would make other types narrower without a word
            raise UserError(f"{file}: {name} is {dtype}; expected one of {', '.join(_FLOATS)}")
        try:
            # numpy has no bfloat16, in which most models are kept. jax has.
            with safetensors.safe_open(file, framework="flax") as opened:
                value = np.asarray(opened.get_tensor(name))
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: {name} cannot be read ({error})") from error
        return value.astype(np.float32, copy=False)

    def tokenizer_files(self) -> dict[str, bytes]:
        own = self._folder / "tokenizer"  # of an export, beside the form of it that Hugging Face's programs read
        if (own / "tokenizer_config.json").is_file():
            return {file.name: file.read_bytes() for file in own.iterdir() if file.is_file()}
        known = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        older = ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.model", "spiece.model")
        return {name: (self._folder / name).read_bytes() for name in known + older if (self._folder / name).is_file()}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What the header of a file says about a tensor. dtype: as safetensors names it."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]


def _tensors(file: pathlib.Path) -> dict[str, _Tensor]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: _Tensor(file, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (OSError, ValueError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error})") from error

"""A pretrained model as another program wrote it: its config, its weights one at a time, and its tokenizer's files."""

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
        self._file_of = self._find()

    def _find(self) -> dict[str, pathlib.Path]:
        if (self._folder / SINGLE).is_file():
            return dict.fromkeys(_names(self._folder / SINGLE), self._folder / SINGLE)
        index = self._folder / INDEX
        if not index.is_file():
            other = next((file.name for file in sorted(self._folder.glob("*.bin"))), "")
            what = f"; {other} is a pickle, which can run code when it is read: convert it to safetensors"
            raise UserError(f"{self._folder}: has no {SINGLE} and no {INDEX}{what if other else ''}")
        values = files.read_json(index)
        file_of = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
            raise UserError(f"{index}: has no weight_map from names to files")
        found: dict[str, pathlib.Path] = {}
        for shard in sorted(set(file_of.values())):
            if pathlib.PurePath(shard).name != shard:
                raise UserError(f"{index}: {shown(shard)} is no file of this folder")
            if not (self._folder / shard).is_file():
                raise UserError(f"{index}: names {shown(shard)}, which is not there")
            found |= dict.fromkeys(_names(self._folder / shard), self._folder / shard)
        if missing := sorted(set(file_of) - set(found)):
            raise UserError(f"{index}: names {shown(missing[0])}, which no file has")
        return found

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def read(self, name: str) -> np.ndarray:
        file = self._file_of[name]
        try:
            # numpy has no bfloat16, in which most models are kept. jax has.
            with safetensors.safe_open(file, framework="flax") as opened:
                value = np.asarray(opened.get_tensor(name))
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: {name} cannot be read ({error})") from error
        if value.dtype.name not in ("float32", "float16", "bfloat16"):
            raise UserError(f"{file}: {name} is {value.dtype.name}; expected float32, float16 or bfloat16")
        return value.astype(np.float32)

    def tokenizer_files(self) -> dict[str, bytes]:
        known = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        older = ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.model", "spiece.model")
        return {name: (self._folder / name).read_bytes() for name in known + older if (self._folder / name).is_file()}


def _names(file: pathlib.Path) -> list[str]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (OSError, ValueError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error})") from error

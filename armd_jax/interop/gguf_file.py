"""GGUF, the file format of llama.cpp: metadata and tensors in one file. Every length is checked before it is used.

The header is read here, because the reader of the `gguf` package loops for as long as a damaged count says. Its table
of tensor types and its dequantisation are used. The layout is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
import os
import pathlib
import struct
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from armd_jax.errors import UserError, shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LARGEST_HEADER = 1 << 28  # bytes; those in use have up to some 20 million, most of it vocabulary
_MOST_AXES = 4
# The types of metadata values by their number: little-endian numbers, and three others.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLAG, _TEXT, _LIST = 7, 8, 9


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is and how it is written.

    Attributes:
      shape: as NumPy has it, the axis whose values stand side by side last.
      type: its `gguf.GGMLQuantizationType`.
      offset, size: bytes from the start of the file, and how many there are.
    """

    shape: tuple[int, ...]
    type: Any
    offset: int
    size: int


class GgufFile:
    """The metadata of a GGUF file, and its tensors one by one.

    Attributes:
      where: the path, for messages.
      values: the metadata by key: an int, float, bool, text, list of texts, or array of numbers.
      tensors: the tensors by the names that the file gives them.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Raises UserError if the file cannot be read, is no whole GGUF file, or the package `gguf` is missing."""
        self.where = str(path)
        self._path, self._library = path, _library()
        try:
            with open(path, "rb") as file:
                header = _Header(file, os.fstat(file.fileno()).st_size)
                num_tensors, num_values = header.beginning()
                self.values: dict[str, Any] = {}
                for _ in range(num_values):
                    key = header.text("a key")
                    if key in self.values:
                        raise UserError(f"has the key {shown(key)} twice")
                    self.values[key] = header.value(header.number("<u4"), key)
                self.tensors = self._read_tensors(header, num_tensors)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def _read_tensors(self, header: "_Header", count: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for _ in range(count):
            name = header.text("the name of a tensor")
            if name in found:
                raise UserError(f"has the tensor {shown(name)} twice")
            num_axes = header.number("<u4")
            if not 0 < num_axes <= _MOST_AXES:
                raise UserError(f"tensor {shown(name)} has {num_axes} axes")
            shape = tuple(reversed([header.number("<u8") for _ in range(num_axes)]))
            kind, offset = header.number("<u4"), header.number("<u8")
            try:
                kind = self._library.GGMLQuantizationType(kind)
            except ValueError as error:
                raise UserError(f"tensor {shown(name)} has the unknown type {kind}") from error
            block, block_bytes = self._library.GGML_QUANT_SIZES[kind]
            if shape[-1] % block or not math.prod(shape):
                raise UserError(f"tensor {shown(name)} of type {kind.name} cannot have the shape {shape}")
            found[name] = Tensor(shape, kind, offset, math.prod(shape) // block * block_bytes)
        align = self.values.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise UserError(f"general.alignment={shown(align)}: expected a whole number above 0")
        start = -(-header.position // align) * align
        found = {name: dataclasses.replace(one, offset=start + one.offset) for name, one in found.items()}
        for name, one in found.items():
            if one.offset + one.size > header.size:
                raise UserError(f"is cut short or damaged: tensor {shown(name)} would end behind the end of the file")
        return found

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32. Raises UserError if it cannot be read, or if its type is unknown to `gguf`."""
        tensor = self.tensors[name]
        rows = self._bytes(name, 0, tensor.size).reshape(math.prod(tensor.shape[:-1]), -1)
        try:
            with np.errstate(all="ignore"):
                found = self._library.quants.dequantize(rows, tensor.type)
            return found.astype(np.float32, copy=False).reshape(tensor.shape)
        except NotImplementedError as error:  # how the library says that it cannot dequantise this type
            raise UserError(
                f"{self.where}: tensor {shown(name)} has the unsupported type {tensor.type.name}"
            ) from error

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same type, shape and bytes."""
        one, other = self.tensors[first], self.tensors[second]
        step = 1 << 24
        return (one.type, one.shape) == (other.type, other.shape) and all(
            np.array_equal(self._bytes(first, start, step), self._bytes(second, start, step))
            for start in range(0, one.size, step)
        )

    def _bytes(self, name: str, start: int, most: int) -> np.ndarray:
        tensor = self.tensors[name]
        count = min(most, tensor.size - start)
        try:
            found = np.fromfile(self._path, np.uint8, count, offset=tensor.offset + start)
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read: {error.strerror or error}") from error
        if len(found) < count:
            raise UserError(f"{self.where}: became shorter while it was read")
        return found

    # Metadata that has to have a certain type

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number that is not negative. Raises UserError if there is none and no default."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(key, "a whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises UserError if there is none and no default."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises UserError if the value is something else."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A text. Raises UserError if there is none."""
        value = self._value(key, None)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts. Raises UserError if there is none."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of texts")
        return value

    def numbers(self, key: str) -> np.ndarray:
        """A list of numbers. Raises UserError if there is none."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray):
            raise self.wrong(key, "a list of numbers")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.where}: has no {key}")
        return value

    def wrong(self, key: str, expected: str) -> UserError:
        """The error about a value that is not what was expected."""
        return UserError(f"{self.where}: {key}={shown(self.values.get(key))}: expected {expected}")


class _Header:
    """What stands before the tensors, read from the start to the end. Errors do not name the file.

    Attributes:
      position: bytes read so far.
      size: bytes of the whole file.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self.position = file, size, 0

    def beginning(self) -> tuple[int, int]:
        """How many tensors and how many metadata values there are."""
        if self._file.read(4) != _MAGIC:
            raise UserError("is not a GGUF file")
        self.position = 4
        version = self.number("<u4")
        if version not in _VERSIONS:
            raise UserError(f"has version {version} of GGUF; {' and '.join(map(str, _VERSIONS))} can be read")
        return self.number("<u8"), self.number("<u8")

    def number(self, kind: str) -> Any:
        """One number of a NumPy type."""
        return np.frombuffer(self._take(np.dtype(kind).itemsize, "the header"), kind)[0].item()

    def text(self, what: str) -> str:
        """One text. what: what it is, for messages."""
        (length,) = struct.unpack("<Q", self._take(8, what))
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{what} is no UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        """The value of a key: a number, flag, text, list of texts, or array of numbers or flags."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _FLAG:
            return bool(self.number("u1"))
        if kind == _TEXT:
            return self.text(key)
        if kind == _LIST:
            return self._list(self.number("<u4"), self.number("<u8"), key)
        raise UserError(f"{shown(key)} has the unknown type {kind}")

    def _list(self, kind: int, count: int, key: str) -> Any:
        if kind == _TEXT:
            return [self.text(key) for _ in range(count)]
        if kind not in _NUMBERS and kind != _FLAG:
            raise UserError(f"{shown(key)} is a list of the unsupported type {kind}")
        dtype = np.dtype(_NUMBERS.get(kind, "u1"))
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _take(self, count: int, what: str) -> bytes:
        if count > min(self.size, _LARGEST_HEADER) - self.position:
            raise UserError(f"is cut short or damaged: {shown(what)} would end behind the end of the header")
        found = self._file.read(count)
        if len(found) < count:
            raise UserError("became shorter while it was read")
        self.position += count
        return found


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError('GGUF files need the package gguf: pip install "armd-jax[import]"') from error
    return gguf

"""A model whose weights are read one at a time, and safetensors files that are written one weight at a time.

So an import, or an export of a run, needs about twice the memory of its largest array, and not that of the model. The
library safetensors has all tensors of a file in memory when it writes one.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from armd_jax import config as configs
from armd_jax import files
from armd_jax.config import Config, ModelConfig
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import safetensors_format
from armd_jax.interop.safetensors_format import WEIGHTS

_BLOCK = 1 << 24  # bytes of a weight that are copied at a time, if its rows are not longer
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # NumPy's names of types, and those of safetensors
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Readable:
    """A model that can be read weight by weight.

    Attributes:
      config: of the network.
      tokenizer: of its texts.
      read: one weight by its export name (`safetensors_format`), float32, in host memory. Raises UserError if it is
        damaged.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    read: Callable[[str], np.ndarray]

    def load(self) -> LanguageModel:
        """The model with all of its weights in memory."""
        flat = {name: self.read(name) for name in sorted(safetensors_format.shapes(self.config), key=reading_place)}
        return LanguageModel(self.config, safetensors_format.unflatten(flat, self.config), self.tokenizer)


def of(lm: LanguageModel) -> Readable:
    """A model in memory. Raises UserError if it has no tokenizer, without which nothing can be exported."""
    if lm.tokenizer is None:
        raise UserError("this model has no tokenizer to export")
    return Readable(lm.config, lm.tokenizer, lambda name: safetensors_format.weight(lm.params, lm.config, name))


def reading_place(name: str) -> tuple[str, int]:
    """Key that sorts export names so that the same weight of all layers comes in a row: checkpoints keep it as one."""
    layer = _LAYER.search(name)
    return _LAYER.sub("", name), int(layer[1]) if layer else 0


# --- files ------------------------------------------------------------------------------------------------------------


def write(model: Readable, config: Config, out: pathlib.Path) -> None:
    """Writes the export folder, whole or not at all.

    Raises UserError as `safetensors_format.check_new` does or if a weight is damaged, and OSError if the export does
    not fit on the disk.
    """
    safetensors_format.check_new(out)
    shapes = {name: value.shape for name, value in safetensors_format.shapes(model.config).items()}
    sequence = sorted(shapes, key=reading_place)
    with files.new_folder(out) as folder:
        try:
            file = SafetensorsFile(folder / WEIGHTS, shapes, np.dtype(np.float32), {"format": "armd-jax"})
            put_all([Job(file, name, functools.partial(model.read, name)) for name in sequence])
            file.finish()
        except OSError as error:
            raise files.os_error(error, out / WEIGHTS) from error
        files.write(folder / "config.json", configs.to_json(config))
        model.tokenizer.save(folder / "tokenizer")


class SafetensorsFile:
    """A safetensors file that gets its tensors one by one. It ends with the bytes that the library would write."""

    def __init__(
        self, path: pathlib.Path, shapes: Mapping[str, Sequence[int]], dtype: np.dtype, metadata: Mapping[str, str]
    ) -> None:
        """Writes the header. dtype: of all tensors. Raises OSError."""
        self._path, self._shapes, self._dtype, self._missing = path, shapes, dtype, set(shapes)
        self._at: dict[str, int] = {}
        kind = _KINDS[dtype.name]
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name in sorted(shapes):
            begin, end = end, end + int(np.prod(shapes[name], dtype=np.int64)) * dtype.itemsize
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [begin, end]}
            self._at[name] = begin
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        self._begin = 8 + len(content)
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        os.truncate(path, self._begin + end)
        path.chmod(0o644)

    def put(self, name: str, value: np.ndarray) -> None:
        """Writes one tensor, rounded to the type of the file.

        Raises ValueError if it has another shape, UserError if the type cannot hold its numbers, and OSError.
        """
        if value.shape != tuple(self._shapes[name]):
            raise ValueError(f"{name} has the shape {value.shape}, expected {self._shapes[name]}")
        with open(self._path, "r+b", buffering=0) as file:
            file.seek(self._begin + self._at[name])
            for block in _blocks(value):
                with np.errstate(over="ignore"):
                    cast = np.ascontiguousarray(block, self._dtype)
                if not np.isfinite(cast).all() and np.isfinite(block).all():
                    raise UserError(
                        f"--dtype={self._dtype.name}: {name} has values beyond its range; use bfloat16 or float32"
                    )
                content = cast.reshape(-1).view(np.uint8)
                while len(content):
                    content = content[file.write(content.data) :]
        self._missing.discard(name)

    def finish(self) -> None:
        """Makes the file whole. Raises ValueError if a tensor is missing, and OSError if it did not reach the disk."""
        if self._missing:
            raise ValueError(f"{self._path.name}: {min(self._missing)} was not written")
        with open(self._path, "r+b") as file:
            os.fsync(file.fileno())


def all_finite(value: np.ndarray) -> bool:
    """Whether no number is infinite or NaN, without an array of answers as long as `value`."""
    return all(np.isfinite(block).all() for block in _blocks(value))


def _blocks(value: np.ndarray) -> Iterator[np.ndarray]:
    """An array in parts of some 16 MB along its first axis, of at least one row each."""
    rows = max(1, _BLOCK * len(value) // max(1, value.nbytes))
    for start in range(0, len(value), rows):
        yield value[start : start + rows]


@dataclasses.dataclass(frozen=True)
class Job:
    """A tensor to read and to write. name: in the file."""

    file: SafetensorsFile
    name: str
    read: Callable[[], np.ndarray]


def put_all(jobs: Sequence[Job]) -> None:
    """Writes tensors one after the other, with a bar on a terminal."""
    with tqdm(jobs, desc="writing", unit="weight", leave=False, disable=None) as bar:
        for job in bar:
            job.file.put(job.name, job.read())

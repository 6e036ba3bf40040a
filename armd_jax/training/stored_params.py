"""The parameters of a run's newest whole checkpoint, read in parts.

For what copies them: it needs about twice the memory of the largest array, and no device that all of them fit on. Orbax
only reads whole arrays, so the parts are read with TensorStore, which Orbax writes with.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath

from armd_jax import files
from armd_jax.config import Config
from armd_jax.core.parameters import Params
from armd_jax.errors import UserError, out_of_memory
from armd_jax.training import checkpoints
from armd_jax.training import state as states
from armd_jax.training.checkpoints import Checkpointer

_BLOCK = 1 << 22  # bytes that are verified at a time, if rows are not longer
_SPARE = 1 << 20  # bytes of a cache for what it keeps beside the array


class StoredArray:
    """An array of a checkpoint, of which indexing or NumPy reads what is asked for.

    shape: as in the training state.
    """

    def __init__(self, arrays: "_Arrays", path: tuple[str, ...], shape: tuple[int, ...]) -> None:
        self._arrays, self._path, self.shape = arrays, path, shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._arrays.read(self._path, index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[...], dtype, copy=copy)


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """Parameters of one checkpoint.

    Attributes:
      params: as in the training state, with `StoredArray` leaves. They can be read while the checkpoint is open.
      step: of the checkpoint.
    """

    params: Params
    step: int


@contextlib.contextmanager
def open_newest(run: pathlib.Path, config: Config, ema: bool = True) -> Iterator[StoredParams]:
    """The parameters of the newest checkpoint of a run that has them whole; all are read once to know that.

    ema: the average, if the run keeps one.
    Raises UserError if there is none, also later, if an array can no longer be read.
    """
    target = states.abstract(config, checkpoints.one_device())
    part = "params" if target.ema is None or not ema else "ema"
    with checkpoints.reading(run, config) as checkpointer:
        arrays = checkpoints.newest_of_run(
            run, checkpointer, functools.partial(_verified, checkpointer, part, getattr(target, part))
        )
        yield StoredParams(arrays.tree(), arrays.step)


def _verified(checkpointer: Checkpointer, part: str, target: Params, step: int) -> "_Arrays":
    """The arrays of a step. Raises UserError if one of them is not what was saved."""
    folder, digests = checkpointer.described(step, {part: target})
    layout = files.read_json(folder / "_METADATA")
    if not isinstance(layout, dict):
        raise UserError(f"{folder / '_METADATA'}: expected an object of fields")
    arrays = _Arrays(folder, layout, part, target, step)
    for path in arrays.leaves:
        if arrays.digest(path) != digests.get(name := ".".join((part, *path))):
            raise UserError(f"{folder.parent}: {name} is not what was saved (its digest differs)")
    return arrays


class _Arrays:
    """Reads arrays of one step. Those that were read last stay in memory, as many as the largest one is large."""

    def __init__(self, folder: epath.Path, layout: dict[str, Any], part: str, target: Params, step: int) -> None:
        """layout: what Orbax noted of how it writes arrays."""
        self._folder, self._layout, self._part, self._target, self.step = folder, layout, part, target, step
        flat = jax.tree_util.tree_leaves_with_path(target)
        self.leaves = {tuple(key.key for key in path): leaf for path, leaf in flat}
        self._most = max(self._bytes(path) for path in self.leaves)
        self._opened: dict[tuple[str, ...], Any] = {}

    def tree(self) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: StoredArray(self, tuple(key.key for key in path), leaf.shape), self._target
        )

    def read(self, path: tuple[str, ...], index: Any) -> np.ndarray:
        """A part of an array. Raises UserError if it cannot be read."""
        try:
            found: np.ndarray = self._open(path)[index].read().result()
            if found.dtype != (wanted := self.leaves[path].dtype):
                raise ValueError(f"{'.'.join(path)} is {found.dtype}, expected {wanted}")
        except Exception as error:  # TensorStore raises anything from ValueError to IndexError for damaged files
            if out_of_memory(error) is not None:
                raise
            raise UserError(f"{self._folder.parent}: {checkpoints.line(error)}") from error
        return found

    def digest(self, path: tuple[str, ...]) -> int:
        """What `checkpoints.digests` gives for the array."""
        shape, total, begin = self.leaves[path].shape, 0, 0
        rows = max(1, _BLOCK * shape[0] // max(1, self._bytes(path)))
        for first in range(0, shape[0], rows):
            words = self.read(path, slice(first, min(first + rows, shape[0]))).reshape(-1).view(np.uint32)
            index = np.arange(begin, begin + len(words), dtype=np.uint64).astype(np.uint32)
            total += int(np.sum(words * (2 * index + 1), dtype=np.uint32))
            begin += len(words)
        return total % 2**32

    def _open(self, path: tuple[str, ...]) -> Any:
        if path not in self._opened:
            # Before the next one is read, not after it, as TensorStore's own cache would do.
            while self._opened and sum(map(self._bytes, self._opened)) + self._bytes(path) > self._most:
                self._opened.pop(next(iter(self._opened)))
            name = ".".join((self._part, *path))
            place = _place(f"{self._folder}/{name}/")
            if self._layout.get("use_ocdbt", True):
                place = {"driver": "ocdbt", "base": _place(f"{self._folder}/"), "path": f"{name}/"}
            spec = {"driver": "zarr3" if self._layout.get("use_zarr3") else "zarr", "kvstore": place}
            # What was decompressed is kept, because the layers of an array may all be in one piece of it.
            cache = tensorstore.Context({"cache_pool": {"total_bytes_limit": self._bytes(path) + _SPARE}})
            self._opened[path] = tensorstore.open(
                spec | {"recheck_cached_data": "open"}, open=True, context=cache
            ).result()
        return self._opened[path]

    def _bytes(self, path: tuple[str, ...]) -> int:
        leaf = self.leaves[path]
        return int(leaf.size * leaf.dtype.itemsize)


def _place(path: str) -> dict[str, Any]:
    """A folder as TensorStore names it."""
    scheme, _, place = path.rpartition("://")
    if not scheme:
        return {"driver": "file", "path": path}
    bucket, _, key = place.partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": key}

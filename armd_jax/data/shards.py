"""Shards: ArrayRecord files that hold the rows of a split, one record per row of little-endian unsigned integers."""

import contextlib
import functools
import re
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from armd_jax import files
from armd_jax.data.manifest import Manifest, PackedSplit, Shard
from armd_jax.data.reading import hash_file
from armd_jax.errors import UserError

OPEN_SHARDS = 256  # readers kept open: a large corpus has more shards than a process may open files


class ShardWriter:
    """Writes rows into files of `shard_rows` rows each.

    Attributes:
      folder: that the files are in.
      written: the files that are complete.
    """

    def __init__(self, folder: Path, split: str, shard_rows: int, written: Iterable[Shard] = ()) -> None:
        """written: files that are complete already. Raises UserError if the library cannot take the folder's name."""
        if re.search("[\ud800-\udfff]", str(folder)):  # what stands for bytes that are not UTF-8
            raise UserError(f"{folder}: rows cannot be written there, because the name is not UTF-8 text")
        self.folder, self._split, self._shard_rows = folder, split, shard_rows
        self._writer: ArrayRecordWriter | None = None
        self._file, self._rows = "", 0
        self.written: list[Shard] = list(written)

    def write(self, rows: np.ndarray) -> None:
        """Appends the rows, int[rows, N] of the type in which they are stored. Raises OSError if they do not fit."""
        with self._as_os_error():
            for row in rows:
                if self._writer is None:
                    self._file, self._rows = f"{self._split}-{len(self.written):05d}.array_record", 0
                    # One record per group: a reader then decodes no other row than the one it asks for.
                    self._writer = ArrayRecordWriter(str(self.folder / self._file), "group_size:1")
                self._writer.write(row.tobytes())
                self._rows += 1
                if self._rows == self._shard_rows:
                    self.close()

    def close(self) -> None:
        """Completes the last file, unless writing it failed. Raises OSError if it does not fit on the disk."""
        if self._writer is not None:
            with self._as_os_error():
                self._writer.close()
            self._writer = None
            file = self.folder / self._file
            self.written.append(Shard(self._file, self._rows, file.stat().st_size, hash_file(file)))

    @contextlib.contextmanager
    def _as_os_error(self) -> Generator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # what the library raises, whatever happened
            self._writer = None
            raise files.os_error(error, self.folder / self._file) from error


class PackedRows:
    """Random access to the rows of one split, as they are on disk.

    `len(rows)` and `rows[i]`: int32[N], the last row padded with end-of-text. Safe to read from several threads.
    Raises UserError with the shard's name if its bytes are not those that were written.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: PackedSplit, hashed: bool) -> None:
        """hashed: whether the sha256 of all shards was compared already. If not, each is compared when it is opened."""
        self._folder, self._shards, self._num_rows = folder, split.shards, split.rows
        self._length, self._dtype = manifest.row_length, np.dtype(manifest.dtype)
        self._shard_rows = manifest.shard_rows
        known = set(range(len(self._shards))) if hashed else set()
        # Not a method: a cached one would be a circle, and its files would stay open until Python looks for such.
        opened = functools.partial(_open_verified, folder, self._shards, known)
        self._reader = functools.lru_cache(maxsize=OPEN_SHARDS)(opened)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        number, row = divmod(int(index), self._shard_rows)
        file = self._folder / self._shards[number].file
        try:
            # By range: the cost of reading a list of records grows with the number of records in the file.
            (record,) = self._reader(number).read(row, row + 1)
            tokens = np.frombuffer(record, self._dtype)
        except UserError:  # also a ValueError
            raise
        except (RuntimeError, ValueError, IndexError, OSError) as error:  # what the library raises on broken bytes
            raise _damaged(file) from error
        if len(tokens) != self._length:
            raise _damaged(file)
        return tokens.astype(np.int32)


def _open_verified(folder: Path, shards: Sequence[Shard], known: set[int], number: int) -> ArrayRecordReader:
    """A reader of one shard, whose sha256 is compared first if the shard is not among the `known` ones."""
    file = folder / shards[number].file
    if number not in known:
        if hash_file(file) != shards[number].sha256:
            raise _damaged(file)
        known.add(number)
    return _open_reader(file)


def check_shard(folder: Path, shard: Shard, hashed: bool) -> None:
    """Raises UserError if the place, size or number of rows of a shard is not as the manifest says.

    hashed: compare the sha256 of the content as well. The library alone would open damaged files without an error.
    """
    file = folder / shard.file
    if not file.is_file():
        raise UserError(f"{file}: this shard is missing; delete the folder and prepare the data again")
    if file.resolve().parent != folder.resolve():
        raise UserError(f"{file}: this shard is a link out of its folder; copy the file itself there")
    if file.stat().st_size != shard.bytes or (hashed and hash_file(file) != shard.sha256):
        raise _damaged(file)
    try:
        rows = _open_reader(file).num_records()
    except RuntimeError as error:
        raise _damaged(file) from error
    if rows != shard.rows:
        raise _damaged(file)


def _damaged(file: Path) -> UserError:
    return UserError(f"{file}: this shard is damaged or was changed; delete the folder and prepare the data again")


def _open_reader(file: Path) -> ArrayRecordReader:
    """A reader for single records, which reads no further ahead than a record needs."""
    return ArrayRecordReader(str(file), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)

"""Text in object storage: objects that look like files of this machine, each fetched when it is opened.

A folder of files with the names and sizes of the objects, but without their content, stands for them. So the code that
chooses among files, knows them again and reads them needs no other way for objects. Text is read up to three times, for
its hash, for a tokenizer that is trained and for the rows; of what was fetched, the last KEPT bytes stay on the disk
meanwhile.
"""

import dataclasses
import glob
import hashlib
import os
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from armd_jax import files, remote
from armd_jax.errors import UserError
from armd_jax.remote import Copy

KEPT = 8 << 30  # bytes; a larger file stays alone, as long as it is read


@dataclasses.dataclass(frozen=True)
class _Object:
    key: str
    size: int
    version: list[Any]
    time: int  # in nanoseconds since 1970; what is below a second is another number for every version


_texts: "weakref.WeakKeyDictionary[Copy, _Text]" = weakref.WeakKeyDictionary()


def laid_out(path: str) -> str:
    """The path on this machine for one that names text: the path itself, or for an address what stands for it.

    Raises UserError if the store cannot be read.
    """
    if not remote.is_address(path):
        return path
    parts = path.rstrip("/").split("/")
    start = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    folder = remote.copy_for("/".join(parts[:start]), "text")
    if (copy := remote.copy_of(folder)) is not None:
        _texts.setdefault(copy, _Text(copy)).lay_out()
    return "/".join([str(folder), *parts[start:]])


def here(file: Path) -> Path:
    """The file, with its content if it is one that stands for an object. Raises UserError if it cannot be fetched."""
    for text in list(_texts.values()):
        text.fetch(file)
    return file


class _Text:
    """The objects at an address, as files."""

    def __init__(self, copy: Copy) -> None:
        self._copy = weakref.proxy(copy)
        self._objects: dict[Path, _Object] = {}
        self._fetched: dict[Path, int] = {}  # bytes, in the sequence in which they were fetched

    def lay_out(self) -> None:
        """Brings the files up to date with the store."""
        with self._copy.told():
            objects = {name: _described(info) for name, info in self._copy.objects().items()}
        if not objects:
            raise UserError(f"{self._copy.address}: there are no objects, or there is no such bucket")
        folder = self._copy.folder
        wanted = {folder / name if name else folder: found for name, found in objects.items()}
        for old in self._objects.keys() - wanted.keys():
            old.unlink(missing_ok=True)
            self._fetched.pop(old, None)
            del self._objects[old]
        for path, found in wanted.items():
            if self._objects.get(path) != found:
                self._objects[path] = found
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._empty(path)
                except OSError as error:  # as of an object `a/b` beside an object `a`
                    if error.errno in files.FULL:
                        raise
                    raise UserError(f"{path}: this object cannot be a file here: {error.strerror}") from error

    def fetch(self, file: Path) -> None:
        """Brings the content of one of the files."""
        found = self._objects.get(file)
        if found is None or file in self._fetched:
            return
        part = file.with_name(f".{file.name}.part")
        with self._copy.told():
            if _version(self._copy.files.info(found.key)) != found.version:
                raise UserError(f"{file}: has changed since it was listed; run the same command again")
            self._copy.files.get_file(found.key, str(part))
        if part.stat().st_size != found.size:
            raise UserError(f"{file}: {found.size:,} bytes were listed, and {part.stat().st_size:,} came")
        os.utime(part, ns=(found.time, found.time))
        part.replace(file)
        self._fetched[file] = found.size
        while sum(self._fetched.values()) > KEPT and len(self._fetched) > 1:
            self._empty(next(iter(self._fetched)))

    def _empty(self, path: Path) -> None:
        """Leaves the name, the size and the time of a file. Whoever has it open goes on reading."""
        found = self._objects[path]
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            file.truncate(found.size)
        os.utime(part, ns=(found.time, found.time))
        part.replace(path)
        self._fetched.pop(path, None)


def _described(info: dict[str, Any]) -> _Object:
    version = _version(info)
    number = int.from_bytes(hashlib.sha256(repr(version).encode()).digest()) % 10**9
    changed = info.get("mtime") or info.get("LastModified")
    seconds = changed.timestamp() if isinstance(changed, datetime) else time.time()
    return _Object(info["name"], int(info["size"]), version, int(seconds) * 10**9 + number)


def _version(info: dict[str, Any]) -> list[Any]:
    return [info.get(field) for field in ("generation", "etag", "ETag", "size")]

"""Folders in object storage, `gs://bucket/folder` and `s3://bucket/folder` (extra `cloud`).

A bucket knows neither renames nor appending, and a library that reads rows or weights wants files. So such a folder has
a *copy* on this machine, which all code reads and writes like any other folder: what the bucket holds is fetched into
it, and what changed in it is stored again, whole objects at a time, since an object is replaced whole or not at all.
What makes other files count (config.json, manifest.json, the metadata of a checkpoint) is stored after them and removed
before them. Nothing is concluded from what a listing lacks beyond "not there": files that belong together are named,
with their sizes and hashes, in a manifest or in the checkpoint's digests, which whoever opens them compares.

Checkpoints in gs:// are not copied: Orbax reads and writes them there itself (`checkpoint_folder`).
"""

import atexit
import contextlib
import fcntl
import os
import pathlib
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, assert_never

from armd_jax import files, stores
from armd_jax.errors import UserError
from armd_jax.stores import Scheme

# What a folder is for: it is read, and may be written; it is written; it is made; a training writes it, and what is
# stored of it, and when, is up to whoever holds the lease; it is text, which is fetched file by file when it is read.
Use = Literal["read", "write", "new", "run", "text"]

_ADDRESS = re.compile(r"(gs|s3):/+([a-z0-9][a-z0-9._-]+)((?:/+[^/]+)*)/*", re.DOTALL)
_MARKERS = ("_CHECKPOINT_METADATA", "manifest.json", "part.json", "config.json")  # stored last, in this order
_UNFINISHED = ".orbax-checkpoint-tmp"
_COMMITTED = "commit_success.txt"
_PREFIX = "armd-copy-"
_JUST_MADE = 60  # seconds in which a process may have made a folder but not locked it yet
_AT_ONCE = 1 << 25  # bytes: a file up to this size is read before it is sent, so that it may grow meanwhile

_copies: "dict[tuple[str, bool], Copy]" = {}  # by the address, and whether it is for text


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address in object storage; also what pathlib makes of one, gs:/bucket/folder."""
    return _ADDRESS.fullmatch(os.fspath(path)) is not None


def check_place(path: str | os.PathLike[str], where: str) -> None:
    """Raises UserError if a path is neither on this machine nor in object storage. where: the field that has it."""
    if not is_address(path):
        files.check_local(path, where)


def copy_for(path: str | os.PathLike[str], use: Use = "read") -> pathlib.Path:
    """The folder on this machine for a path: the path itself, or the place for the copy of an address.

    Fetches nothing, see `fetch_all`. The place keeps the last name of the address, and need not exist afterwards.
    """
    found = _ADDRESS.fullmatch(os.fspath(path))
    if found is None:
        return pathlib.Path(path)
    scheme: Scheme = "gs" if found[1] == "gs" else "s3"
    address = f"{scheme}://{found[2]}" + re.sub("/+", "/", found[3])
    key = address, use == "text"
    if key not in _copies:
        _copies[key] = Copy(scheme, address, use)
    return _copies[key].folder


def local(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder on this machine for a path, filled with what is at the address if it is one.

    Raises UserError if it cannot be fetched.
    """
    folder = copy_for(path)
    if (copy := copy_of(folder)) is not None:
        copy.fetch()
    return folder


def copy_of(folder: pathlib.Path) -> "Copy | None":
    """The copy whose folder this is; None for any other folder."""
    return next((copy for copy in _copies.values() if copy.folder == folder), None)


def spelled(text: str) -> str:
    """The text with addresses in the place of the folders of their copies: what people read names the address."""
    for copy in _copies.values():
        text = text.replace(str(copy.folder), copy.address)
    return text


def fetch_all() -> None:
    """Fetches every folder that arguments name. Raises UserError if one cannot be read, or not be written."""
    for copy in list(_copies.values()):
        copy.fetch()
        match copy.use:
            case "write" | "new" | "run":
                copy.check_writable()
            case "read" | "text":
                pass
            case _:
                assert_never(copy.use)


def store_all() -> None:
    """Stores what a command wrote, except into a run that is being trained, which its lease stores.

    Raises UserError if it cannot be stored. What was only read need not be writable: then a line on stderr says so.
    """
    for copy in list(_copies.values()):
        match copy.use:
            case "write" | "new":
                copy.store()
            case "read":
                try:
                    copy.store()
                except UserError as error:
                    print(f"{error}; nothing was written there; --out=FOLDER keeps it elsewhere", file=sys.stderr)
            case "run" | "text":
                pass
            case _:
                assert_never(copy.use)


def forget_all() -> None:
    """Removes all copies."""
    for copy in _copies.values():
        shutil.rmtree(copy.folder.parent, ignore_errors=True)
        os.close(copy.handle)
    _copies.clear()


atexit.register(forget_all)


def checkpoint_folder(run: pathlib.Path) -> Any:
    """The folder of a run's checkpoints as an `epath.Path`: an address if Orbax is to read and write there itself."""
    from etils import epath

    copy = copy_of(run)
    if copy is not None and copy.scheme == "gs":
        copy.files  # noqa: B018 - says what is missing before Orbax does
        return epath.Path(copy.address) / "checkpoints"
    return epath.Path(run.absolute()) / "checkpoints"


def unfinished(checkpoints: Any) -> list[Any]:
    """What saves left below a folder of checkpoints (see `checkpoint_folder`) that were killed or are under way.

    Orbax writes a checkpoint under another name, which it then changes; where names cannot be changed, it writes under
    the checkpoint's own name, and then a file that makes it count.
    """
    if not checkpoints.is_dir():
        return []
    if not is_address(checkpoints):
        return list(checkpoints.glob(f"*{_UNFINISHED}*"))
    left = [step for step in checkpoints.iterdir() if not (step / _COMMITTED).exists()]
    for step in left:
        metadata = step / "_CHECKPOINT_METADATA"
        whole = metadata.exists() and re.search(r'"commit_timestamp_nsecs": ?\d', metadata.read_text())
        if whole and not (step / "state" / _COMMITTED).exists():
            raise UserError(
                f"{step}: does not count as whole, because its files {_COMMITTED} are missing; copy the run"
                " once more, with all of them, or use it on a disk"
            )
    return left


def saved_steps(run: pathlib.Path) -> list[int]:
    """The steps of a run's checkpoints that were written to their end, sorted."""
    folder = checkpoint_folder(run)
    left = {step.name for step in unfinished(folder)}
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name not in left)


class Copy:
    """A folder in object storage and its copy on this machine. Safe to use from several threads."""

    def __init__(self, scheme: Scheme, address: str, use: Use) -> None:
        self.scheme, self.address, self.use = scheme, address, use
        _remove_abandoned()
        parent = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.handle = os.open(parent, os.O_RDONLY)
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        self.folder = parent / address.rsplit("/", 1)[-1]
        self._root = address.split("://", 1)[1]
        self._lock = threading.RLock()
        self._there: dict[str, object] = {}  # the version of each object that was fetched; None: stored by us
        self._stored: dict[str, tuple[int, int]] = {}  # size and time of each file when it was fetched or stored

    @property
    def files(self) -> Any:
        """The file system of fsspec. Raises UserError if it cannot be used, see `stores.file_system`."""
        return stores.file_system(self.scheme, self.address, writes=self.use in ("write", "new", "run"))

    def fetch(self) -> None:
        """Brings the copy up to date with the bucket. Raises UserError if it cannot be read."""
        with self._lock, self.told():
            found = self._listed()
            if self.use == "new" and found:
                raise UserError(f"{self.address}: there is something already; give another folder")
            for name, version in found.items():
                path = self.folder / name
                if path.exists() and self._there.get(name) == version:
                    continue
                part = path.with_name(f".{path.name}.part")
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self.files.get_file(f"{self._root}/{name}", str(part))
                    part.replace(path)  # half a file would be stored in the place of a whole object
                except FileNotFoundError:  # removed since, as old checkpoints are
                    continue
                except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                    what = "this object cannot be a file here, because another one is below or above it"
                    raise UserError(f"{self.address}/{name}: {what}") from error
                self._there[name], self._stored[name] = version, _stamp(path)
            for name in self._there.keys() - found.keys():
                (self.folder / name).unlink(missing_ok=True)
                del self._there[name], self._stored[name]

    def store(self, before_each: Callable[[], None] = lambda: None) -> None:
        """Stores what changed in the copy since it was fetched or stored. Raises UserError if it cannot be stored.

        before_each: called before each object is stored or removed; what it raises ends the storing.
        """
        with self._lock, self.told():
            # Not `rglob`, which fails if Orbax removes a folder meanwhile.
            found = [pathlib.Path(root) / file for root, _, names in os.walk(self.folder) for file in names]
            here = {path.relative_to(self.folder).as_posix(): path for path in found}
            here = {name: path for name, path in here.items() if self._is_copied(name)}
            for name in sorted(self._stored.keys() - here.keys(), key=_turn, reverse=True):
                before_each()
                with contextlib.suppress(FileNotFoundError):
                    self.files.rm_file(f"{self._root}/{name}")
                self._there.pop(name, None)
                del self._stored[name]
            for name in sorted(here, key=_turn):
                with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile; the next call removes it there
                    stamp = _stamp(here[name])
                    if self._stored.get(name) != stamp:
                        before_each()
                        self._send(here[name], f"{self._root}/{name}")
                        self._there[name], self._stored[name] = None, stamp

    def _send(self, path: pathlib.Path, key: str) -> None:
        if path.stat().st_size > _AT_ONCE:
            self.files.put_file(str(path), key)
        else:
            self.files.pipe_file(key, path.read_bytes())

    def check_writable(self) -> None:
        """Raises UserError if nothing can be written to the address. Leaves nothing behind."""
        key = f"{self._root}/.armd-probe-{secrets.token_hex(4)}"
        with self.told():
            self.files.pipe_file(key, b"")
            self.files.rm_file(key)

    def read_small(self, name: str) -> str | None:
        """The text of a small object that is not part of the copy; None if there is none."""
        with self.told():
            try:
                text: str = self.files.cat_file(f"{self._root}/{name}").decode()
            except FileNotFoundError:
                return None
        return text

    def write_small(self, name: str, text: str, new: bool = False) -> bool:
        """Writes such an object. Returns whether it was written: with `new`, only if there was none."""
        # Creating exclusively is a precondition that the store checks; what is read back shows that it did. Something
        # that exists may be our own: the answer was lost, and the library sent it again.
        with self.told(), contextlib.suppress(FileExistsError):
            self.files.pipe_file(f"{self._root}/{name}", text.encode(), mode="create" if new else "overwrite")
        return not new or self.read_small(name) == text

    def names_below(self, folder: str) -> list[str]:
        """The names of the objects right below a folder that is not part of the copy, sorted."""
        with self.told():
            try:
                return sorted(key.rsplit("/", 1)[-1] for key in self.files.find(f"{self._root}/{folder}"))
            except FileNotFoundError:
                return []

    def remove_small(self, name: str) -> None:
        """Removes such an object if it is there."""
        with self.told(), contextlib.suppress(FileNotFoundError):
            self.files.rm_file(f"{self._root}/{name}")

    def objects(self) -> dict[str, dict[str, Any]]:
        """What the store tells of every object, by its name below the address; an object of that address has none."""
        try:
            found = self.files.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        names = {key: key[len(self._root) :].removeprefix("/") for key in found}
        # Some tools write objects that stand for folders; names such as `..` would lead out of the copy.
        wrong = {key for key in found if {"", ".", ".."} & set(names[key].split("/")) and key != self._root}
        below = [key for key in found if key not in wrong and f"{key}/".startswith(f"{self._root}/")]
        return {names[key]: found[key] for key in below}

    def _listed(self) -> dict[str, object]:
        """The objects that are copied, each with what tells one version of it from another."""
        named = self.objects()
        whole = {name.split("/")[1] for name in named if re.fullmatch(r"checkpoints/\d+/_CHECKPOINT_METADATA", name)}
        versions: dict[str, object] = {}
        for name, info in named.items():
            of_step = re.match(r"checkpoints/(\d+)/", name)
            if self._is_copied(name) and (of_step is None or of_step[1] in whole):
                versions[name] = [info.get(field) for field in ("generation", "etag", "ETag", "size", "updated")]
        return versions

    def _is_copied(self, name: str) -> bool:
        parts = name.split("/")
        if self.scheme == "gs" and parts[0] in ("checkpoints", "damaged"):
            return False
        return not any(not part or part.startswith(".") or _UNFINISHED in part for part in parts)

    def told(self) -> contextlib.AbstractContextManager[None]:
        """Raises UserError, in one line, for whatever a library raises about the bucket."""
        return stores.told(self.scheme, self.address)


def _remove_abandoned() -> None:
    """Removes the copies of processes that were killed. A living one holds a lock on each of its own."""
    for left in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is locked, already gone, or another user's
            if time.time() - left.stat().st_mtime < _JUST_MADE:
                continue
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _turn(name: str) -> tuple[int, str]:
    """The place of a file among those that are stored."""
    last = name.rsplit("/", 1)[-1]
    return (_MARKERS.index(last) + 1 if last in _MARKERS else 0), name

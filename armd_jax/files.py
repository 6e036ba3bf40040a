"""The one door to files: whole or not at all, and read with errors that name the file."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from armd_jax.errors import UserError, shown

# The disk is full, the user's share of it is, or the file would be larger than files may be.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE = 1 << 20  # bytes: more than a library may have kept back
_TAIL = 1 << 16  # bytes from the end of a file that `last_json_line` looks at

# How addresses begin: gs://bucket/run, s3a://x; also gs:/bucket/run, which pathlib makes of it, and dbfs:/mnt.
# `tfds:/folder` is no address: `tfds:` is this package's own word in front of a path.
_ADDRESS = re.compile(r"(?:tfds:)?(?!tfds:)([A-Za-z][A-Za-z0-9+-]+:/)")


def not_local(path: str | os.PathLike[str]) -> str:
    """Why what was given as a path is none on this machine; empty if it may be one.

    An address such as `gs://bucket/run` is none: the file system would take it for a folder named `gs:`.
    """
    address = _ADDRESS.match(os.fspath(path))
    if address is None:
        return ""
    return (
        f"{address[1]} begins the address of something that is not on this machine, and only paths on this machine can"
        " be used here: mount it or copy it, and give that path"
    )


def check_local(path: str | os.PathLike[str], where: str) -> None:
    """Raises UserError if a path is none on this machine. where: the field or the argument that has it."""
    if reason := not_local(path):
        raise UserError(f"{where}={shown(os.fspath(path))}: {reason}")


def unwritable(folder: pathlib.Path) -> str:
    """Why no files can be written into a folder, which need not exist yet; empty if they can. Leaves nothing behind.

    Raises OSError if only the space for them is lacking, which is no mistake of the user.
    """
    if folder.exists() and not folder.is_dir():
        return "is a file, not a folder"
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    probe = existing / f".armd-probe-{time.time_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in FULL:
            raise
        return f"cannot be written ({error.strerror})"
    return ""


def os_error(error: Exception, path: pathlib.Path) -> OSError:
    """What the error of a library means that was writing `path`, which is to be thrown away.

    Such libraries tell a full disk in their text alone, or not even there: then some bytes more are written to see.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(path))
    number = next((one for one in (*FULL, errno.EROFS, errno.EACCES) if os.strerror(one) in str(error)), None)
    if number is not None:
        return OSError(number, os.strerror(number), str(path))
    if path.is_file():
        try:
            with open(path, "ab", buffering=0) as file:
                missing = _PROBE
                while missing:
                    missing -= file.write(bytes(missing)) or 0
        except OSError as found:
            return OSError(found.errno, found.strerror, str(path))
    lines = str(error).splitlines()
    return OSError(errno.EIO, lines[0] if lines else os.strerror(errno.EIO), str(path))


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: whoever reads `path` sees the old content or the new, never a part.

    A link at `path` is replaced, not followed. A file that has this content already stays as it is, which needs no
    space on the disk.
    """
    content = content.encode() if isinstance(content, str) else content
    with contextlib.suppress(OSError):  # it may be replaced though it may not be read
        if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
            return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files, but these are for everyone who may read the folder
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary neighbour of `path` to write into, which takes the name `path` at the end of the block.

    If the block raises, the neighbour is removed and nothing is left at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_checksums(folder: pathlib.Path) -> None:
    """Writes SHA256SUMS with all files of a folder, which `sha256sum -c SHA256SUMS` checks."""

    def digest(path: pathlib.Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    write(folder / "SHA256SUMS", "".join(f"{digest(folder / path)}  {path}\n" for path in paths))


def read_json(path: pathlib.Path) -> Any:
    """The value in a JSON file. Raises UserError if it cannot be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path}: cannot be read as JSON: it is nested too deeply") from error
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects in a .jsonl file, none if there is no such file. A last line that a kill cut short is left out.

    Raises UserError if the file cannot be read as text.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return rows
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for line in lines:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def last_json_line(path: pathlib.Path) -> dict[str, Any] | None:
    """The last whole object in a .jsonl file, found from its end; None if there is none in the last 64 KiB."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                return None
            return row if isinstance(row, dict) else None
    return None


def append(path: pathlib.Path, lines: str) -> None:
    """Appends whole lines to a text file, all of them or none.

    Raises OSError, on a full disk for example, after removing what was written of them.
    """
    drop_partial_line(path)
    content = lines.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while content:
                content = content[file.write(content) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):  # whoever appends next tries once more
                file.truncate(size)
            raise


def append_json_line(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Appends one object to a .jsonl file, whole or not at all."""
    append(path, json.dumps(row) + "\n")


def drop_partial_line(path: pathlib.Path) -> None:
    """Removes a last line that a kill or a full disk cut short. Cutting needs no space on the disk."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def keep_first_rows(path: pathlib.Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Cuts a .jsonl file before its first row that is not to be kept, or that is none. Cutting needs no space.

    Raises UserError if the file cannot be read as text.
    """
    count = 0
    for row in read_json_lines(path):
        if not keep(row):
            break
        count += 1
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)[:count]
        end = sum(len(line) for line in lines if line.endswith(b"\n"))  # the last one may have been cut short
        if end < path.stat().st_size:
            os.truncate(path, end)

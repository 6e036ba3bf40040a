"""Text files as a source of documents: which files, in which formats, and the splits that their names give.

To add a format or a compression, add a row to `FORMATS`, and a function that reads it if none of those here does. The
file names that are looked for and the messages follow from the table.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from armd_jax.config import DataConfig
from armd_jax.data.reading import KnownFiles, Reader, Source, SourceFile, TextOrError, decode_utf8, hash_file
from armd_jax.data.splits import SPLIT_NAMES, SPLITS
from armd_jax.errors import UserError
from armd_jax.names import Split

# Formats


@dataclasses.dataclass
class Position:
    """How far a file has been read, for messages."""

    file: Path
    line: int = 0  # the line that was read last; 0 if the file is not read line by line

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else str(self.file)


@dataclasses.dataclass(frozen=True)
class Compression:
    """A way in which whole files are compressed.

    Attributes:
      name: what messages call it.
      open: opens a file for reading its decompressed bytes.
      errors: what reading raises if the file is damaged or ends too early.
    """

    name: str
    open: Callable[[Path], io.BufferedIOBase]
    errors: tuple[type[Exception], ...]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      suffix: how the names of such files end. No suffix ends in another one.
      read: yields the documents of an open file, given the stream, the position (which it keeps up to date if it reads
        line by line) and the name of the field that holds the text (`data.text_field`).
      compression: how such files are compressed.
    """

    suffix: str
    read: Callable[[io.BufferedIOBase, Position, str], Iterator[TextOrError]]
    compression: Compression


def _read_whole(stream: io.BufferedIOBase, position: Position, text_field: str) -> Iterator[TextOrError]:
    """The whole file as one document."""
    del text_field  # plain text has no fields
    yield decode_utf8(stream.read(), str(position))


def _read_json_lines(stream: io.BufferedIOBase, position: Position, text_field: str) -> Iterator[TextOrError]:
    """One document per line, each line a JSON object. Blank lines are passed over."""
    for number, content in enumerate(stream, start=1):
        position.line = number
        if content.strip():
            yield _parse_json_line(content, str(position), text_field)


def _parse_json_line(content: bytes, where: str, text_field: str) -> TextOrError:
    line = decode_utf8(content, where, one_line=True)
    if isinstance(line, UserError):
        return line
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not valid JSON: {error}")
    text = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return UserError(f"{where}: no text in field {text_field!r} (data.text_field)")
    if "\0" in text:
        return UserError(f"{where}: holds a NUL character, which marks binary data")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # JSON can spell half a character
        return UserError(f"{where}: holds half a surrogate pair, which is no character")
    return text


def _open_plain(file: Path) -> io.BufferedIOBase:
    return file.open("rb")


_PLAIN = Compression("", _open_plain, ())
_GZIP = Compression("gzip", gzip.open, (EOFError, zlib.error, gzip.BadGzipFile))

FORMATS = (
    Format(".txt", _read_whole, _PLAIN),
    Format(".md", _read_whole, _PLAIN),
    Format(".txt.gz", _read_whole, _GZIP),
    Format(".jsonl", _read_json_lines, _PLAIN),
    Format(".jsonl.gz", _read_json_lines, _GZIP),
)
SUFFIXES = tuple(row.suffix for row in FORMATS)


def _format_of(file_name: str) -> Format | None:
    """The format of a file, by its name. None if it is not known, or if the file is hidden."""
    if file_name.startswith("."):
        return None
    return next((row for row in FORMATS if file_name.endswith(row.suffix)), None)


# Files and their splits


@dataclasses.dataclass(frozen=True)
class _TextFile:
    path: Path
    format: Format
    split: Split | None  # that its name or a folder's name gives


def open_source(config: DataConfig, known: KnownFiles) -> Source:
    """The text files that `config.path` names: a file, a folder with everything below it, or a glob.

    Every file that is not `known` is read once for the fingerprint. Raises UserError if there are no files, if one
    cannot be read, or if only some of them name a split.
    """
    files = _find_files(config.path)
    read = tuple(_identify(name, file.path, known) for name, file in files.items())
    digest = hashlib.sha256(config.text_field.encode())
    for one in read:
        digest.update(f"\0{one.name}\0{one.bytes}\0{one.sha256}".encode())

    # Names count only if they give train and at least one more split: a lone "test.txt" is text like any other.
    if {"train"} < {file.split for file in files.values() if file.split}:
        strays = [name for name, file in files.items() if file.split is None]
        if strays:
            raise UserError(
                f"data.path={config.path!r}: {strays[0]!r} names no split, but other files do ({', '.join(SPLITS)});"
                " rename it or give a glob that leaves it out"
            )
        rule = "splits by file name"
        chosen = {split: [file for file in files.values() if file.split == split] for split in SPLITS}
    else:
        rule = "documents of all files"
        chosen = {"train": list(files.values())}

    readers: dict[Split, Reader] = {
        split: functools.partial(_read_files, part, config.text_field) for split, part in chosen.items() if part
    }
    size = sum(file.path.stat().st_size for file in files.values())
    description = f"{config.path} ({len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes)"
    return Source(description, digest.hexdigest(), rule, readers, read)


def _identify(name: str, path: Path, known: KnownFiles) -> SourceFile:
    about = path.stat()  # before the content is read, so that a change from now on gives the file another time
    name = os.fsencode(name).decode(errors="backslashreplace")  # a file may have a name that is not UTF-8
    sha256 = known.get((name, about.st_size, about.st_mtime_ns)) or hash_file(path)
    return SourceFile(name, about.st_size, about.st_mtime_ns, sha256)


def _read_files(files: list[_TextFile], text_field: str) -> Iterator[TextOrError]:
    """The documents of all files. Raises UserError if a file cannot be read to its end."""
    for file in files:
        position, compression = Position(file.path), file.format.compression
        try:
            with compression.open(file.path) as stream:
                yield from file.format.read(stream, position, text_field)
        except compression.errors as error:
            place = f"{file.path}, after line {position.line}" if position.line else str(file.path)
            raise UserError(f"{place}: damaged or truncated {compression.name} file: {error}") from error
        except OSError as error:
            raise UserError(f"{file.path}: cannot be read: {error.strerror}") from error


def _find_files(path: str) -> dict[str, _TextFile]:
    """The text files that `path` names, sorted by name. Names are relative to the folder that all of them are in."""
    root = Path(path)
    if root.is_file():
        candidates, base = [root], root.parent
        if _format_of(root.name) is None:
            raise UserError(f"data.path={path!r}: cannot read this kind of file; known: {', '.join(SUFFIXES)}")
    elif root.is_dir():
        candidates, base = list(root.rglob("*")), root
    elif glob.has_magic(path):
        candidates = [Path(match) for match in glob.glob(path, recursive=True)]
        parts = path.split("/")
        first_pattern = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        base = Path("/".join(parts[:first_pattern]) or ("/" if path.startswith("/") else "."))
    else:
        raise UserError(f"data.path={path!r}: there is no such file or folder")
    found = {}
    for file in candidates:
        file_format = _format_of(file.name)
        if file_format is not None and file.is_file():
            name = file.relative_to(base).as_posix()
            found[name] = _TextFile(file, file_format, _split_of(name.lower().removesuffix(file_format.suffix)))
    if not found:
        raise UserError(f"data.path={path!r}: no file there ends in {', '.join(SUFFIXES)}")
    return dict(sorted(found.items()))


def _split_of(name: str) -> Split | None:
    """The split that a name without its suffix gives: by a folder (`test/0`), or by the file's first or last word.

    Words are runs of letters: `wiki-test`, `train-00000-of-00001` and `test_0` name their splits, `my-test-notes` none.
    """
    *folders, file = name.split("/")
    words = re.findall("[a-z]+", file)
    return next((SPLIT_NAMES[word] for word in (*folders, *words[:1], *words[-1:]) if word in SPLIT_NAMES), None)

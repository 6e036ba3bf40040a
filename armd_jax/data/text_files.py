"""Text files as a source of documents: in which formats they are, and the splits that their names give.

To add a format or a compression, add a row to `FORMATS`, and a function that reads it if none of those here does. The
file names that are looked for and the messages follow from the table.
"""

import codecs
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from armd_jax import remote
from armd_jax.data import bucket_files, found_files, tables
from armd_jax.data.reading import (
    KnownFiles,
    Piece,
    Position,
    Reader,
    Selection,
    Source,
    SourceFile,
    TextOrError,
    decode_utf8,
    hash_file,
)
from armd_jax.data.splits import SPLITS, splits_named
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import Split

# Formats


@dataclasses.dataclass(frozen=True)
class Compression:
    """A way in which whole files are compressed.

    Attributes:
      name: what messages call it.
      open: opens a file for reading its decompressed bytes.
      errors: gives what reading raises if the file is damaged or ends too early.
    """

    name: str
    open: Callable[[Path], io.BufferedIOBase]
    errors: Callable[[], tuple[type[Exception], ...]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      suffix: how the names of such files end, in lower case. No suffix ends in another one.
      read: yields the documents of an open file, given the stream, the position (which it keeps up to date if it reads
        line by line) and the name of the field that holds the text (`data.text_field`).
      compression: how such files are compressed.
      first_line_decides: whether files of other kinds end in the same suffix. A file is then taken if its first line is
        a document.
    """

    suffix: str
    read: Callable[[io.BufferedIOBase, Position, str], Iterator[TextOrError]]
    compression: Compression
    first_line_decides: bool = False


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


def _zstd() -> ModuleType | None:
    """The module of Zstandard, which Python has since 3.14; None if it is not there."""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            return None
    found: ModuleType = zstd
    return found


def _open_zstd(file: Path) -> io.BufferedIOBase:
    if (library := _zstd()) is None:
        raise UserError(f'{file}: to read Zstandard, install the extra data: pip install "armd-jax[data]"')
    opened: io.BufferedIOBase = library.open(file, "rb")
    return opened


def _zstd_errors() -> tuple[type[Exception], ...]:
    library = _zstd()
    return () if library is None else (EOFError, library.ZstdError)


_PLAIN = Compression("", _open_plain, lambda: ())
_GZIP = Compression("gzip", gzip.open, lambda: (EOFError, zlib.error, gzip.BadGzipFile))
_ZSTD = Compression("Zstandard", _open_zstd, _zstd_errors)

FORMATS = (
    Format(".txt", _read_whole, _PLAIN),
    Format(".md", _read_whole, _PLAIN),
    Format(".txt.gz", _read_whole, _GZIP),
    Format(".jsonl", _read_json_lines, _PLAIN),
    Format(".jsonl.gz", _read_json_lines, _GZIP),
    # C4 and others call their JSON lines so, and settings and vocabularies end in it as well.
    Format(".json", _read_json_lines, _PLAIN, first_line_decides=True),
    Format(".json.gz", _read_json_lines, _GZIP, first_line_decides=True),
    Format(".txt.zst", _read_whole, _ZSTD),
    Format(".jsonl.zst", _read_json_lines, _ZSTD),
    Format(".json.zst", _read_json_lines, _ZSTD, first_line_decides=True),
    Format(".parquet", tables.read_parquet, _PLAIN),
    Format(".arrow", tables.read_arrow, _PLAIN),
)
SUFFIXES = tuple(row.suffix for row in FORMATS)

# Which files are left out, and why

_NOT_READ = {
    **dict.fromkeys((".zst", ".zstd"), "compressed with Zstandard"),
    **dict.fromkeys((".xz", ".lzma"), "compressed with xz"),
    **{".bz2": "compressed with bzip2", ".lz4": "compressed with LZ4", ".br": "compressed with Brotli"},
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".rar"), "an archive"),
    **dict.fromkeys((".csv", ".tsv", ".tfrecord", ".array_record"), "a table or records"),
}
_DESCRIBES_DATA = re.compile(
    r"(readme|licen[cs]e)([-_. ].*)?|copying|copyright|notice|citation|authors|contributors|contributing|changelog"
    r"|(data|dataset|model)[-_ ]?(card|sheet)"
)


def _format_of(file_name: str) -> Format | None:
    """The format of a file, by its name. None if it is not known."""
    return next((row for row in FORMATS if file_name.lower().endswith(row.suffix)), None)


def _why_left_out(file: Path, by_name: bool, text_field: str) -> str:
    """Why a file is not read; empty if it is. by_name: whether the user has chosen the file by its name or ending."""
    name, row = file.name.lower(), _format_of(file.name)
    if row is None:
        for suffix, what in _NOT_READ.items():
            if name.endswith(suffix):
                return f"{what}, which is not read; make it .jsonl, or .jsonl.gz"
        return "not a kind of file that is read"
    if name.startswith("cache-") and name.endswith(".arrow"):
        return "what datasets keeps of something that was computed"
    if not by_name and _DESCRIBES_DATA.fullmatch(name.removesuffix(row.suffix)):
        return f"describes the data; a glob with its ending, such as **/*{row.suffix}, takes it"
    if row.first_line_decides and not _first_line_is_a_document(file, row.compression, text_field):
        return f"its first line is no JSON object with a text in field {text_field!r} (data.text_field)"
    return ""


def _first_line_is_a_document(file: Path, compression: Compression, text_field: str) -> bool:
    """Whether a file holds JSON lines. A file that cannot be read is taken for one: reading it tells what is wrong."""
    try:
        with compression.open(bucket_files.here(file)) as stream:
            # A document of another kind may be one line of many gigabytes, which the first character tells apart.
            start = stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
            if not start.startswith(b"{"):
                return False
            line = start.partition(b"\n")[0] if b"\n" in start else start + stream.readline()
    except compression.errors():
        return True
    except OSError:
        return True
    return isinstance(_parse_json_line(line, str(file), text_field), str)


# Files and their splits


@dataclasses.dataclass(frozen=True)
class _TextFile:
    path: Path
    format: Format


def open_source(config: DataConfig, known: KnownFiles) -> Source:
    """The text files that `config.path` names: a file, a folder with everything below it, or a glob.

    Every file that is not `known` is read once for the fingerprint. Raises UserError if there are no files, if one
    cannot be read, or if their names contradict one another about the splits.
    """
    files, left_out = _choose_files(config)
    read = {name: _identify(name, file.path, known) for name, file in files.items()}
    digest = hashlib.sha256(config.text_field.encode())
    for one in read.values():
        digest.update(f"\0{one.name}\0{one.bytes}\0{one.sha256}".encode())

    names = _names_by_split(config.path, list(files)) if config.split_by_name and len(files) > 1 else {}
    rule = "splits by file name" if names else "documents of all files"
    taken: dict[str, tuple[str, ...]] = {split: part for split, part in names.items()} or {rule: tuple(files)}
    names = names or {"train": tuple(files)}
    readers: dict[Split, Reader] = {
        split: functools.partial(_read_files, [files[name] for name in part], config.text_field)
        for split, part in names.items()
    }
    pieces = {split: tuple(_piece(files[name], read[name], config) for name in part) for split, part in names.items()}
    size = sum(file.path.stat().st_size for file in files.values())
    description = f"{config.path} ({len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes)"
    selection = Selection(config.path, "files", taken, left_out)
    return Source(description, digest.hexdigest(), rule, readers, selection, tuple(read.values()), pieces)


def _identify(name: str, path: Path, known: KnownFiles) -> SourceFile:
    about = path.stat()  # before the content is read, so that a change from now on gives the file another time
    name = os.fsencode(name).decode(errors="backslashreplace")  # a file may have a name that is not UTF-8
    sha256 = known.get((name, about.st_size, about.st_mtime_ns)) or hash_file(bucket_files.here(path))
    return SourceFile(name, about.st_size, about.st_mtime_ns, sha256)


def _piece(file: _TextFile, about: SourceFile, config: DataConfig) -> Piece:
    reader = functools.partial(_read_files, [file], config.text_field)
    is_text = file.format.compression is _PLAIN and file.format.read in (_read_whole, _read_json_lines)
    return Piece(reader, file.path, about, about.bytes if is_text else None)


def _read_files(files: list[_TextFile], text_field: str) -> Iterator[TextOrError]:
    """The documents of all files. Raises UserError if a file cannot be read to its end."""
    for file in files:
        position, compression = Position(remote.spelled(str(file.path))), file.format.compression
        try:
            with compression.open(bucket_files.here(file.path)) as stream:
                yield from file.format.read(stream, position, text_field)
        except compression.errors() as error:
            place = f"{file.path}, after line {position.line}" if position.line else str(file.path)
            raise UserError(f"{place}: damaged or truncated {compression.name} file: {error}") from error
        except OSError as error:
            raise UserError(f"{file.path}: cannot be read: {error.strerror}") from error


def _choose_files(config: DataConfig) -> tuple[dict[str, _TextFile], dict[str, str]]:
    """The text files that `config.path` names, sorted by name, and why others there are left out.

    Raises UserError if there are none.
    """
    path = bucket_files.laid_out(config.path)
    found = found_files.find(path)
    files: dict[str, _TextFile] = {}
    left_out = dict(found.left_out)
    for name, file in found.files.items():
        reason, row = _why_left_out(file, found.by_name, config.text_field), _format_of(file.name)
        if row is None or reason:
            left_out[name] = reason
        else:
            files[name] = _TextFile(file, row)
    for ending in (".gz", ".zst"):
        for name in [name for name in files if name.endswith(ending) and name.removesuffix(ending) in files]:
            del files[name]
            left_out[name] = "the compressed form of a file that is read"
    if files:
        return files, dict(sorted(left_out.items()))
    if Path(path).is_file():
        (reason,) = left_out.values()
        raise UserError(
            f"data.path={config.path!r}: cannot read this kind of file: {reason}; known: {', '.join(SUFFIXES)}"
        )
    reasons = "".join(f"; {line.strip()}" for line in Selection(left_out=left_out).lines()[1:])
    raise UserError(f"data.path={config.path!r}: no file there ends in {', '.join(SUFFIXES)}{reasons}")


def _names_by_split(path: str, names: list[str]) -> dict[Split, tuple[str, ...]]:
    """The names of the files of every split. Empty if the names give no splits, or all give the same one.

    Raises UserError if the names leave open what is trained on: if one gives two splits, or if one gives none while
    others are held out.
    """

    def error(what: str) -> UserError:
        return UserError(
            f"data.path={path!r}: {what}; rename the file, give a glob that leaves it out, or let names mean nothing"
            " with data.split_by_name=false (armd prepare: --no-split-by-name)"
        )

    given = {name: splits_named(name) for name in names}
    for name, found in given.items():
        if len(found) > 1:
            words = " and ".join(f"{split} ({word!r})" for split, word in found.items())
            raise error(f"the name {name!r} gives two splits, {words}")
    of_name = {name: split for name, found in given.items() for split in found}
    splits = set(of_name.values())
    unnamed = [name for name in names if name not in of_name]
    if not splits or splits == {"train"} or (len(splits) == 1 and not unnamed):
        return {}  # nothing is held out, or all of it is of one kind, such as the test files of an evaluation
    if unnamed:
        held_out = next(name for name, split in of_name.items() if split != "train")
        raise error(f"{unnamed[0]!r} names no split, but {held_out!r} gives {of_name[held_out]}")
    if "train" not in splits:
        raise error(f"{names[0]!r} gives {of_name[names[0]]}, and no name gives train")
    return {split: part for split in SPLITS if (part := tuple(name for name in names if of_name[name] == split))}

"""Documents out of files and datasets, one at a time, and an account of those that were left out.

What is damaged in one document (bytes that are not UTF-8, a NUL, broken JSON, no text in its field) costs that document
where the user says so and is an error otherwise. A file that ends in the middle is an error always: nobody knows what
is lost. Documents without a visible character hold nothing to learn and are left out, counted.
"""

import dataclasses
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from armd_jax.errors import UserError

Item = str | UserError  # a document, or what is wrong with it


@dataclasses.dataclass
class LeftOut:
    """Documents that a whole pass over a source left out."""

    empty: int = 0  # without a visible character
    damaged: int = 0  # not text
    first_damaged: str = ""  # where the first of them is and what is wrong with it


class Source:
    """Documents that can be read again: every call starts at the first one.

    Attributes:
      left_out: what the last pass that came to the end left out.
    """

    def __init__(self, read: Callable[[], Iterable[Item]], skip_damaged: bool = False) -> None:
        self._read, self._skip_damaged = read, skip_damaged
        self.left_out = LeftOut()

    def __call__(self) -> Iterator[str]:
        """Raises UserError at a damaged document unless they are skipped."""
        left_out = LeftOut()
        for item in self._read():
            if isinstance(item, UserError):
                if not self._skip_damaged:
                    raise UserError(f"{item} (data.damaged=skip leaves such documents out)") from item
                left_out.damaged += 1
                left_out.first_damaged = left_out.first_damaged or str(item)
            elif not item or item.isspace():
                left_out.empty += 1
            else:
                yield item
        self.left_out = left_out


def read_files(files: list[Path], text_field: str) -> Iterator[Item]:
    """The documents of text files (one each) and of .jsonl files (one a line), gzipped or not."""
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        line = 0
        try:
            with opener(file, "rb") as stream:
                if not file.name.endswith((".jsonl", ".jsonl.gz")):
                    yield decode(stream.read(), str(file))
                    continue
                for line, content in enumerate(stream, start=1):
                    if content.strip():
                        yield _parse_json_line(content, f"{file}, line {line}", text_field)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            place = f"{file}, after line {line}" if line else str(file)
            raise UserError(f"{place}: damaged or truncated gzip file: {error}") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _parse_json_line(content: bytes, where: str, text_field: str) -> Item:
    line = decode(content, where, one_line=True)
    if isinstance(line, UserError):
        return line
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not valid JSON: {error}")
    text = item.get(text_field) if isinstance(item, dict) else None
    if not isinstance(text, str):
        return UserError(f"{where}: no text in field {text_field!r} (data.text_field)")
    if "\0" in text:
        return UserError(f"{where}: holds a NUL character, which marks binary data")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # JSON can spell half a character
        return UserError(f"{where}: holds half a surrogate pair, which is no character")
    return text


def read_tfds(source: Any, text_field: str, where: str) -> Iterator[Item]:
    """Documents of a TFDS data source, many a read: one read costs time in proportion to the records of its file."""
    for start in range(0, len(source), 256):
        indices = range(start, min(start + 256, len(source)))
        for index, example in zip(indices, source.__getitems__(list(indices)), strict=True):
            text = example[text_field]
            if isinstance(text, bytes):
                yield decode(text, f"{where}, example {index}", one_line=True)
            elif isinstance(text, str):
                yield text
            else:
                raise UserError(f"{where}, example {index}: field {text_field!r} is not text (data.text_field)")


def decode(content: bytes, where: str, one_line: bool = False) -> Item:
    """UTF-8 `content` as text. `one_line`: `where` names its line already."""

    def damage(place: int, what: str) -> UserError:
        line = content.count(b"\n", 0, place) + 1
        return UserError(f"{where}{'' if one_line else f', line {line}'}: {what} (byte {place})")

    nul = content.find(b"\0")
    if nul >= 0:
        return damage(nul, "holds a NUL character, which marks binary data")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return damage(error.start, "not UTF-8 text")


def hash_file(file: Path) -> str:
    """sha256 of the file's content. Raises UserError where it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error

"""Documents from any source, one at a time, and a count of those that were left out.

A document is damaged if it is not text: it holds bytes that are not UTF-8, a NUL character or broken JSON, or the field
that should hold the text does not. `data.damaged` decides whether that is an error or the document is skipped and
counted. A file that ends too early is always an error, because nobody knows what the missing part held. Documents
without a visible character hold nothing to learn; they are always left out and counted.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import assert_never

from armd_jax.errors import UserError, shown
from armd_jax.names import Damaged, Split


@dataclasses.dataclass
class Position:
    """How far a file has been read, for messages.

    file: how people call it.
    line: what was read last; 0 if the file is not read piece by piece. unit: what the pieces are.
    """

    file: str
    line: int = 0
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}" if self.line else str(self.file)


# A document, or what is wrong with it. The error names the place and is yielded, not raised: one damaged document does
# not end the reading.
TextOrError = str | UserError
# Every call is a new pass over all documents of one split. UserError is raised only if the rest cannot be read either.
Reader = Callable[[], Iterable[TextOrError]]

_NAMED_AT_MOST = 3  # names in one line of a list


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which parts of a source, such as its files, are read, and why the others are not.

    Attributes:
      path: `data.path`.
      parts: what they are, in the plural.
      taken: the names of the parts that are read, by what they are read as.
      left_out: the reason, by the name of the part.
    """

    path: str = ""
    parts: str = "files"
    taken: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """The selection for people. None if there was nothing to select, as with a single file."""
        count = sum(map(len, self.taken.values()))
        if count <= 1 and not self.left_out:
            return []
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        head = f"data.path={self.path!r}: {count:,} {self.parts} taken, {len(self.left_out):,} left out"
        taken = [f"  taken as {role}: {_listed(names)}" for role, names in self.taken.items()]
        return [head, *taken, *(f"  left out: {_listed(names)} ({reason})" for reason, names in reasons.items())]


def _listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(map(shown, names[:_NAMED_AT_MOST])) + (f" and {more:,} more" if more > 0 else "")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source, as it was when it was read.

    Attributes:
      name: its path below the folder that all files of the source are in.
      bytes, mtime_ns: its size and its modification time, in nanoseconds since 1970.
      sha256: of its content.
    """

    name: str
    bytes: int
    mtime_ns: int
    sha256: str


# The sha256 of files that were read before, by name, size and modification time. A file whose three are known is not
# read again.
KnownFiles = Mapping[tuple[str, int, int], str]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a source that can be read without the others, such as a file.

    Attributes:
      reader: its documents. Those of all pieces of a split, one piece after the other, are the documents of the split.
      path, file: the file that it is; None if the source does not know its files.
      text_bytes: about how much text it has, as UTF-8; None if that is not known before it is read.
    """

    reader: Reader = dataclasses.field(repr=False)
    path: Path | None = None
    file: SourceFile | None = None
    text_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What opening `data.path` gives: documents in the splits that the source itself has.

    Attributes:
      description: one line for people.
      fingerprint: sha256 of everything that decides the documents, such as contents, names and versions. Prepared data
        are used again only if it is the same.
      split_rule: a few words on where the splits come from. They become part of `Corpus.split_rule`.
      readers: a reader per split, "train" always among them.
      selection: what of the source is read, and what is not.
      files: the files that were read for the fingerprint; None if the source knows itself without reading files.
      pieces: the splits that can be read piece by piece.
    """

    description: str
    fingerprint: str
    split_rule: str
    readers: dict[Split, Reader] = dataclasses.field(repr=False)
    selection: Selection = dataclasses.field(default_factory=Selection, repr=False)
    files: tuple[SourceFile, ...] | None = dataclasses.field(default=None, repr=False)
    pieces: dict[Split, tuple[Piece, ...]] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass
class LeftOut:
    """Documents that one complete pass over a source left out."""

    empty: int = 0  # without a visible character
    damaged: int = 0  # not text
    first_damaged: str = ""  # where the first of them is, and what is wrong with it

    def keep(self, document: TextOrError, damaged: Damaged) -> str | None:
        """The text of a document, or None for one that is left out, which is counted.

        Raises UserError at a damaged one unless such documents are skipped.
        """
        if isinstance(document, UserError):
            match damaged:
                case "error":
                    raise UserError(f"{document} (data.damaged=skip leaves such documents out)") from document
                case "skip":
                    self.damaged += 1
                    self.first_damaged = self.first_damaged or str(document)
                    return None
                case _:
                    assert_never(damaged)
        if not document or document.isspace():
            self.empty += 1
            return None
        return document


class Documents:
    """The documents of one split of a source, without those that are left out.

    Attributes:
      left_out: what the last complete pass left out.
    """

    def __init__(self, reader: Reader, damaged: Damaged) -> None:
        self._reader, self._damaged = reader, damaged
        self.left_out = LeftOut()

    def read(self) -> Iterator[str]:
        """A new pass over all documents. Raises UserError at a damaged one unless such documents are skipped."""
        left_out = LeftOut()
        for document in self._reader():
            text = left_out.keep(document, self._damaged)
            if text is not None:
                yield text
        self.left_out = left_out


def decode_utf8(content: bytes, where: str, one_line: bool = False) -> TextOrError:
    """UTF-8 bytes as text, without a byte order mark at the start.

    where: the place that an error names. The number of the damaged line is added to it unless `one_line` is set, which
    says that `content` is one line and `where` already names it.
    """

    def error_at(offset: int, what: str) -> UserError:
        line = content.count(b"\n", 0, offset) + 1
        return UserError(f"{where}{'' if one_line else f', line {line}'}: {what} (byte {offset})")

    nul = content.find(b"\0")
    if nul >= 0:
        return error_at(nul, "holds a NUL character, which marks binary data")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error_at(error.start, "not UTF-8 text")


def hash_file(file: Path) -> str:
    """sha256 of the file's content. Raises UserError if the file cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error

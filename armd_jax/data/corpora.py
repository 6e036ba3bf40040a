"""Corpora: the documents that `data.path` names, in the splits train, valid and test.

A source is where documents come from. To add one, such as Hugging Face `datasets`, write a module with a function
`open_source(config)` that returns a `reading.Source` (tfds.py is the nearest example), and name it three times below:
in `SourceKind`, in `source_kind`, which tells from `data.path` that it is meant, and in the `match` of `_open_source`.
The type checker reports a kind that is missing from the `match`, and tests/data/test_corpora.py one that no path leads
to. Held-out splits, damaged documents and re-reading are taken care of here.

A corpus streams its documents and holds at most one file or document in memory, except for the embedded one (2 MB).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal, assert_never

from armd_jax.data import embedded, text_files, tfds
from armd_jax.data.reading import Documents, KnownFiles, LeftOut, Piece, Selection, Source, SourceFile
from armd_jax.data.splits import SPLITS, Division
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import Damaged, Split

SourceKind = Literal["embedded", "tfds", "files"]


def source_kind(path: str) -> SourceKind:
    """The kind of source that `data.path` names."""
    if not path:
        return "embedded"
    if path.startswith(tfds.PREFIX):
        return "tfds"
    return "files"


def _open_source(config: DataConfig, known: KnownFiles) -> Source:
    kind = source_kind(config.path)
    match kind:
        case "embedded":
            return embedded.open_source()
        case "tfds":
            return tfds.open_source(config)
        case "files":
            return text_files.open_source(config, known)
        case _:
            assert_never(kind)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in splits.

    Attributes:
      description: one line for people.
      fingerprint: sha256 of everything that decides the documents, such as contents, names and versions.
      split_rule: how the documents are divided among the splits. Corpora with equal fingerprint and rule have the same
        documents in every split.
      files: see `Source`.
      selection: which parts of the source, such as files, are read, and why others are not.
      pieces: what the documents of a split are read from, by the splits that the source itself has.
      division: what divides the training documents of the source.
    """

    description: str
    fingerprint: str
    split_rule: str
    files: tuple[SourceFile, ...] | None = dataclasses.field(repr=False)
    _readers: dict[Split, Callable[[], Iterator[str]]] = dataclasses.field(repr=False)
    _documents: dict[Split, Documents] = dataclasses.field(repr=False)  # by the splits that the source itself has
    selection: Selection = dataclasses.field(repr=False)
    pieces: dict[Split, tuple[Piece, ...]] = dataclasses.field(repr=False)
    division: Division = dataclasses.field(repr=False)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that exist."""
        return tuple(self._readers)

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of `split`, in the order of the source.

        Raises UserError if there is no such split and, while reading, at text that cannot be read.
        """
        self.check_split(split)
        return self._readers[split]()

    def check_split(self, split: str) -> None:
        """Raises UserError if there is no such split."""
        if split not in self.splits:
            raise UserError(f"{self.description} has no {split!r} split; it has {', '.join(self.splits)}")

    def size(self, split: Split) -> int | None:
        """About how many bytes of text `split` has; None if that is not known without reading it."""
        if self.division.fractions and (split == "train" or split in self.division.fractions):
            return self.division.size(split)
        sizes = [piece.text_bytes for piece in self.pieces[split]]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def left_out(self) -> dict[Split, LeftOut]:
        """What the last complete pass left out, by the splits that the source itself has."""
        return {split: documents.left_out for split, documents in self._documents.items()}


def open_corpus(config: DataConfig, known: KnownFiles | None = None) -> Corpus:
    """The corpus that `config.path` names. Raises UserError if there is none.

    An empty path is the embedded corpus. "tfds:NAME" or "tfds:/folder/of/a/dataset/version" is a prepared TFDS dataset.
    Anything else is a file, a folder or a glob of the kinds of file in `text_files.FORMATS`, which are read once for
    the fingerprint, unless they are `known` from an earlier time.

    The splits of the source are taken as they are. If it has no validation split, one is taken from its training
    documents, and if training documents are all it has, a test split as well, unless their fractions are 0.
    """
    source = _open_source(config, {} if known is None else known)
    documents = {split: Documents(reader, config.damaged) for split, reader in source.readers.items()}
    fractions: dict[Split, float] = {}
    if "valid" not in documents and config.valid_fraction:
        fractions["valid"] = config.valid_fraction
    if len(documents) == 1 and config.test_fraction:
        fractions["test"] = config.test_fraction

    division = Division(documents["train"], fractions, source.description)
    readers: dict[Split, Callable[[], Iterator[str]]] = {split: part.read for split, part in documents.items()}
    readers |= {split: functools.partial(division.read, split) for split in ("train", *fractions)}
    return Corpus(
        source.description,
        source.fingerprint,
        _split_rule(source, config.damaged, fractions),
        source.files,
        {split: readers[split] for split in SPLITS if split in readers},
        documents,
        source.selection,
        {split: source.pieces.get(split, (Piece(reader),)) for split, reader in source.readers.items()},
        division,
    )


def _split_rule(source: Source, damaged: Damaged, fractions: dict[Split, float]) -> str:
    """The `split_rule` of a corpus.

    The names of prepared folders are hashes over it: if a word of it changes, all data are prepared once more.
    """
    rule = source.split_rule
    match damaged:
        case "error":
            pass
        case "skip":
            rule += "; damaged documents left out"
        case _:
            assert_never(damaged)
    if fractions:
        shares = ", ".join(f"{split} {fraction:g}" for split, fraction in fractions.items())
        rule += f"; taken from train, by document hash or, of one document, from its end: {shares}"
    return rule

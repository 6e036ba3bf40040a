"""The manifest of a prepared folder: what its rows were made from, and which files hold them.

A prepared folder may come from anywhere, so every value is checked before it is used. The dataclasses below are the
keys of manifest.json, in its order. A change to them changes the format: raise FORMAT with it, unless it is a new key
that folders of earlier versions may lack.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from armd_jax import files, typed
from armd_jax.data.reading import KnownFiles, LeftOut, SourceFile
from armd_jax.errors import UserError, shown
from armd_jax.names import Split, TokenizerKind

FORMAT = 2
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
_SHARD_NAME = re.compile(rf"({'|'.join(typed.choices(Split))})-\d{{5,}}\.array_record")

RowDtype = Literal["<u2", "<u4"]  # NumPy's names of little-endian unsigned integers


def row_dtype(vocab_size: int) -> RowDtype:
    """How a token of so large a vocabulary is stored."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


@dataclasses.dataclass(frozen=True)
class Counts:
    """The size of one split."""

    documents: int
    bytes: int  # of the original text as UTF-8
    words: int  # plus line ends
    tokens: int  # with end-of-text, without padding
    rows: int  # with the last one, even if it is not full


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str  # its name in the folder
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PackedSplit:
    """The size of one split (see `Counts`) and its shards in order. All shards but the last have `shard_rows` rows."""

    documents: int
    bytes: int
    words: int
    tokens: int
    rows: int
    shards: tuple[Shard, ...]

    @property
    def counts(self) -> Counts:
        return Counts(self.documents, self.bytes, self.words, self.tokens, self.rows)


@dataclasses.dataclass(frozen=True)
class TrainingSample:
    """What a tokenizer was trained on: every `every`-th line of the train split, so that `largest` bytes suffice.

    It follows from the documents, and nothing in it is drawn. A very long line counts as several.
    """

    every: int
    bytes: int
    largest: int


@dataclasses.dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the tokens: what was asked for (`tokenizers.request_of`), and what `Tokenizer` says.

    Attributes:
      sample: what it was trained on; None if it was not trained here, or by an earlier version.
    """

    request: str
    kind: TokenizerKind
    hash: str
    vocab_size: int
    end_of_text: int
    lossless: bool
    sample: TrainingSample | None = typed.field(None, absent_if_none=True)


@dataclasses.dataclass(frozen=True)
class SourceIdentity:
    """Which documents were read: `description`, `fingerprint` and `files` of the corpus."""

    description: str
    fingerprint: str
    files: tuple[SourceFile, ...] | None = typed.field(None, absent_if_none=True)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
      row_length: N, tokens per row.
      dtype: how a token is stored.
      shard_rows: rows per shard, except for the last shard of a split.
      split_rule: that of the corpus.
      left_out: documents that are in no row, by the splits that the source itself has.
    """

    format: int
    row_length: int
    dtype: RowDtype
    shard_rows: int
    tokenizer: TokenizerIdentity
    source: SourceIdentity
    split_rule: str
    left_out: dict[Split, LeftOut]
    splits: dict[Split, PackedSplit]

    @property
    def digest(self) -> str:
        """sha256 of what decides the training batches besides seed and step: the training rows and the tokenizer."""
        shards = [shard.sha256 for shard in self.splits["train"].shards]
        return hashlib.sha256("\0".join([self.tokenizer.hash, *shards]).encode()).hexdigest()


def may_hold(name: str) -> bool:
    """Whether a prepared folder may have a file of this name, relative to it, besides its manifest."""
    return name.startswith(f"{TOKENIZER_FOLDER}/") or _SHARD_NAME.fullmatch(name) is not None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a folder. It comes last: a folder without one is not a prepared folder."""
    files.write(folder / MANIFEST_FILE, typed.to_json(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder. Raises UserError if there is none, or one that packing cannot have written."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no prepared data there ({MANIFEST_FILE} is missing)")
    try:
        values = files.read_json(file)
        if not isinstance(values, dict):
            raise UserError("it is not a JSON object")
        if values.get("format", FORMAT) == FORMAT:
            manifest = typed.build(Manifest, values)
            _check(manifest)
            return manifest
    except UserError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise UserError(f"{file}: damaged manifest: {reason}; delete the folder and prepare the data again") from error
    raise UserError(f"{file}: format {shown(values['format'])} is not the {FORMAT} of this version; prepare again")


def prepared_below(root: Path) -> Iterator[tuple[Path, Manifest | UserError]]:
    """The prepared folders in `root`: the root itself if it is one, and those right below it, sorted by name.

    Each comes with its manifest, or with what is wrong with that. There are none in a folder that may not be read.
    """
    try:
        itself = [root] if (root / MANIFEST_FILE).is_file() else []
        below = sorted(file.parent for file in root.glob(f"*/{MANIFEST_FILE}"))
    except OSError:
        return
    for folder in [*itself, *(folder for folder in below if not folder.name.startswith("."))]:
        try:
            yield folder, read_manifest(folder)
        except UserError as error:
            yield folder, error


def known_files(root: Path) -> KnownFiles:
    """The source files that the prepared folders in `root` were made from."""
    manifests = [manifest for _, manifest in prepared_below(root) if isinstance(manifest, Manifest)]
    found = [file for manifest in manifests for file in manifest.source.files or ()]
    return {(file.name, file.bytes, file.mtime_ns): file.sha256 for file in found}


def _check(manifest: Manifest) -> None:
    """Raises UserError if the values have the right types, but packing can never have written them together."""
    for name in (*manifest.splits, *manifest.left_out):
        typed.check_choice(Split, name, "split")
    if "train" not in manifest.splits:
        raise UserError("it has no train split")
    if min(manifest.row_length, manifest.shard_rows) < 1:
        raise UserError("its rows or shards are empty")
    numbers = [manifest.tokenizer.vocab_size, manifest.tokenizer.end_of_text]
    numbers += [file.bytes for file in manifest.source.files or ()]
    if manifest.tokenizer.sample is not None:
        numbers += dataclasses.astuple(manifest.tokenizer.sample)
    for left_out in manifest.left_out.values():
        numbers += [left_out.empty, left_out.damaged]
    for split in manifest.splits.values():
        numbers += dataclasses.astuple(split.counts)
        for shard in split.shards:
            numbers += [shard.rows, shard.bytes]
            if not _SHARD_NAME.fullmatch(shard.file):  # other names could lead out of the folder
                raise UserError(f"{shown(shard.file)} is not the name of a shard")
        rows = [shard.rows for shard in split.shards]
        full_but_last = all(number == manifest.shard_rows for number in rows[:-1])
        rows_of_tokens = -(-split.tokens // manifest.row_length)
        if not full_but_last or sum(rows) != split.rows or split.rows != rows_of_tokens:
            raise UserError("its counts contradict one another")
    if min(numbers) < 0:
        raise UserError("one of its counts is negative")

"""A corpus as tokens in parts, each of which any machine makes by itself: `armd prepare --shard=i/n`.

A part knows its documents without the other parts. A file goes whole to the part in whose share of all bytes its middle
lies, and only that part reads it. A file of more than one and a half shares, and a source that does not know its files,
is dealt out in blocks of documents: all parts read it, and each tokenizes every n-th block. If a single document is to
be divided among the splits, blocks of its text are dealt out.

A part holds the tokens of its documents one after the other, and a record about each document. That includes what
decides to which split the document goes, which only all parts together tell. `merging` puts them together.
"""

import array
import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from armd_jax import files, remote, typed
from armd_jax.data import batching, bucket_files, encoding, progress, tokenizers
from armd_jax.data.batching import Tally
from armd_jax.data.building import large_folder, remove_torn
from armd_jax.data.corpora import Corpus, open_corpus
from armd_jax.data.encoding import Batch
from armd_jax.data.manifest import FORMAT, RowDtype, row_dtype
from armd_jax.data.reading import LeftOut, Piece, SourceFile, hash_file
from armd_jax.data.splits import hash_of
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import Split

NOTE = "part.json"  # the last file of a part, also in object storage
# A document, or a block of the only one: which piece of the source it is from and which block of that, then the hash
# that decides its split, the size of its text and that in tokens. Of several blocks, the last one has the size.
_FIELDS = ("piece", "block", "hash", "bytes", "words", "tokens")
RECORD = np.dtype([(name, "<u8") for name in _FIELDS])


@dataclasses.dataclass(frozen=True)
class Stream:
    """The tokens of a split of the source that a part has: how many, and in which files.

    Attributes:
      first_damaged_at: piece and block of the first damaged document of all, if it is one of these.
    """

    documents: int
    bytes: int
    tokens: int
    left_out: LeftOut
    first_damaged_at: tuple[int, ...]
    sha256_of_tokens: str
    sha256_of_records: str


@dataclasses.dataclass(frozen=True)
class Note:
    """What a part is.

    Attributes:
      identity: of the work that it is a part of, see `Work`.
      is_cut: whether the training documents are a single one, whose text is divided. If they are, `streams` has the
        splits that it is divided into; if not, those of the source.
      files: that were read.
      sha256: of the note itself without this field.
    """

    identity: str
    dtype: RowDtype
    is_cut: bool
    files: tuple[SourceFile, ...]
    streams: dict[Split, Stream]
    sha256: str = ""

    def hashed(self) -> "Note":
        """The note with the right `sha256`."""
        content = typed.to_json(dataclasses.replace(self, sha256=""))
        return dataclasses.replace(self, sha256=hashlib.sha256(content.encode()).hexdigest())

    @property
    def documents(self) -> int:
        """The documents of all streams."""
        return sum(stream.documents for stream in self.streams.values())

    @property
    def bytes(self) -> int:
        """The bytes of their text."""
        return sum(stream.bytes for stream in self.streams.values())

    @property
    def tokens(self) -> int:
        """Their tokens, with end-of-text."""
        return sum(stream.tokens for stream in self.streams.values())


class _Unread(Mapping[tuple[str, int, int], str]):
    """Says of every file that it is known, so that opening a corpus reads none of them."""

    def __getitem__(self, key: tuple[str, int, int]) -> str:
        return "not read"

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Work:
    """A preparation in parts.

    Attributes:
      config: what is prepared.
      out: the folder that all parts together become. They are kept beside it.
      count: n, how many parts there are.
      address: that of `out` in object storage, if it is the copy of a folder there.
    """

    config: DataConfig
    out: Path
    count: int
    address: str = ""

    @property
    def folder(self) -> str:
        """The folder of the parts, or its address."""
        return f"{self.address or os.path.abspath(self.out)}.parts"

    def place(self, number: int) -> str:
        """The folder of one part, or its address."""
        return f"{self.folder}/{number:05d}-of-{self.count:05d}"

    def part(self, number: int) -> Path:
        """The folder of one part, or of its copy, which is brought up to date if it is in object storage.

        Raises UserError if it cannot be fetched.
        """
        folder = remote.copy_for(self.place(number), "write")
        if (copy := remote.copy_of(folder)) is not None:
            copy.fetch()
        return folder

    def corpus(self) -> Corpus:
        """The corpus, of whose files only names and sizes are known."""
        return open_corpus(self.config, _Unread())

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if it would have to be trained, for which all text is needed."""
        tokenizer = tokenizers.ready_made(self.config)
        if tokenizer is None:
            raise UserError(
                f"--tokenizer={self.config.tokenizer}: a part cannot train one, because it does not read all text;"
                " train it on a sample with armd prepare --source=SAMPLE --out=FOLDER, and give --tokenizer=FOLDER"
            )
        return tokenizer

    def identity(self, number: int, corpus: Corpus) -> str:
        """Of what decides a part: sha256 over names and sizes of the files, the tokenizer, the rules and the number."""
        what = corpus.fingerprint, corpus.split_rule, tokenizers.request_of(self.config), batching.BATCH_CHARACTERS
        return progress.identity_of("part", FORMAT, *what, self.count, number)


def read_part(folder: Path, identity: str) -> Note:
    """The note of a part, whose files are as they were written.

    Raises UserError if one is missing or damaged, or if it is a part of another work.
    """
    again = "remove this folder and make the part again"
    try:
        note = typed.build(Note, files.read_json(folder / NOTE))
        if note != note.hashed():
            raise UserError("it was changed")
    except UserError as error:
        raise UserError(f"{folder}: no part that can be read ({error}); {again}") from error
    if note.identity != identity:
        raise UserError(
            f"{folder}: a part of another work, with other text, another tokenizer or other arguments; remove the"
            " folder of the parts, or give another --out"
        )
    for split, stream in note.streams.items():
        for ending, sha256 in (("tokens", stream.sha256_of_tokens), ("records", stream.sha256_of_records)):
            file = folder / f"{split}.{ending}"
            if not file.is_file() or hash_file(file) != sha256:
                raise UserError(f"{file}: missing or damaged; {again}")
    return note


def prepare_part(work: Work, number: int, workers: int = 1, shown: bool = True) -> Note:
    """Makes part `number` of a work, from 0, unless it is there.

    workers: processes that tokenize. shown: whether a progress bar is.
    Raises UserError if the part cannot be made, or is not what was written, and then leaves nothing of it behind.
    """
    tokenizer, corpus = work.tokenizer(), work.corpus()
    identity, folder = work.identity(number, corpus), work.part(number)
    copy = remote.copy_of(folder)
    remove_torn(folder, NOTE)
    if not os.path.exists(folder):
        if copy is not None:
            copy.check_writable()
        with large_folder(folder, NOTE, goes_on=lambda left: False) as partial:
            note = _Writer(work, corpus, tokenizer, number, workers, shown, partial).write(identity)
            files.write(partial / NOTE, typed.to_json(note.hashed()) + "\n")
    if copy is not None:
        copy.store()
    return read_part(folder, identity)


def owners(pieces: Sequence[Piece], count: int) -> list[int | None]:
    """For each piece, the part that has all of it; None if it is dealt out to all `count` parts."""
    sizes = [piece.file.bytes if piece.file else 0 for piece in pieces]
    total, start = sum(sizes), 0
    found: list[int | None] = []
    for piece, size in zip(pieces, sizes, strict=True):
        alone = piece.file is not None and 2 * size * count <= 3 * total
        found.append((2 * start + size) * count // (2 * total or 1) if alone else None)
        start += size
    return [None if owner is None else min(owner, count - 1) for owner in found]


@dataclasses.dataclass
class _Own:
    """What a part counts of one stream while it is written: flat records without `tokens`, and what was left out."""

    records: "array.array[int]" = dataclasses.field(default_factory=lambda: array.array("Q"))
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    first_damaged_at: tuple[int, ...] = ()
    tally: Tally = dataclasses.field(default_factory=Tally)


class _Writer:
    """Writes one part into a folder."""

    def __init__(
        self, work: Work, corpus: Corpus, tokenizer: Tokenizer, number: int, workers: int, shown: bool, folder: Path
    ) -> None:
        self._work, self._corpus, self._tokenizer, self._number = work, corpus, tokenizer, number
        self._workers, self._shown, self._folder = workers, shown, folder
        self._dtype = row_dtype(tokenizer.vocab_size)

    def write(self, identity: str) -> Note:
        """Writes the files of all streams, and gives the note about them."""
        corpus, streams = self._corpus, {}
        pieces = [piece for split in corpus.pieces.values() for piece in split]
        owner = iter(owners(pieces, self._work.count))
        read = {split: [(piece, next(owner)) for piece in of_split] for split, of_split in corpus.pieces.items()}
        is_cut = self._is_cut()
        mine = [piece for of_split in read.values() for piece, owner in of_split if owner in (None, self._number)]
        sources = tuple(_hashed(piece) for piece in mine)
        with tempfile.TemporaryDirectory() as tokenizer_folder:
            self._tokenizer.save(Path(tokenizer_folder))
            for split, of_split in read.items():
                if split == "train" and is_cut:
                    for cut in corpus.division.order:
                        streams[cut] = self._write_blocks(cut, Path(tokenizer_folder))
                else:
                    streams[split] = self._write_documents(split, of_split, Path(tokenizer_folder))
        return Note(identity, self._dtype, is_cut, tuple(one for one in sources if one is not None), streams)

    def _is_cut(self) -> bool:
        """Whether the training documents are a single one, from a single piece of the source, that has to be divided.

        If the only one of several files is not empty, the part that has it cannot know.
        """
        if not self._corpus.division.fractions or len(self._corpus.pieces["train"]) > 1:
            return False
        return len(list(itertools.islice(self._corpus.division.documents.read(), 2))) == 1

    def _write_documents(self, split: Split, pieces: list[tuple[Piece, int | None]], folder: Path) -> Stream:
        """Writes the documents of one split of the source that are this part's."""
        own = _Own()
        shares = {self._number: 1.0, None: 1 / self._work.count}
        sizes = [(piece.text_bytes, shares.get(owner, 0.0)) for piece, owner in pieces]
        known = [size * share for size, share in sizes if size is not None]
        total = round(sum(known)) if len(known) == len(sizes) else None
        with self._bar(split, total) as bar:
            batches = batching.batches(self._documents(pieces, own), self._tokenizer, own.tally, bar)
            return self._save(split, own, batches, folder, by_document=True)

    def _documents(self, pieces: list[tuple[Piece, int | None]], own: _Own) -> Iterator[str]:
        for number, (piece, owner) in enumerate(pieces):
            if owner not in (None, self._number):
                continue
            block = size = 0
            for document in piece.reader():
                mine = owner is not None or (number + block) % self._work.count == self._number
                left_out = own.left_out if mine else LeftOut()
                text = left_out.keep(document, self._work.config.damaged)
                if own.left_out.damaged and not own.first_damaged_at:
                    own.first_damaged_at = (number, block)
                if text is None:
                    continue
                if mine:
                    bytes_before, words_before = own.tally.bytes, own.tally.words
                    yield text  # which is counted before this goes on
                    own.records.extend((number, block, hash_of(text.encode())))
                    own.records.extend((own.tally.bytes - bytes_before, own.tally.words - words_before))
                size += len(text)
                if size >= batching.BATCH_CHARACTERS:
                    block, size = block + 1, 0

    def _write_blocks(self, split: Split, folder: Path) -> Stream:
        """Writes the blocks of the only document's text in `split` that are this part's."""
        own = _Own()
        with self._bar(split, None) as bar:
            batches = batching.batches(self._corpus.documents(split), self._tokenizer, own.tally, bar)
            stream = self._save(split, own, self._blocks(batches, own), folder, by_document=False)
        if split != "train" or self._number:
            return stream
        left_out = self._corpus.left_out()["train"]
        return dataclasses.replace(stream, left_out=left_out, first_damaged_at=(0, 0) if left_out.damaged else ())

    def _blocks(self, batches: Iterator[Batch], own: _Own) -> Iterator[Batch]:
        for block, batch in enumerate(batches):
            if block % self._work.count == self._number:
                yield batch
                is_last = batch[-1][1]
                own.records.extend((0, block, 0, *((own.tally.bytes, own.tally.words) if is_last else (0, 0))))

    def _save(self, split: Split, own: _Own, batches: Iterator[Batch], folder: Path, by_document: bool) -> Stream:
        """Writes the tokens of batches, and the records.

        by_document: whether there is a record for every document, and not for every batch.
        """
        tokens, digest, ends = 0, hashlib.sha256(), array.array("Q")
        with open(self._folder / f"{split}.tokens", "wb") as file:
            dtype = np.dtype(self._dtype)
            for ids in encoding.encode_all(batches, self._tokenizer, folder, dtype, self._workers):
                content = ids.tobytes()
                file.write(content)
                digest.update(content)
                if by_document:
                    ends.extend((np.flatnonzero(ids == self._tokenizer.end_of_text) + (tokens + 1)).tolist())
                tokens += len(ids)
                if not by_document:
                    ends.append(tokens)
        columns = np.array(own.records, np.uint64).reshape(-1, len(_FIELDS) - 1)
        lengths = np.diff(np.array(ends, np.uint64), prepend=np.uint64(0))
        records = np.concatenate([columns, lengths[:, None]], axis=1).astype("<u8").tobytes()
        (self._folder / f"{split}.records").write_bytes(records)  # the hash tells whether it came to the disk
        sizes = columns[:, _FIELDS.index("bytes")]
        sha256 = digest.hexdigest(), hashlib.sha256(records).hexdigest()
        counts = int((sizes > 0).sum()), int(sizes.sum()), tokens
        return Stream(*counts, own.left_out, own.first_damaged_at, *sha256)

    def _bar(self, split: Split, total: int | None) -> contextlib.AbstractContextManager[tqdm]:
        what = f"part {self._number} of {self._work.count}: {split}"
        return batching.progress_bar(what, total, self._shown)


def _hashed(piece: Piece) -> SourceFile | None:
    """The file of a piece with the hash of its content; None if it is none."""
    if piece.file is None or piece.path is None:
        return None
    return dataclasses.replace(piece.file, sha256=hash_file(bucket_files.here(piece.path)))

"""Parts of a corpus (`parts`) made into the folder that one process would have written: `armd prepare --merge=n`.

The records of all documents are in memory, and of the tokens what one write takes: the files are mapped, not read.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from armd_jax import remote
from armd_jax.data import packing
from armd_jax.data.batching import Tally
from armd_jax.data.corpora import Corpus, open_corpus
from armd_jax.data.manifest import MANIFEST_FILE, RowDtype
from armd_jax.data.parts import NOTE, RECORD, Note, Work, read_part
from armd_jax.data.reading import LeftOut
from armd_jax.data.token_streams import FromText, TokenStreams
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.names import Split

_AT_ONCE = 1 << 22  # tokens
_NAMED_AT_MOST = 20  # missing parts


def merge(work: Work, length: int, shown: bool = True) -> packing.PreparedData:
    """Makes `work.out` of the parts, rows of `length` tokens, or opens it if it is there.

    shown: whether a progress bar is.
    Raises UserError if a part is missing, damaged or one of another work, or if the parts saw different text.
    """
    if (work.out / MANIFEST_FILE).is_file():  # the parts may have been removed since
        return packing.prepare_into(work.config, length, work.out, shown)
    streams = open_parts(work)
    return packing.prepare_into(work.config, length, work.out, shown, streams.corpus, streams=streams)


def open_parts(work: Work) -> TokenStreams:
    """The tokens of all parts, as streams. Raises UserError as `merge` does."""
    folders = [work.part(number) for number in range(work.count)]
    for number, folder in enumerate(folders):
        if remote.copy_of(folder) is None and folder.exists() and not (folder / NOTE).is_file():
            raise UserError(f"{work.place(number)}: no part ({NOTE} is missing); remove it and make the part again")
    missing = [number for number, folder in enumerate(folders) if not (folder / NOTE).is_file()]
    if missing:
        more = f" and {len(missing) - _NAMED_AT_MOST:,} more" if len(missing) > _NAMED_AT_MOST else ""
        raise UserError(
            f"{work.folder}: {len(missing)} of {work.count} parts missing:"
            f" {', '.join(map(str, missing[:_NAMED_AT_MOST]))}{more}; make them, with --shard={missing[0]}/{work.count}"
        )
    tokenizer, unread = work.tokenizer(), work.corpus()
    notes = [read_part(folder, work.identity(number, unread)) for number, folder in enumerate(folders)]
    known = {(one.name, one.bytes, one.mtime_ns): one.sha256 for note in notes for one in note.files}
    corpus = open_corpus(work.config, known)
    _check_text(corpus, folders, notes)
    streams = _FromParts(corpus, tokenizer, folders, notes)
    if streams.is_one_of_several_files():
        return FromText(work.config, corpus, workers=1)
    return streams


def _check_text(corpus: Corpus, folders: Sequence[Path], notes: Sequence[Note]) -> None:
    """Raises UserError if a part was made from other content than there is now."""
    now = {file.name: file.sha256 for file in corpus.files or ()}
    for folder, note in zip(folders, notes, strict=True):
        for file in note.files:
            if now[file.name] != file.sha256:
                raise UserError(
                    f"{folder}: made from other content of {file.name} than there is now, or than another part found"
                    " there; remove this folder and make the part again"
                )


class _Stream:
    """The tokens of one stream of all parts, in the sequence of the source.

    Attributes:
      records: RECORD[documents].
    """

    def __init__(self, folders: Sequence[Path], name: Split, dtype: RowDtype) -> None:
        self._tokens = [_mapped(folder / f"{name}.tokens", dtype) for folder in folders]
        parts = [np.fromfile(folder / f"{name}.records", RECORD) for folder in folders]
        records = np.concatenate(parts)
        ends = np.concatenate([np.cumsum(part["tokens"], dtype=np.int64) for part in parts])
        order = np.lexsort((records["block"], records["piece"]))  # stable: those of one block stay as they are
        self.records = records[order]
        self._part = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]
        self._end = ends[order]

    def read(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """The tokens of the `chosen` documents, bool[documents], in arrays, each with the bytes of text it ends."""
        index = np.flatnonzero(chosen)
        part, end, size = self._part[index], self._end[index], self.records["bytes"][index]
        start = end - self.records["tokens"][index].astype(np.int64)
        goes_on = (part[1:] == part[:-1]) & (start[1:] == end[:-1])  # in the file, behind the one before
        first = np.flatnonzero(np.concatenate([[True], ~goes_on])) if len(index) else index
        for begin, stop in zip(first, np.append(first[1:], len(index)), strict=True):
            tokens = self._tokens[part[begin]]
            for low in range(start[begin], end[stop - 1], _AT_ONCE):
                high = min(low + _AT_ONCE, end[stop - 1])
                yield tokens[low:high], int(size[begin:stop].sum()) if high == end[stop - 1] else 0


def _mapped(file: Path, dtype: RowDtype) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


class _FromParts(TokenStreams):
    """Tokens that parts hold."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, folders: Sequence[Path], notes: Sequence[Note]) -> None:
        self.corpus, self.pieces = corpus, f"parts {len(notes)} {_AT_ONCE}"
        self._tokenizer, self._folders, self._notes = tokenizer, folders, notes

    def is_one_of_several_files(self) -> bool:
        """Whether all but one of several files were empty, so that the text of that one has to be divided."""
        if not self.corpus.division.fractions or self._notes[0].is_cut:
            return False
        return sum(note.streams["train"].documents for note in self._notes) == 1

    def is_empty(self, split: Split) -> bool:
        return not self._tally(split).documents

    def size(self, split: Split) -> int | None:
        return self._tally(split).bytes

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def read(
        self, split: Split, tokenizer: Tokenizer, folder: Path, dtype: np.dtype, skip: int, tally: Tally, bar: tqdm
    ) -> Iterator[np.ndarray]:
        found = self._tally(split)
        tally.documents, tally.bytes, tally.words = found.documents, found.bytes, found.words
        for number, (tokens, num_bytes) in enumerate(self._stream_of(split).read(self._chosen(split))):
            bar.update(num_bytes)
            if number >= skip:
                yield tokens

    def left_out(self, unread: Iterable[Split] = ()) -> dict[Split, LeftOut]:
        found = {}
        for split in self.corpus.pieces:
            streams = [note.streams[split] for note in self._notes]
            damaged = [stream for stream in streams if stream.left_out.damaged]
            first = min(damaged, key=lambda stream: stream.first_damaged_at).left_out.first_damaged if damaged else ""
            empty = sum(stream.left_out.empty for stream in streams)
            found[split] = LeftOut(empty, sum(stream.left_out.damaged for stream in damaged), first)
        return found

    def _is_divided(self, split: Split) -> bool:
        """Whether the documents of `split` are some of the training documents of the source."""
        division = self.corpus.division
        return bool(division.fractions) and split in division.order and not self._notes[0].is_cut

    def _stream_of(self, split: Split) -> _Stream:
        return self._stream("train" if self._is_divided(split) else split)

    def _chosen(self, split: Split) -> np.ndarray:
        """bool[documents]: which documents of its stream are in `split`."""
        if self._is_divided(split):
            return self._numbers == self.corpus.division.order.index(split)
        return np.ones(len(self._stream_of(split).records), bool)

    def _tally(self, split: Split) -> Tally:
        found = self._stream_of(split).records[self._chosen(split)]
        return Tally(int((found["bytes"] > 0).sum()), int(found["bytes"].sum()), int(found["words"].sum()))

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """int8[documents]: the place in `Division.order` of the split of every training document."""
        records = self._stream("train").records
        return self.corpus.division.divide(records["hash"], records["bytes"])

    @functools.cached_property
    def _streams(self) -> dict[Split, _Stream]:
        return {}

    def _stream(self, name: Split) -> _Stream:
        if name not in self._streams:
            self._streams[name] = _Stream(self._folders, name, self._notes[0].dtype)
        return self._streams[name]

"""Documents packed into rows of fixed length on disk, and the prepared folders that hold them.

All documents of a split, each followed by end-of-text, form one stream of tokens, which is cut into rows of exactly
N = `length` tokens (the model brings its own start token). If the last row is not full, it is stored padded with
end-of-text; how many of its tokens are real follows from the token count. A prepared folder holds `manifest.json`,
`tokenizer/` and the shards. It appears whole, by a rename, or not at all.
"""

import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np
from tqdm import tqdm

from armd_jax import typed
from armd_jax.config import DataConfig
from armd_jax.data import encoding, tokenizers
from armd_jax.data.building import large_folder
from armd_jax.data.corpora import Corpus, open_corpus
from armd_jax.data.manifest import (
    FORMAT,
    MANIFEST_FILE,
    Counts,
    Manifest,
    PackedSplit,
    RowDtype,
    SourceIdentity,
    TokenizerIdentity,
    known_files,
    read_manifest,
    write_manifest,
)
from armd_jax.data.reading import LeftOut
from armd_jax.data.shards import PackedRows, ShardWriter, check_shard
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.names import Split

TOKENIZER_FOLDER = "tokenizer"
BATCH_CHARACTERS = 1 << 22  # encoded at a time: enough to keep all cores busy, little enough to hold as Python ints
HASHED_AT_ONCE = 1 << 30  # bytes of shards, a second or two of sha256; of larger data each shard is hashed at first use
WORDS_AT_ONCE = 1 << 20  # characters whose words exist at once: a document may be one line of many MB

_SPACE = re.compile(r"\s")


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder whose files fit its manifest.

    Attributes:
      hashed: whether the shards' sha256 were compared already. If not, `rows` compares each at its first use.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    hashed: bool = False

    @property
    def length(self) -> int:
        """N, tokens per row."""
        return self.manifest.row_length

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that exist."""
        return tuple(self.manifest.splits)

    @property
    def digest(self) -> str:
        """What decides the training batches besides seed and step, see `Manifest.digest`."""
        return self.manifest.digest

    @property
    def left_out(self) -> dict[Split, LeftOut]:
        """Documents that are in no row, by the splits that the source itself has."""
        return self.manifest.left_out

    def counts(self, split: str) -> Counts:
        """The size of `split`. Raises UserError if there is no such split, as `num_rows` and `rows` do."""
        return self._split(split).counts

    def num_rows(self, split: str) -> int:
        """The number of stored rows, with the last one even if it is not full."""
        return self._split(split).rows

    def rows(self, split: str) -> PackedRows:
        """Random access to the rows of `split`."""
        return PackedRows(self.folder, self.manifest, self._split(split), self.hashed)

    def _split(self, split: str) -> PackedSplit:
        if not (_is_split(split) and split in self.manifest.splits):
            raise UserError(f"{self.folder} has no {split!r} split; it has {', '.join(self.splits)}")
        return self.manifest.splits[split]


def _is_split(name: str) -> TypeGuard[Split]:
    return name in typed.choices(Split)


def prepare(
    config: DataConfig, length: int, cache_root: Path, progress: bool = True, corpus: Corpus | None = None
) -> PreparedData:
    """The data that `config` names as rows of `length` tokens, prepared under `cache_root` if they are not there yet.

    Source files are hashed unless those that a prepared folder in `cache_root` was made from have the same names, sizes
    and modification times.

    corpus: that of `config`, if it is open already.
    Raises UserError if the corpus, the tokenizer or the folder cannot be used, and then leaves nothing behind.
    """
    corpus = corpus or open_corpus(config, known_files(cache_root))
    request, folder = tokenizers.request_of(config), folder_for(config, corpus, length, cache_root)
    if not os.path.exists(folder) and (cache_root / MANIFEST_FILE).is_file():
        folder = cache_root  # made by `armd prepare --out`: if it does not fit, the error says why
    if not os.path.exists(folder):
        with large_folder(folder, last_file=MANIFEST_FILE) as partial:
            _write(config, corpus, request, length, partial, progress)
    return _open_fitting(folder, corpus, request, length)


def folder_for(config: DataConfig, corpus: Corpus, length: int, cache_root: Path) -> Path:
    """The folder under `cache_root` that `prepare` opens or makes. Its name is a hash of what decides the rows."""
    request = tokenizers.request_of(config)
    identity = "\0".join([str(FORMAT), corpus.fingerprint, corpus.split_rule, request, str(length)])
    return cache_root / hashlib.sha256(identity.encode()).hexdigest()[:16]


def prepare_into(
    config: DataConfig,
    length: int,
    out: Path,
    progress: bool = True,
    corpus: Corpus | None = None,
    workers: int = 1,
) -> PreparedData:
    """Like `prepare`, but in the folder `out`, which must be missing, empty, or hold exactly this preparation.

    workers: processes that tokenize. 1: this one. The files are the same for any number.
    """
    corpus, request = corpus or open_corpus(config, known_files(out)), tokenizers.request_of(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to prepare into")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST_FILE).is_file():
            raise UserError(f"{out} is not empty and holds no prepared data; give another folder")
        if progress:
            _tell_selection(corpus)
    else:
        with large_folder(out, last_file=MANIFEST_FILE) as partial:
            _write(config, corpus, request, length, partial, progress, workers)
    return _open_fitting(out, corpus, request, length)


def open_prepared(folder: Path, config: DataConfig | None = None, length: int | None = None) -> PreparedData:
    """Opens a prepared folder.

    config: if given, the corpus that it names is opened too, and source, split rule and tokenizer must be its own.
    length: if given, the rows must have this many tokens.
    Raises UserError if a file is missing or was changed, or if the folder does not fit what is asked for.
    """
    manifest = read_manifest(folder)
    if length is not None:
        _check_equal(folder, "row length", "model.max_length", manifest.row_length, length)
    if config is not None:
        _check_source(folder, manifest, open_corpus(config), tokenizers.request_of(config))
    return _open_files(folder, manifest)


# Opening


def _open_fitting(folder: Path, corpus: Corpus, request: str, length: int) -> PreparedData:
    manifest = read_manifest(folder)
    _check_source(folder, manifest, corpus, request)
    _check_equal(folder, "row length", "model.max_length", manifest.row_length, length)
    return _open_files(folder, manifest)


def _open_files(folder: Path, manifest: Manifest) -> PreparedData:
    tokenizer = tokenizers.load(folder / TOKENIZER_FOLDER)
    expected = dataclasses.asdict(manifest.tokenizer)
    for name, value in dataclasses.asdict(_identity(tokenizer, manifest.tokenizer.request)).items():
        if value != expected[name]:
            raise UserError(f"{folder}: its tokenizer's {name} is not that of {MANIFEST_FILE}; prepare the data again")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    at_once = sum(shard.bytes for shard in shards) <= HASHED_AT_ONCE
    for shard in shards:
        check_shard(folder, shard, at_once)
    return PreparedData(folder, manifest, tokenizer, hashed=at_once)


def _identity(tokenizer: Tokenizer, request: str) -> TokenizerIdentity:
    return TokenizerIdentity(
        request=request,
        kind=tokenizer.kind,
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        lossless=tokenizer.lossless,
    )


def _check_source(folder: Path, manifest: Manifest, corpus: Corpus, request: str) -> None:
    """Raises UserError if the folder was prepared from other documents, or with another tokenizer."""
    if manifest.source.fingerprint != corpus.fingerprint:
        raise UserError(
            f"{folder}: prepared from another corpus than data.path: {manifest.source.description}, not"
            f" {corpus.description} (or its content has changed since)"
        )
    fractions = "data.valid_fraction, data.test_fraction"
    _check_equal(folder, "split rule", fractions, manifest.split_rule, corpus.split_rule)
    _check_equal(folder, "tokenizer", "data.tokenizer, data.vocab_size", manifest.tokenizer.request, request)


def _check_equal(folder: Path, what: str, fields: str, found: object, wanted: object) -> None:
    """Raises UserError, naming the config's `fields` that decide it, if the folder has something else than wanted."""
    if found != wanted:
        raise UserError(f"{folder}: prepared with {what} {found!r}, but the config asks for {wanted!r} ({fields})")


# Making


def _write(
    config: DataConfig, corpus: Corpus, request: str, length: int, folder: Path, progress: bool, workers: int = 1
) -> None:
    """Writes everything that a prepared folder holds, the manifest last."""
    for split in corpus.splits:
        if next(corpus.documents(split), None) is None:
            num_damaged = sum(left_out.damaged for left_out in corpus.left_out().values())
            why = f" ({num_damaged} damaged documents left out)" if num_damaged else ""
            raise UserError(f"{corpus.description}: no text for the {split} split{why}")
    if progress:
        _tell_selection(corpus)  # before the hours that a large corpus takes, because a part of it may be missing
    tokenizer = tokenizers.load_or_train(config, corpus.documents("train"))
    tokenizer.save(folder / TOKENIZER_FOLDER)
    dtype: RowDtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    splits: dict[Split, PackedSplit] = {}
    for split in corpus.splits:
        writer = ShardWriter(folder, split, config.shard_rows)
        # The bar disappears at its end: if a document turns out to be a mistake, its message is all that is left.
        with tqdm(desc=f"preparing {split}", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
            splits[split] = _pack(corpus.documents(split), tokenizer, length, np.dtype(dtype), writer, bar, workers)
        if splits["train"].tokens < length:  # train comes first
            raise UserError(
                f"{corpus.description}: its {splits['train'].tokens} training tokens are fewer than the"
                f" {length} of one row (model.max_length)"
            )
    left_out = corpus.left_out()
    manifest = Manifest(
        format=FORMAT,
        row_length=length,
        dtype=dtype,
        shard_rows=config.shard_rows,
        tokenizer=_identity(tokenizer, request),
        source=SourceIdentity(corpus.description, corpus.fingerprint, corpus.files),
        split_rule=corpus.split_rule,
        left_out=left_out,
        splits=splits,
    )
    write_manifest(folder, manifest)
    if progress:
        _tell(manifest)


def _tell_selection(corpus: Corpus) -> None:
    """Says on stderr which files are read, and why others are not."""
    for line in corpus.selection.lines():
        print(line, file=sys.stderr)


def _tell(manifest: Manifest) -> None:
    """Says on stderr what was prepared and what was left out."""
    for split, packed in manifest.splits.items():
        print(
            f"prepared {split}: {packed.documents:,} documents, {packed.bytes:,} bytes, {packed.tokens:,} tokens",
            file=sys.stderr,
        )
    for split, counts in manifest.left_out.items():
        if counts.damaged:
            print(f"{split}: {counts.damaged} damaged documents left out: {counts.first_damaged}", file=sys.stderr)


@dataclasses.dataclass
class _Tally:
    """The documents of a split that have been read so far."""

    documents: int = 0
    bytes: int = 0
    words: int = 0


def _pack(
    documents: Iterator[str],
    tokenizer: Tokenizer,
    length: int,
    dtype: np.dtype,
    writer: ShardWriter,
    bar: tqdm,
    workers: int,
) -> PackedSplit:
    """Writes the rows of one split and returns its entry in the manifest."""
    tally, num_tokens = _Tally(), 0
    left = np.empty(0, dtype)  # tokens that do not fill a row yet
    try:
        batches = _batches(documents, tokenizer, tally, bar)
        for part in encoding.encode_all(batches, tokenizer, writer.folder / TOKENIZER_FOLDER, dtype, workers):
            stream = np.concatenate([left, part])
            num_tokens += len(stream) - len(left)
            full = len(stream) // length * length
            writer.write(stream[:full].reshape(-1, length))
            left = stream[full:]
        if len(left):
            writer.write(np.pad(left, (0, length - len(left)), constant_values=tokenizer.end_of_text)[None])
    finally:
        writer.close()
    rows = sum(shard.rows for shard in writer.written)
    return PackedSplit(tally.documents, tally.bytes, tally.words, num_tokens, rows, tuple(writer.written))


def _batches(documents: Iterator[str], tokenizer: Tokenizer, tally: _Tally, bar: tqdm) -> Iterator[encoding.Batch]:
    """Chunks of documents, each with whether it is the last one of its document.

    A batch has about BATCH_CHARACTERS characters, from many documents or from a part of one. `tally` and `bar` are kept
    up to date.
    """
    batch: encoding.Batch = []
    size = 0
    for document in documents:
        num_bytes = len(document.encode())
        tally.documents += 1
        tally.bytes += num_bytes
        tally.words += count_words(document)
        bar.update(num_bytes)
        previous = ""  # one chunk behind, because only the end of the loop tells which chunk is the last
        for chunk in tokenizer.chunks(document):
            if previous:
                batch.append((previous, False))
                size += len(previous)
            previous = chunk
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        batch.append((previous, True))
        size += len(previous)
    if batch:
        yield batch


def count_words(text: str) -> int:
    """Words plus line ends: what WikiText perplexities are given per."""
    words = start = 0
    while start < len(text):
        cut = _SPACE.search(text, start + WORDS_AT_ONCE)
        end = cut.start() if cut else len(text)
        words += len(text[start:end].split())
        start = end
    return words + text.count("\n")

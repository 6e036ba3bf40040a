"""Tokens packed into rows of fixed length on disk, and the manifest that says what they are.

All documents of a split, each followed by end-of-text, form one stream of tokens that is cut into rows of exactly
N = `length` targets (the model brings its own start token). The last row, where it is not full, is stored padded with
end-of-text; how many of its tokens are real follows from the token count. A prepared folder holds `manifest.json`,
`tokenizer/` and ArrayRecord shards of little-endian rows; it appears whole, by a rename, or not at all.
"""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from armd_jax.config import DataConfig
from armd_jax.data import tokenizers
from armd_jax.data.corpora import Corpus, count_words, open_corpus
from armd_jax.data.manifest import FORMAT, MANIFEST_FILE, Counts, check_shard, damaged, open_reader, read_manifest
from armd_jax.data.reading import LeftOut, hash_file
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
BATCH_CHARACTERS = 1 << 22  # encoded at a time: enough to keep all cores busy, little enough to hold as Python ints
JUST_MADE = 60  # seconds in which a neighbour's new folder may not be locked yet
OPEN_SHARDS = 256  # readers kept open: a large corpus has more shards than a process may open files
HASHED_AT_ONCE = 1 << 30  # bytes of shards, a second or two of sha256; of larger data each shard is hashed at first use


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder whose files fit its manifest.

    Attributes:
      hashed: whether the shards' sha256 were compared already; where not, `rows` does it at the first use of each.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    hashed: bool = False

    @property
    def length(self) -> int:
        """N, tokens a row."""
        return self.manifest["row_length"]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    @property
    def digest(self) -> str:
        """sha256 of what decides the training batches besides seed and step: the training rows and the tokenizer."""
        shards = [shard["sha256"] for shard in self.manifest["splits"]["train"]["shards"]]
        return hashlib.sha256("\0".join([self.tokenizer.hash, *shards]).encode()).hexdigest()

    def counts(self, split: str) -> Counts:
        """Raises UserError where there is no such split; so do `num_rows` and `rows`."""
        if split not in self.manifest["splits"]:
            raise UserError(f"{self.folder} has no {split!r} split; it has {', '.join(self.splits)}")
        entry = self.manifest["splits"][split]
        return Counts(**{field.name: entry[field.name] for field in dataclasses.fields(Counts)})

    @property
    def left_out(self) -> dict[str, LeftOut]:
        """Documents of each source that are in no row, by the split that the source names."""
        return {split: LeftOut(**counts) for split, counts in self.manifest["left_out"].items()}

    def num_rows(self, split: str) -> int:
        """Stored rows, the last one included where it is only partly filled."""
        return self.counts(split).rows

    def rows(self, split: str) -> "Rows":
        """Random access to the rows of `split`."""
        self.counts(split)
        return Rows(self.folder, split, self.manifest, self.hashed)


class Rows:
    """`len(rows)` and `rows[i]`: int32[N], the last row padded with end-of-text. Safe to read from several threads.

    Raises UserError with the shard's name where its bytes are not those that were written.
    """

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any], hashed: bool) -> None:
        entry = manifest["splits"][split]
        self._folder, self._shards, self._num_rows = folder, entry["shards"], entry["rows"]
        self._length, self._dtype = manifest["row_length"], np.dtype(manifest["dtype"])
        self._shard_rows = manifest["shard_rows"]
        self._hashed = set(range(len(self._shards))) if hashed else set()
        self._reader = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def _open(self, number: int) -> ArrayRecordReader:
        shard = self._shards[number]
        file = self._folder / shard["file"]
        if number not in self._hashed:
            if hash_file(file) != shard["sha256"]:
                raise damaged(file)
            self._hashed.add(number)
        return open_reader(file)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        number, row = divmod(int(index), self._shard_rows)
        try:
            # By range: the cost of reading a list of records grows with the number of records in the file.
            (record,) = self._reader(number).read(row, row + 1)
            tokens = np.frombuffer(record, self._dtype)
        except (RuntimeError, ValueError, IndexError, OSError) as error:  # the library's for bytes it cannot read
            if isinstance(error, UserError):
                raise
            raise damaged(self._folder / self._shards[number]["file"]) from error
        if len(tokens) != self._length:
            raise damaged(self._folder / self._shards[number]["file"])
        return tokens.astype(np.int32)


def prepare(
    config: DataConfig, length: int, cache_root: Path, progress: bool = True, corpus: Corpus | None = None
) -> PreparedData:
    """The data that `config` names as rows of `length` tokens, prepared under `cache_root` unless they are there.

    The folder's name is a hash of source, tokenizer, length and split rule. Raises UserError on a corpus, tokenizer or
    folder that cannot be used, and leaves nothing behind then. `corpus`: that of `config`, where it is open already.
    """
    corpus = corpus or open_corpus(config)
    request, folder = tokenizers.request(config), place(config, corpus, length, cache_root)
    if not os.path.exists(folder):
        _build(config, corpus, request, length, folder, progress)
    return _load_fitting(folder, corpus, request, length)


def place(config: DataConfig, corpus: Corpus, length: int, cache_root: Path) -> Path:
    """The folder under `cache_root` that `prepare` opens, or makes where it is missing."""
    request = tokenizers.request(config)
    identity = "\0".join([str(FORMAT), corpus.fingerprint, corpus.split_rule, request, str(length)])
    return Path(cache_root) / hashlib.sha256(identity.encode()).hexdigest()[:16]


def prepare_into(config: DataConfig, length: int, out: Path, progress: bool = True) -> PreparedData:
    """Like `prepare`, into the folder `out`, which must be missing, empty, or hold just this preparation."""
    out = Path(out)
    corpus, request = open_corpus(config), tokenizers.request(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to prepare into")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST_FILE).is_file():
            raise UserError(f"{out} is not empty and holds no prepared data; give another folder")
    else:
        _build(config, corpus, request, length, out, progress)
    return _load_fitting(out, corpus, request, length)


def load(folder: Path, config: DataConfig | None = None, length: int | None = None) -> PreparedData:
    """Opens a prepared folder. Raises UserError where a file is missing, changed, or does not fit what is asked for.

    With `config` the corpus it names is opened too: source, split rule and tokenizer must be those of the folder. With
    `length` the rows must have that many tokens.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _require(folder, "row length", "model.max_length", manifest["row_length"], length)
    if config is not None:
        corpus = open_corpus(config)
        _check_source(folder, manifest, corpus, tokenizers.request(config))
    tokenizer = tokenizers.load(folder / TOKENIZER_FOLDER)
    for field in ("kind", "hash", "vocab_size", "end_of_text", "lossless"):
        if getattr(tokenizer, field) != manifest["tokenizer"][field]:
            raise UserError(f"{folder}: its tokenizer's {field} is not that of {MANIFEST_FILE}; prepare the data again")
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    at_once = sum(shard["bytes"] for shard in shards) <= HASHED_AT_ONCE
    for shard in shards:
        check_shard(folder, shard, at_once)
    return PreparedData(folder, manifest, tokenizer, hashed=at_once)


# Verifying


def _load_fitting(folder: Path, corpus: Corpus, request: str, length: int) -> PreparedData:
    _check_source(folder, read_manifest(folder), corpus, request)
    return load(folder, length=length)


def _check_source(folder: Path, manifest: dict[str, Any], corpus: Corpus, request: str) -> None:
    source = manifest["source"]
    if source["fingerprint"] != corpus.fingerprint:
        raise UserError(
            f"{folder}: prepared from another corpus than data.path: {source['description']}, not {corpus.description}"
            " (or its content has changed since)"
        )
    rules = "data.valid_fraction, data.test_fraction"
    _require(folder, "split rule", rules, manifest["split_rule"], corpus.split_rule)
    asked = "data.tokenizer, data.vocab_size"
    _require(folder, "tokenizer", asked, manifest["tokenizer"]["request"], request)


def _require(folder: Path, what: str, fields: str, found: Any, wanted: Any) -> None:
    if wanted is not None and found != wanted:
        raise UserError(f"{folder}: prepared with {what} {found!r}, but the config asks for {wanted!r} ({fields})")


# Building


def _build(config: DataConfig, corpus: Corpus, request: str, length: int, folder: Path, progress: bool) -> None:
    """Prepares into a neighbour of `folder` that takes its name when it is complete."""
    made = [parent for parent in folder.parents if not os.path.exists(parent)]
    partial = folder.with_name(f".{folder.name}.partial-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        with _held(partial):
            _remove_abandoned(folder)
            _write(config, corpus, request, length, partial, progress)
            try:
                partial.rename(folder)
            except OSError:
                if not (folder / MANIFEST_FILE).is_file():
                    raise
                shutil.rmtree(partial)  # another process was faster; what it made is the same
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write prepared data to {folder}: {error.strerror or error}") from error
        raise


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Locks a folder while it is written; the kernel drops the lock of a process that dies. BlockingIOError if held."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed preparations of `folder` on this machine left beside it; others' locks are not seen here."""
    for left in folder.parent.glob(f".{folder.name}.partial-{glob.escape(socket.gethostname())}-*"):
        with contextlib.suppress(OSError):  # held, gone already, or somebody else's
            if time.time() - left.stat().st_mtime > JUST_MADE:
                with _held(left):
                    shutil.rmtree(left, ignore_errors=True)


def _write(config: DataConfig, corpus: Corpus, request: str, length: int, folder: Path, progress: bool) -> None:
    for split in corpus.splits:
        if next(corpus.documents(split), None) is None:
            left_out = sum(counts.damaged for counts in corpus.left_out().values())
            why = f" ({left_out} damaged documents left out)" if left_out else ""
            raise UserError(f"{corpus.description}: no text for the {split} split{why}")
    tokenizer = tokenizers.create(config, corpus.documents("train"))
    tokenizer.save(folder / TOKENIZER_FOLDER)
    about = {name: getattr(tokenizer, name) for name in ("kind", "hash", "vocab_size", "end_of_text", "lossless")}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "row_length": length,
        "dtype": "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
        "shard_rows": config.shard_rows,
        "tokenizer": {"request": request} | about,
        "source": {"description": corpus.description, "fingerprint": corpus.fingerprint},
        "split_rule": corpus.split_rule,
        "left_out": {},
        "splits": {},
    }
    for split in corpus.splits:
        manifest["splits"][split] = _write_split(corpus, split, tokenizer, manifest, folder, progress)
        if split == "train" and manifest["splits"][split]["tokens"] < length:
            raise UserError(
                f"{corpus.description}: its {manifest['splits'][split]['tokens']} training tokens are fewer than the"
                f" {length} of one row (model.max_length)"
            )
    for split, counts in corpus.left_out().items():
        manifest["left_out"][split] = dataclasses.asdict(counts)
        if counts.damaged and progress:
            print(f"{split}: {counts.damaged} damaged documents left out: {counts.first_damaged}", file=sys.stderr)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def _write_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, manifest: dict[str, Any], folder: Path, progress: bool
) -> dict[str, Any]:
    """Writes the shards of one split and returns its entry in the manifest."""
    length, dtype = manifest["row_length"], np.dtype(manifest["dtype"])
    counts = {"documents": 0, "bytes": 0, "words": 0, "tokens": 0, "rows": 0}
    shards = _ShardWriter(folder, split, manifest["shard_rows"])
    left = np.empty(0, dtype)  # tokens that do not fill a row yet
    bar = tqdm(desc=f"preparing {split}", unit="B", unit_scale=True, disable=not progress)
    try:
        for batch in _batches(corpus.documents(split), tokenizer, counts, bar):
            ids = tokenizer.encode_batch([text for text, _ in batch])
            ends = [[tokenizer.end_of_text] if last else [] for _, last in batch]
            parts = [np.array(part + end, dtype) for part, end in zip(ids, ends, strict=True)]
            stream = np.concatenate([left, *parts])
            counts["tokens"] += len(stream) - len(left)
            full = len(stream) // length * length
            shards.write(stream[:full].reshape(-1, length))
            left = stream[full:]
        if len(left):
            shards.write(np.pad(left, (0, length - len(left)), constant_values=tokenizer.end_of_text)[None])
    finally:
        bar.close()
        shards.close()
    counts["rows"] = sum(shard["rows"] for shard in shards.written)
    return counts | {"shards": shards.written}


def _batches(
    documents: Iterator[str], tokenizer: Tokenizer, counts: dict[str, int], bar: tqdm
) -> Iterator[list[tuple[str, bool]]]:
    """Chunks of documents, each with whether it is its document's last, many at a time; counts what passes."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        num_bytes = len(document.encode())
        counts["documents"] += 1
        counts["bytes"] += num_bytes
        counts["words"] += count_words(document)
        bar.update(num_bytes)
        behind = ""
        for chunk in tokenizer.chunks(document):
            if behind:
                batch.append((behind, False))
                size += len(behind)
            behind = chunk
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        batch.append((behind, True))
        size += len(behind)
    if batch:
        yield batch


class _ShardWriter:
    """Rows into ArrayRecord files of `shard_rows` rows each; `written` lists the closed ones for the manifest."""

    def __init__(self, folder: Path, split: str, shard_rows: int) -> None:
        self._folder, self._split, self._shard_rows = folder, split, shard_rows
        self._writer: ArrayRecordWriter | None = None
        self._file, self._rows = "", 0
        self.written: list[dict[str, Any]] = []

    def write(self, rows: np.ndarray) -> None:
        for row in rows:
            if self._writer is None:
                self._file, self._rows = f"{self._split}-{len(self.written):05d}.array_record", 0
                self._writer = ArrayRecordWriter(str(self._folder / self._file), "group_size:1")
            self._writer.write(row.tobytes())
            self._rows += 1
            if self._rows == self._shard_rows:
                self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            file = self._folder / self._file
            about = {"file": self._file, "rows": self._rows, "bytes": file.stat().st_size, "sha256": hash_file(file)}
            self.written.append(about)

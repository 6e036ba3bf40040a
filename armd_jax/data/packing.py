"""Tokens packed into rows of fixed length on disk, and the manifest that says what they are.

All documents of a split, each followed by end-of-text, form one stream of tokens that is cut into rows of exactly
N = `length` targets (the model brings its own start token). The last row, where it is not full, is stored padded with
end-of-text; how many of its tokens are real follows from the token count. A prepared folder holds `manifest.json`,
`tokenizer/` and ArrayRecord shards of little-endian rows; it appears whole, by a rename, or not at all.
"""

import dataclasses
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from armd_jax.config import DataConfig, UserError
from armd_jax.data import tokenizers
from armd_jax.data.corpora import Corpus, count_words, hash_file, open_corpus
from armd_jax.data.tokenizers import Tokenizer

FORMAT = 1
KEYS = {"format", "row_length", "dtype", "shard_rows", "tokenizer", "source", "split_rule", "splits"}
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
BATCH_CHARACTERS = 1 << 22  # encoded at a time: enough to keep all cores busy, little enough to hold as Python ints
OPEN_SHARDS = 256  # readers kept open: a large corpus has more shards than a process may open files


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one split holds."""

    documents: int
    bytes: int  # UTF-8 of the original text
    words: int  # and line ends
    tokens: int  # end-of-text included, padding not
    rows: int  # the last, partly filled one included


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder whose files were checked against its manifest."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def length(self) -> int:
        """N, tokens a row."""
        return self.manifest["row_length"]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    def counts(self, split: str) -> Counts:
        """Raises UserError where there is no such split; so do `num_rows` and `rows`."""
        if split not in self.manifest["splits"]:
            raise UserError(f"{self.folder} has no {split!r} split; it has {', '.join(self.splits)}")
        entry = self.manifest["splits"][split]
        return Counts(**{field.name: entry[field.name] for field in dataclasses.fields(Counts)})

    def num_rows(self, split: str) -> int:
        """Stored rows, the last one included where it is only partly filled."""
        return self.counts(split).rows

    def rows(self, split: str) -> "Rows":
        """Random access to the rows of `split`."""
        num_rows = self.num_rows(split)
        shards = self.manifest["splits"][split]["shards"]
        return Rows([self.folder / shard["file"] for shard in shards], num_rows, self.manifest)


class Rows:
    """`len(rows)` and `rows[i]`: int32[N], the last row padded with end-of-text. Safe to read from several threads."""

    def __init__(self, files: list[Path], num_rows: int, manifest: dict[str, Any]) -> None:
        self._files, self._num_rows = files, num_rows
        self._shard_rows, self._dtype = manifest["shard_rows"], np.dtype(manifest["dtype"])
        self._reader = functools.lru_cache(maxsize=OPEN_SHARDS)(_open_reader)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        shard, row = divmod(int(index), self._shard_rows)
        # By range: the cost of reading a list of records grows with the number of records in the file.
        (record,) = self._reader(self._files[shard]).read(row, row + 1)
        return np.frombuffer(record, self._dtype).astype(np.int32)


def prepare(config: DataConfig, length: int, cache_root: Path, progress: bool = True) -> PreparedData:
    """The data that `config` names as rows of `length` tokens, prepared under `cache_root` unless they are there.

    The folder's name is a hash of source, tokenizer, length and split rule. Raises UserError on a corpus, tokenizer or
    folder that cannot be used, and leaves nothing behind then.
    """
    corpus, request = open_corpus(config), tokenizers.request(config)
    identity = "\0".join([str(FORMAT), corpus.fingerprint, corpus.split_rule, request, str(length)])
    folder = Path(cache_root) / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not os.path.exists(folder):
        _build(config, corpus, request, length, folder, progress)
    return _load_fitting(folder, corpus, request, length)


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
    manifest = _read_manifest(folder)
    _require(folder, "row length", "model.max_length", manifest["row_length"], length)
    if config is not None:
        corpus = open_corpus(config)
        _check_source(folder, manifest, corpus, tokenizers.request(config))
    tokenizer = tokenizers.load(folder / TOKENIZER_FOLDER)
    for field in ("kind", "hash", "vocab_size", "end_of_text", "lossless"):
        if getattr(tokenizer, field) != manifest["tokenizer"][field]:
            raise UserError(f"{folder}: its tokenizer's {field} is not that of {MANIFEST_FILE}; prepare the data again")
    for split in manifest["splits"].values():
        _check_shards(folder, split, manifest)
    return PreparedData(folder, manifest, tokenizer)


# Verifying


def _load_fitting(folder: Path, corpus: Corpus, request: str, length: int) -> PreparedData:
    _check_source(folder, _read_manifest(folder), corpus, request)
    return load(folder, length=length)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no prepared data there ({MANIFEST_FILE} is missing)")
    try:
        manifest = json.loads(file.read_bytes())
        known = manifest["format"] == FORMAT
        complete = manifest.keys() >= KEYS
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged manifest; delete the folder and prepare the data again") from error
    if not known:
        raise UserError(f"{file}: format {manifest['format']} is not the {FORMAT} of this version; prepare again")
    if not complete:
        raise UserError(f"{file}: has no {', '.join(sorted(KEYS - manifest.keys()))}; prepare the data again")
    return manifest


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


def _check_shards(folder: Path, split: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Existence, content and number of rows of every shard: the library itself opens damaged files without a word."""
    rows = sum(shard["rows"] for shard in split["shards"])
    if rows != split["rows"] or rows != -(-split["tokens"] // manifest["row_length"]):
        raise UserError(f"{folder / MANIFEST_FILE}: its counts contradict one another; prepare the data again")
    for shard in split["shards"]:
        file = folder / shard["file"]
        if not file.is_file():
            raise UserError(f"{file}: this shard is missing; delete the folder and prepare the data again")
        if hash_file(file) != shard["sha256"] or _open_reader(file).num_records() != shard["rows"]:
            raise UserError(
                f"{file}: this shard is damaged or was changed; delete the folder and prepare the data again"
            )


def _open_reader(file: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(file), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)


# Building


def _build(config: DataConfig, corpus: Corpus, request: str, length: int, folder: Path, progress: bool) -> None:
    """Prepares into a neighbour of `folder` that takes its name when it is complete."""
    made = [parent for parent in folder.parents if not os.path.exists(parent)]
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
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


def _write(config: DataConfig, corpus: Corpus, request: str, length: int, folder: Path, progress: bool) -> None:
    for split in corpus.splits:
        if next(corpus.documents(split), None) is None:
            raise UserError(f"{corpus.description}: no text for the {split} split")
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
        "splits": {},
    }
    for split in corpus.splits:
        manifest["splits"][split] = _write_split(corpus, split, tokenizer, manifest, folder, progress)
        if split == "train" and manifest["splits"][split]["tokens"] < length:
            raise UserError(
                f"{corpus.description}: its {manifest['splits'][split]['tokens']} training tokens are fewer than the"
                f" {length} of one row (model.max_length)"
            )
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
            sha256 = hash_file(self._folder / self._file)
            self.written.append({"file": self._file, "rows": self._rows, "sha256": sha256})

"""Where text comes from: the embedded corpus, text files, JSON lines, TFDS datasets; and which documents are held out.

A corpus streams its documents split by split and never holds more than one file or one document of them, the embedded
one (2 MB) aside. Documents without a visible character are skipped.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import platform
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from armd_jax.config import DataConfig, UserError
from armd_jax.data.embedded import embedded_documents

SPLITS = ("train", "valid", "test")
SUFFIXES = (".txt", ".md", ".txt.gz", ".jsonl", ".jsonl.gz")
SPLIT_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid"}
SPLIT_NAMES |= {"dev": "valid", "test": "test"}

Stream = Callable[[], Iterable[str]]  # every call starts at the first document again


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in splits.

    Attributes:
      description: one line for people.
      fingerprint: sha256 of what decides the documents: contents, names, versions.
      split_rule: how documents are dealt to the splits; with the fingerprint it decides every split.
      splits: those present, in the order of SPLITS.
    """

    description: str
    fingerprint: str
    split_rule: str
    splits: tuple[str, ...]
    open_split: Callable[[str], Iterator[str]] = dataclasses.field(repr=False)

    def documents(self, split: str) -> Iterator[str]:
        """The documents of `split`, in the order of the source. Raises UserError on text that cannot be read."""
        if split not in self.splits:
            raise UserError(f"{self.description} has no {split!r} split; it has {', '.join(self.splits)}")
        return self.open_split(split)


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.path` names. Raises UserError where there is none; reads contents for the fingerprint.

    "" is the embedded corpus; "tfds:NAME" or "tfds:/folder/of/a/dataset/version" a prepared TFDS dataset; anything else
    a file, a folder or a glob of .txt, .md, .jsonl (one object a line), each also gzipped where SUFFIXES says so.
    """
    if not config.path:
        return _embedded_corpus(config)
    if config.path.startswith("tfds:"):
        return _tfds_corpus(config)
    return _file_corpus(config)


def count_words(text: str) -> int:
    """Words plus line ends, the count that WikiText perplexities are given by."""
    return len(text.split()) + text.count("\n")


# Splits


def _in_splits(
    config: DataConfig, description: str, fingerprint: str, streams: dict[str, Stream], source_rule: str
) -> Corpus:
    """A corpus whose `streams` are taken as they are; a validation split that is missing is taken from train.

    A source that brings nothing but train has its test split taken from train as well.
    """
    fractions = {}
    if "valid" not in streams and config.valid_fraction:
        fractions["valid"] = config.valid_fraction
    if len(streams) == 1 and config.test_fraction:
        fractions["test"] = config.test_fraction
    rule = source_rule
    if fractions:
        shares = ", ".join(f"{split} {fraction:g}" for split, fraction in fractions.items())
        rule = f"{source_rule}; taken from train, by document hash or, of one document, from its end: {shares}"
    dealt = _Shares(streams["train"], fractions, description)

    def open_split(split: str) -> Iterator[str]:
        if split == "train" or split in fractions:
            return dealt.documents(split)
        return iter(streams[split]())

    splits = tuple(split for split in SPLITS if split in streams or split in fractions)
    return Corpus(description, fingerprint, rule, splits, open_split)


class _Shares:
    """Deals one stream's documents to train and the splits in `fractions`, by share of bytes.

    Documents are walked in the order of the sha256 of their text, so that the choice looks random, is the same on every
    machine, and equal documents never stand on both sides. One that would overshoot a share is passed over. A source
    of one document is cut instead, at line ends where it has them: train first, then valid, then test.
    """

    def __init__(self, stream: Stream, fractions: dict[str, float], name: str) -> None:
        self._stream, self._fractions, self._name = stream, fractions, name

    def documents(self, split: str) -> Iterator[str]:
        if not self._fractions:
            yield from self._stream()
            return
        parts = self._parts
        if len(parts) == 1:
            yield from self._cut(split)
            return
        part = ("train", *self._fractions).index(split)
        for index, text in enumerate(self._stream()):
            if parts[index] == part:
                yield text

    @functools.cached_property
    def _parts(self) -> np.ndarray:
        """For every document 0 (train) or 1 + the place of its split in the fractions; one pass over the stream."""
        hashes, sizes = [], []
        for text in self._stream():
            content = text.encode()
            hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8]))
            sizes.append(len(content))
        if len(hashes) <= 1:
            return np.zeros(len(hashes), np.int8)
        _, kind = np.unique(np.array(hashes, np.uint64), return_inverse=True)  # kinds stand in hash order
        weight = np.bincount(kind, weights=sizes)
        part_of_kind = np.zeros(len(weight), np.int8)
        for part, (split, fraction) in enumerate(self._fractions.items(), start=1):
            goal, taken = fraction * sum(sizes), 0.0
            for candidate in np.flatnonzero(part_of_kind == 0):
                if taken >= goal:
                    break
                if taken + weight[candidate] / 2 <= goal:
                    part_of_kind[candidate] = part
                    taken += weight[candidate]
            if not taken or (part_of_kind != 0).all():
                raise self._too_small(split, f"{len(hashes)} documents")
        return part_of_kind[kind]

    def _cut(self, split: str) -> Iterator[str]:
        (text,) = self._stream()
        left = 1.0
        edges = [len(text)]
        for fraction in reversed(self._fractions.values()):
            left -= fraction
            edges.insert(0, self._boundary(text, left))
        part = ("train", *self._fractions).index(split)
        start, end = [0, *edges][part : part + 2]
        if not text[start:end].strip():
            raise self._too_small(split, "one document")
        yield text[start:end]

    def _boundary(self, text: str, share: float) -> int:
        """The last line start at or before `share` of the characters; that character itself where lines are long."""
        place = round(share * len(text))
        line = text.rfind("\n", 0, place) + 1
        near = min(self._fractions.values()) * len(text) / 4
        return line if place - line <= near else place

    def _too_small(self, split: str, what: str) -> UserError:
        held_out = f"data.{split}_fraction={self._fractions[split]:g}" if split in self._fractions else "training"
        return UserError(
            f"{self._name}: {what} leave nothing for {held_out};"
            " name files train, valid and test, or change the fractions (0: no such split)"
        )


def _embedded_corpus(config: DataConfig) -> Corpus:
    documents = embedded_documents()
    version = platform.python_version()
    digest = hashlib.sha256(version.encode())
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    description = f"documentation embedded in Python {version}"
    return _in_splits(config, description, digest.hexdigest(), {"train": lambda: documents}, "embedded corpus")


# Files


def _file_corpus(config: DataConfig) -> Corpus:
    files = _find_files(config.path)
    digest = hashlib.sha256(config.text_field.encode())
    for name, file in files.items():
        digest.update(f"\0{name}\0{file.stat().st_size}\0".encode() + hash_file(file).encode())
    named = {name: _split_of(name) for name in files}
    if not {"train"} < {split for split in named.values() if split}:
        named, rule = dict.fromkeys(files, "train"), "documents of all files"
    else:
        rule = "splits by file name"
        strays = [name for name, split in named.items() if split is None]
        if strays:
            raise UserError(
                f"data.path={config.path!r}: {strays[0]!r} names no split, but other files do (train, valid, test);"
                " rename it or give a glob that leaves it out"
            )
    streams: dict[str, Stream] = {}
    for split in SPLITS:
        chosen = [file for name, file in files.items() if named[name] == split]
        if chosen:
            streams[split] = functools.partial(_read_files, chosen, config.text_field)
    size = sum(file.stat().st_size for file in files.values())
    description = f"{config.path} ({len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes)"
    return _in_splits(config, description, digest.hexdigest(), streams, rule)


def _find_files(path: str) -> dict[str, Path]:
    """The text files under `path`, by name relative to what they share, sorted by that name."""
    root = Path(path)
    if root.is_file():
        found, base = [root], root.parent
        if not _is_text(root.name):
            raise UserError(f"data.path={path!r}: cannot read this kind of file; known: {', '.join(SUFFIXES)}")
    elif root.is_dir():
        found, base = [file for file in root.rglob("*") if _is_text(file.name) and file.is_file()], root
    elif glob.has_magic(path):
        matches = (Path(match) for match in glob.glob(path, recursive=True))
        found = [match for match in matches if _is_text(match.name) and match.is_file()]
        whole = path.split("/")
        magic = next(index for index, part in enumerate(whole) if glob.has_magic(part))
        base = Path("/".join(whole[:magic]) or ("/" if path.startswith("/") else "."))
    else:
        raise UserError(f"data.path={path!r}: there is no such file or folder")
    if not found:
        raise UserError(f"data.path={path!r}: no file there ends in {', '.join(SUFFIXES)}")
    return dict(sorted((file.relative_to(base).as_posix(), file) for file in found))


def _is_text(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _split_of(name: str) -> str | None:
    """The split that a folder (`test/0.txt`) or a word at either end of the file's name (`wiki-test.txt`) names."""
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in SPLIT_NAMES:
            return SPLIT_NAMES[folder]
    stem = next(file.removesuffix(suffix) for suffix in SUFFIXES if file.endswith(suffix))
    words = re.findall("[a-z]+", stem)
    return next((SPLIT_NAMES[word] for word in (*words[:1], *words[-1:]) if word in SPLIT_NAMES), None)


def hash_file(file: Path) -> str:
    """sha256 of the file's content. Raises UserError where it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _read_files(files: list[Path], text_field: str) -> Iterator[str]:
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        try:
            with opener(file, "rb") as stream:
                if ".jsonl" in file.suffixes[-2:]:
                    yield from _read_json_lines(file, stream, text_field)
                else:
                    text = _decode(stream.read(), str(file))
                    if text.strip():
                        yield text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file}: damaged or truncated gzip file: {error}") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _read_json_lines(file: Path, lines: Iterable[bytes], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(_decode(line, where))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where}: not valid JSON: {error}") from error
        text = item.get(text_field) if isinstance(item, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{where}: no text in field {text_field!r} (data.text_field)")
        _check(text, where)
        if text.strip():
            yield text


def _decode(content: bytes, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}, line {line} of it)") from error
    _check(text, where)
    return text


def _check(text: str, where: str) -> None:
    """Refuses what no text holds: NUL, which marks a binary file, and half characters, which JSON can spell."""
    if "\0" in text:
        raise UserError(f"{where}: holds a NUL character (line {text.count(chr(10), 0, text.index(chr(0))) + 1} of it)")
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: holds half a surrogate pair, which is no character")


# TFDS


def _tfds_corpus(config: DataConfig) -> Corpus:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.path={config.path!r}: pip install tensorflow-datasets array-record") from error
    name = config.path.removeprefix("tfds:")
    try:
        if "/" in name and Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=config.tfds_data_dir or None)
        sources = {
            SPLIT_NAMES[split]: builder.as_data_source(split=split)
            for split in builder.info.splits
            if split in SPLIT_NAMES
        }
    except Exception as error:  # a missing dataset, version or format: each its own kind of exception in TFDS
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"data.path={config.path!r}: no dataset that can be read: {reason}") from error
    if "train" not in sources:
        raise UserError(f"data.path={config.path!r}: the dataset has no train split")
    if config.text_field not in builder.info.features:
        raise UserError(
            f"data.path={config.path!r}: its examples have no field {config.text_field!r} (data.text_field)"
        )
    identity = [builder.info.full_name, config.text_field]
    identity += [f"{split} {len(source)}" for split, source in sorted(sources.items())]
    fingerprint = hashlib.sha256("\0".join(identity).encode()).hexdigest()
    streams = {
        split: functools.partial(_read_tfds, source, config.text_field, f"{config.path} {split}")
        for split, source in sources.items()
    }
    return _in_splits(config, f"TFDS dataset {builder.info.full_name}", fingerprint, streams, "splits of the dataset")


def _read_tfds(source, text_field: str, where: str) -> Iterator[str]:
    """Documents of a TFDS data source, many a read: one read costs time in proportion to the records of its file."""
    for start in range(0, len(source), 256):
        indices = range(start, min(start + 256, len(source)))
        for index, example in zip(indices, source.__getitems__(list(indices)), strict=True):
            text = example[text_field]
            text = _decode(text, f"{where}, example {index}") if isinstance(text, bytes) else text
            if not isinstance(text, str):
                raise UserError(f"{where}, example {index}: field {text_field!r} is not text (data.text_field)")
            if text.strip():
                yield text

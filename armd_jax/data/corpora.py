"""Where text comes from: the embedded corpus, text files, JSON lines, TFDS datasets; and which documents are held out.

A corpus streams its documents split by split and never holds more than one file or one document of them, the embedded
one (2 MB) aside.
"""

import dataclasses
import functools
import glob
import hashlib
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from armd_jax.config import DataConfig
from armd_jax.data.embedded import embedded_documents
from armd_jax.data.reading import LeftOut, Source, hash_file, read_files, read_tfds
from armd_jax.errors import UserError

SPLITS = ("train", "valid", "test")
SUFFIXES = (".txt", ".md", ".txt.gz", ".jsonl", ".jsonl.gz")
SPLIT_NAMES = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid"}
SPLIT_NAMES |= {"dev": "valid", "test": "test"}

_SPACE = re.compile(r"\s")
_WORDS_AT_ONCE = 1 << 20  # characters whose words exist at once: a document may be one line of many MB


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
    sources: dict[str, Source] = dataclasses.field(repr=False)
    open_split: Callable[[str], Iterator[str]] = dataclasses.field(repr=False)

    def documents(self, split: str) -> Iterator[str]:
        """The documents of `split`, in the order of the source. Raises UserError on text that cannot be read."""
        self.check_split(split)
        return self.open_split(split)

    def check_split(self, split: str) -> None:
        """Raises UserError where there is no such split."""
        if split not in self.splits:
            raise UserError(f"{self.description} has no {split!r} split; it has {', '.join(self.splits)}")

    def left_out(self) -> dict[str, LeftOut]:
        """What the last whole pass over each source left out, by the split that the source names."""
        return {split: source.left_out for split, source in self.sources.items()}


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
    words = start = 0
    while start < len(text):
        cut = _SPACE.search(text, start + _WORDS_AT_ONCE)
        end = cut.start() if cut else len(text)
        words += len(text[start:end].split())
        start = end
    return words + text.count("\n")


# Splits


def _in_splits(
    config: DataConfig, description: str, fingerprint: str, sources: dict[str, Source], source_rule: str
) -> Corpus:
    """A corpus whose `sources` are taken as they are; a validation split that is missing is taken from train.

    A source that brings nothing but train has its test split taken from train as well.
    """
    fractions = {}
    if "valid" not in sources and config.valid_fraction:
        fractions["valid"] = config.valid_fraction
    if len(sources) == 1 and config.test_fraction:
        fractions["test"] = config.test_fraction
    rule = source_rule + ("; damaged documents left out" if config.damaged == "skip" else "")
    if fractions:
        shares = ", ".join(f"{split} {fraction:g}" for split, fraction in fractions.items())
        rule = f"{rule}; taken from train, by document hash or, of one document, from its end: {shares}"
    dealt = _Shares(sources["train"], fractions, description)

    def open_split(split: str) -> Iterator[str]:
        if split == "train" or split in fractions:
            return dealt.documents(split)
        return sources[split]()

    splits = tuple(split for split in SPLITS if split in sources or split in fractions)
    return Corpus(description, fingerprint, rule, splits, sources, open_split)


class _Shares:
    """Deals one source's documents to train and the splits in `fractions`, by share of bytes.

    Documents are walked in the order of the sha256 of their text, so that the choice looks random, is the same on every
    machine, and equal documents never stand on both sides. One that would overshoot a share is passed over. A source
    of one document is cut instead, at line ends where it has them: train first, then valid, then test.
    """

    def __init__(self, source: Source, fractions: dict[str, float], name: str) -> None:
        self._source, self._fractions, self._name = source, fractions, name

    def documents(self, split: str) -> Iterator[str]:
        if not self._fractions:
            yield from self._source()
            return
        parts = self._parts
        if len(parts) == 1:
            yield from self._cut(split)
            return
        part = ("train", *self._fractions).index(split)
        for index, text in enumerate(self._source()):
            if parts[index] == part:
                yield text

    @functools.cached_property
    def _parts(self) -> np.ndarray:
        """For every document 0 (train) or 1 + the place of its split in the fractions; one pass over the source."""
        hashes, sizes = [], []
        for text in self._source():
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
        (text,) = self._source()
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
    return _in_splits(config, description, digest.hexdigest(), {"train": Source(lambda: documents)}, "embedded corpus")


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
    sources = {}
    for split in SPLITS:
        chosen = [file for name, file in files.items() if named[name] == split]
        if chosen:
            read = functools.partial(read_files, chosen, config.text_field)
            sources[split] = Source(read, config.damaged == "skip")
    size = sum(file.stat().st_size for file in files.values())
    description = f"{config.path} ({len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes)"
    return _in_splits(config, description, digest.hexdigest(), sources, rule)


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
        parts = {
            SPLIT_NAMES[split]: builder.as_data_source(split=split)
            for split in builder.info.splits
            if split in SPLIT_NAMES
        }
    except Exception as error:  # a missing dataset, version or format: each its own kind of exception in TFDS
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"data.path={config.path!r}: no dataset that can be read: {reason}") from error
    if "train" not in parts:
        raise UserError(f"data.path={config.path!r}: the dataset has no train split")
    if config.text_field not in builder.info.features:
        raise UserError(
            f"data.path={config.path!r}: its examples have no field {config.text_field!r} (data.text_field)"
        )
    identity = [builder.info.full_name, config.text_field]
    identity += [f"{split} {len(part)}" for split, part in sorted(parts.items())]
    fingerprint = hashlib.sha256("\0".join(identity).encode()).hexdigest()
    sources = {}
    for split, part in parts.items():
        read = functools.partial(read_tfds, part, config.text_field, f"{config.path} {split}")
        sources[split] = Source(read, config.damaged == "skip")
    return _in_splits(config, f"TFDS dataset {builder.info.full_name}", fingerprint, sources, "splits of the dataset")

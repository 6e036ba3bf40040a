"""The texts of the zero-shot suites: which split a protocol takes of each, and where its records are found.

A record is what the published code got from its data library, before detokenising: a line of WikiText with its line
feed (nothing at all for a blank line), a line of PTB or LM1B, a passage of LAMBADA, an article. Nothing is downloaded.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from armd_jax.data import found_files, text_files, tfds
from armd_jax.data.reading import TextOrError
from armd_jax.data.splits import splits_named
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.evaluation import detokenizers
from armd_jax.names import Split, SuiteProtocol, SuiteSet

_PLAIN_TEXT = (".txt", ".txt.gz", ".txt.zst")  # a record per line


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How one set is stored, and read.

    Attributes:
      names: how the names of its folder or files begin, in lower case, without anything but letters and digits.
      detokenize: the rules that both protocols put its records through.
      fields: fields that may hold the text in `.jsonl`, `.parquet` and the like; the first that is there is read.
      keeps_line_ends: whether a line of a text file keeps its line feed, as lines of WikiText do.
      tfds, tfds_fields: its name in TFDS, and the fields that make up its text; empty if TFDS has no such dataset.
    """

    names: tuple[str, ...]
    detokenize: Callable[[str], str]
    fields: tuple[str, ...] = ("text",)
    keeps_line_ends: bool = False
    tfds: str = ""
    tfds_fields: tuple[str, ...] = ("text",)


CORPORA: dict[SuiteSet, Corpus] = {
    "lambada": Corpus(
        ("lambada",), detokenizers.lambada, ("text", "passage"), tfds="lambada", tfds_fields=("passage",)
    ),
    "wikitext2": Corpus(("wikitext2",), detokenizers.wikitext, keeps_line_ends=True),
    "wikitext103": Corpus(("wikitext103",), detokenizers.wikitext, keeps_line_ends=True),
    "ptb": Corpus(("ptb", "penntreebank"), detokenizers.ptb, ("sentence", "text")),
    "lm1b": Corpus(("lm1b",), detokenizers.lm1b, tfds="lm1b"),
    "ag_news": Corpus(("agnews",), detokenizers.unchanged, tfds="ag_news_subset", tfds_fields=("title", "description")),
    "pubmed": Corpus(
        ("pubmed", "scientificpaperspubmed"),
        detokenizers.papers,
        ("article", "text"),
        tfds="scientific_papers/pubmed",
        tfds_fields=("article",),
    ),
    "arxiv": Corpus(
        ("arxiv", "scientificpapersarxiv"),
        detokenizers.papers,
        ("article", "text"),
        tfds="scientific_papers/arxiv",
        tfds_fields=("article",),
    ),
}

# The splits of each protocol. RADD's evaluation code takes the training split of WikiText-2 and nothing else of it; the
# test split beside it is ours, because that is what WikiText-2 perplexities per word are of.
SPLITS: dict[SuiteProtocol, dict[SuiteSet, tuple[Split, ...]]] = {
    "sedd": {name: ("test",) for name in CORPORA} | {"wikitext2": ("train", "test")},
    "mdlm": {name: ("test",) if name in ("lambada", "lm1b", "ag_news") else ("valid",) for name in CORPORA},
}
# What the published code of a protocol can be asked for; the other sets are measured by the same rules.
PUBLISHED: dict[SuiteProtocol, frozenset[tuple[SuiteSet, Split]]] = {
    "sedd": frozenset(
        {("lambada", "test"), ("wikitext2", "train"), ("wikitext103", "test"), ("ptb", "test"), ("lm1b", "test")}
    ),
    "mdlm": frozenset((name, splits[0]) for name, splits in SPLITS["mdlm"].items()),
}


@dataclasses.dataclass(frozen=True)
class Text:
    """A split of a set that was found. records: a new pass over its records, as they are stored."""

    where: str
    records: Callable[[], Iterator[str]]


def find(name: SuiteSet, split: Split, folder: pathlib.Path | None, tfds_folder: pathlib.Path | None) -> Text | None:
    """A split of a set, looked for in a folder of files and then in a folder of TFDS datasets. None: not there.

    folder: holds a file, or a folder with files, whose name begins with that of the set (`wikitext-2-raw`);
        the names of files, or of folders around them, say of which split they are (`test.txt`, `wiki.valid.jsonl.gz`).
    Raises UserError if files of two kinds or places could be meant.
    """
    corpus = CORPORA[name]
    files = _files(corpus, split, folder) if folder is not None else []
    if files and folder is not None:
        read = functools.partial(_read_files, corpus, files)
        return Text(", ".join(str(file.relative_to(folder)) for file in files), read)
    if tfds_folder is not None and corpus.tfds and (tfds_folder / corpus.tfds).is_dir():
        return Text(f"tfds:{corpus.tfds}", functools.partial(_read_tfds, corpus, split, tfds_folder))
    return None


def _files(corpus: Corpus, split: Split, folder: pathlib.Path) -> list[pathlib.Path]:
    by_kind: dict[str, list[pathlib.Path]] = {}
    for entry in sorted(folder.iterdir()):
        plain = "".join(letter for letter in entry.name.lower() if letter.isalnum())
        if not plain.startswith(corpus.names):
            continue
        inside = found_files.find(str(entry)).files if entry.is_dir() else {entry.name: entry}
        for name, file in inside.items():
            suffix = next((end for end in text_files.SUFFIXES if name.lower().endswith(end)), None)
            if suffix and list(splits_named(name)) == [split]:
                by_kind.setdefault(f"{entry.name}, {suffix}", []).append(file)
    if len(by_kind) > 1:
        (first, *_), (second, *_) = list(by_kind.values())[:2]
        raise UserError(f"{first} and {second}: both may be meant; leave one in the folder")
    return next(iter(by_kind.values()), [])


def _read_files(corpus: Corpus, files: Sequence[pathlib.Path]) -> Iterator[str]:
    for file in files:
        if file.name.lower().endswith(_PLAIN_TEXT):
            for text in _checked(_documents(file, "text")):
                yield from _lines(text, corpus.keeps_line_ends)
        else:
            yield from _checked(_fielded(file, corpus.fields))


def _documents(file: pathlib.Path, field: str) -> Iterable[TextOrError]:
    source = text_files.open_source(DataConfig(path=str(file), text_field=field, split_by_name=False), {})
    return source.readers["train"]()


def _fielded(file: pathlib.Path, fields: Sequence[str]) -> Iterable[TextOrError]:
    """The documents in the first of `fields` that the file has."""
    first: TextOrError = UserError(f"{file}: is empty")
    for field in fields:
        try:
            first = next(iter(_documents(file, field)), first)
        except UserError as error:
            first = error
        if isinstance(first, str):
            return _documents(file, field)
    return [first]


def _checked(documents: Iterable[TextOrError]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, UserError):
            raise document
        yield document


def _lines(text: str, keeps_line_ends: bool) -> Iterator[str]:
    for line in io.StringIO(text, newline=None):
        yield (line if line.strip() else "") if keeps_line_ends else line.strip()


def _read_tfds(corpus: Corpus, split: Split, folder: pathlib.Path) -> Iterator[str]:
    parts = []
    for field in corpus.tfds_fields:
        config = DataConfig(path=tfds.PREFIX + corpus.tfds, text_field=field, tfds_data_dir=str(folder))
        readers = tfds.open_source(config).readers
        if split not in readers:
            raise UserError(f"{config.path}: has no {split} split")
        parts.append(_checked(readers[split]()))
    for texts in zip(*parts, strict=True):
        yield " ".join(texts)

"""The texts of the zero-shot suites: which split a protocol takes of each, and where its records are found.

A record is what the published code got from its data library, before detokenising: a line of WikiText with its line
feed (nothing at all for a blank line), a line of PTB or LM1B, a passage of LAMBADA, an article. Nothing is downloaded.
"""

import dataclasses
import functools
import io
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from armd_jax.data import found_files, text_files, tfds
from armd_jax.data.reading import TextOrError
from armd_jax.data.splits import splits_named
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.evaluation import detokenizers
from armd_jax.names import Split, SuiteProtocol, SuiteSet

_PLAIN_TEXT = (".txt", ".txt.gz", ".txt.zst")  # a record per line
_CONTAINERS = ("wikitext", "scientificpapers")  # folders of several sets, as clones from the Hugging Face Hub are
# Words that may stand behind the name of a set. Others name something else: `pubmedqa`, `arxiv_abstracts`.
_FOLLOWING = re.compile(
    "txt|jsonl|json|parquet|arrow|gz|zst|train|training|valid|validation|val|dev|test|heldout|v|raw|words?|level|tokens"
    "|texts?|openai|original|subset|data|dataset|corpus|articles|papers"
)
_SHARD = re.compile(r"-\d+-of-\d+")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How one set is stored, and read.

    Attributes:
      names: how the names of its folder or files begin, in lower case, without anything but letters and digits.
      detokenize: the rules that both protocols put its records through.
      fields: fields that may hold the text in `.jsonl`, `.parquet` and the like; the first that is there is read.
      skips_blanks: whether blank records are no records, as the published code has it for LAMBADA.
      keeps_line_ends: whether a line of a text file keeps its line feed, as lines of WikiText do.
      tfds, tfds_fields: its name in TFDS, and the fields that make up its text; empty if TFDS has no such dataset.
    """

    names: tuple[str, ...]
    detokenize: Callable[[str], str]
    fields: tuple[str, ...] = ("text",)
    skips_blanks: bool = False
    keeps_line_ends: bool = False
    tfds: str = ""
    tfds_fields: tuple[str, ...] = ("text",)


CORPORA: dict[SuiteSet, Corpus] = {
    "lambada": Corpus(
        ("lambada",),
        detokenizers.lambada,
        ("text", "passage"),
        skips_blanks=True,
        tfds="lambada",
        tfds_fields=("passage",),
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
        Several files are one split if their names differ in a shard's number alone (`-00000-of-00002`).
    Raises UserError if more than one file could be meant, if there are no records, or if the first cannot be read.
    """
    corpus = CORPORA[name]
    files = _files(corpus, split, folder) if folder is not None else []
    if files and folder is not None:
        read = functools.partial(_read_files, corpus, files)
        return _begun(corpus, ", ".join(str(file.relative_to(folder)) for file in files), read)
    if tfds_folder is not None and corpus.tfds and (tfds_folder / corpus.tfds).is_dir():
        return _begun(corpus, f"tfds:{corpus.tfds}", functools.partial(_read_tfds, corpus, split, tfds_folder))
    return None


def _begun(corpus: Corpus, where: str, read: Callable[[], Iterator[str]]) -> Text:
    """The text, after a look at its first record: what cannot be read at all is said before anything is measured."""

    def records() -> Iterator[str]:
        return (record for record in read() if record.strip()) if corpus.skips_blanks else read()

    if next(records(), None) is None:
        raise UserError(f"{where}: holds no records")
    return Text(where, records)


def passed_over(name: SuiteSet, folder: pathlib.Path) -> list[str]:
    """Files in the place of a set whose names do not say how to read them, or of which one split they are."""
    return [
        str(file.relative_to(folder))
        for named, file in _candidates(CORPORA[name], folder)
        if _suffix(named) is None or len(_split_of(named)) != 1
    ]


def _is_of(corpus: Corpus, name: str) -> bool:
    """Whether a name begins with that of the set, in whatever spelling, and does not go on as another name does."""
    for own in corpus.names:
        if found := re.match(r"[\W_]*".join(own) + r"(?!\d)", name.lower()):
            following = re.match(r"[\W_]*([a-z]*)", name.lower()[found.end() :])
            if following is not None and (not following[1] or _FOLLOWING.fullmatch(following[1])):
                return True
    return False


def _candidates(corpus: Corpus, folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """The files in the places of a set, each with its place from `folder` on, or from the folder of several sets."""
    for entry in sorted(folder.iterdir()):
        plain = "".join(letter for letter in entry.name.lower() if letter.isalnum())
        if entry.name.startswith("."):
            continue
        places = sorted(entry.iterdir()) if plain in _CONTAINERS and entry.is_dir() else [entry]
        for place in places:
            if place.name.startswith(".") or not _is_of(corpus, place.name):
                continue
            if place.is_dir():
                inside = found_files.find(str(place)).files
                yield from ((f"{place.name}/{name}", file) for name, file in inside.items())
            else:
                yield place.name, place


def _suffix(name: str) -> str | None:
    return next((end for end in text_files.SUFFIXES if name.lower().endswith(end)), None)


def _split_of(name: str) -> list[Split]:
    """The splits that a file's place names: the part inside the set's folder, or else that folder."""
    around, _, inside = name.partition("/")
    return list(splits_named(inside) or splits_named(around))


def _files(corpus: Corpus, split: Split, folder: pathlib.Path) -> list[pathlib.Path]:
    by_name: dict[str, list[pathlib.Path]] = {}
    for name, file in _candidates(corpus, folder):
        if _suffix(name) is not None and _split_of(name) == [split]:
            by_name.setdefault(_SHARD.sub("", str(file.relative_to(folder))), []).append(file)
    if len(by_name) > 1:
        first, second, *_ = (files[0].relative_to(folder) for files in by_name.values())
        raise UserError(f"{first} and {second}: both may be meant; leave one of them in {folder}")
    return next(iter(by_name.values()), [])


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
    failed: UserError | None = None
    for field in fields:
        try:
            first = next(iter(_documents(file, field)), None)
        except UserError as error:
            first = error
        if first is None:
            return []
        if isinstance(first, str):
            return _documents(file, field)
        failed = failed or first
    tried = f" (tried as fields: {', '.join(fields)})" if len(fields) > 1 else ""
    # What a user of a suite can set is the file: there is no flag for the field.
    return [UserError(f"{failed}".replace(" (data.text_field)", "") + tried)]


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

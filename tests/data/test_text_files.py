"""Text files: every format is read byte for byte, names give the splits, and bad content names its file and line."""

import gzip
import io
import json
import os
import re
import sys

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from armd_jax.cli import main as cli
from armd_jax.data import tables, text_files
from armd_jax.data.corpora import open_corpus
from armd_jax.data.splits import SPLITS
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

TEXT = "  one\r\n\ttwo  \n\n\u2581 caf\u00e9 \U0001f600"
JSON_LINES = (json.dumps({"body": TEXT}) + "\n" + json.dumps({"body": " \n"}) + "\n\n").encode()
TABLE = {"number": [1, 2], "body": [TEXT, " \n"]}
zstd = text_files._zstd()


def _parquet(columns: dict[str, list]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def _arrow(columns: dict[str, list], file: bool = False) -> bytes:
    """A stream, as datasets writes it, or an Arrow file."""
    out, table = io.BytesIO(), pyarrow.table(columns)
    with (pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream)(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


# A file of every format that holds TEXT.
EXAMPLES = {
    ".txt": TEXT.encode(),
    ".md": TEXT.encode(),
    ".txt.gz": gzip.compress(TEXT.encode()),
    ".jsonl": JSON_LINES,
    ".jsonl.gz": gzip.compress(JSON_LINES),
    ".json": JSON_LINES,
    ".json.gz": gzip.compress(JSON_LINES),
    ".txt.zst": zstd.compress(TEXT.encode()),
    ".jsonl.zst": zstd.compress(JSON_LINES),
    ".json.zst": zstd.compress(JSON_LINES),
    ".parquet": _parquet(TABLE),
    ".arrow": _arrow(TABLE),
}
GZIPPED = gzip.compress(np.random.default_rng(0).bytes(10_000).hex().encode())


def texts(corpus):
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def write_jsonl(file, items):
    content = "".join(json.dumps(item) + "\n" for item in items).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_text_is_kept_byte_for_byte(tmp_path, suffix):
    """In every format, alone and in a folder beside files that are not text, whatever comes before the suffix."""
    for name in (f"a{suffix}", f"notes.jsonl{suffix}"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(EXAMPLES[suffix])
        (folder / f".hidden{suffix}").write_bytes(b"\0")
        (folder / "picture.png").write_bytes(b"\0")
        for path in (folder, folder / name):
            config = DataConfig(path=str(path), text_field="body", valid_fraction=0.0, test_fraction=0.0)
            assert texts(open_corpus(config)) == {"train": [TEXT]}


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_every_format_is_in_the_messages_and_names_splits(tmp_path, suffix):
    (tmp_path / "picture.png").write_bytes(b"")
    for path in (tmp_path, tmp_path / "picture.png"):
        with pytest.raises(UserError, match=f"{suffix}(,|;|$)"):
            open_corpus(DataConfig(path=str(path)))
    for split in SPLITS:
        (tmp_path / f"wiki-{split}{suffix}").write_bytes(EXAMPLES[suffix])
    assert open_corpus(DataConfig(path=str(tmp_path), text_field="body")).splits == SPLITS


def test_no_suffix_hides_another():
    """A file has one format, whatever the order of the table."""
    for one in text_files.SUFFIXES:
        assert [other for other in text_files.SUFFIXES if one.endswith(other)] == [one]


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki-train.md", "wiki-validation.txt", "wiki-test.txt"),
        ("train/0.txt", "dev/0.txt", "test/like-the-others.txt"),
        ("train-00000-of-00001.txt", "val.txt", "test_0.txt"),
    ],
)
def test_file_and_folder_names_give_the_splits(tmp_path, names):
    for name, split in zip(names, SPLITS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {split}")
    for path in (str(tmp_path), f"{tmp_path}/**/*"):
        assert texts(open_corpus(DataConfig(path=path))) == {split: [f"text of {split}"] for split in SPLITS}


def test_named_splits_are_not_completed_but_for_validation(tmp_path):
    write_jsonl(tmp_path / "train.jsonl.gz", [{"text": f"train {index}"} for index in range(100)])
    write_jsonl(tmp_path / "valid.jsonl.gz", [{"text": "valid"}])
    assert open_corpus(DataConfig(path=str(tmp_path))).splits == ("train", "valid")
    (tmp_path / "valid.jsonl.gz").rename(tmp_path / "test.jsonl.gz")
    parts = texts(open_corpus(DataConfig(path=str(tmp_path))))
    assert parts["test"] == ["valid"] and len(parts["valid"]) == 5 and len(parts["train"]) == 95
    (tmp_path / "other.txt").write_text("which split?")
    with pytest.raises(UserError, match="'other.txt' names no split, but 'test.jsonl.gz' gives test; .*split_by_name"):
        open_corpus(DataConfig(path=str(tmp_path)))


# Layouts of people's folders. LINE files hold one JSON line; a value that starts with "->" is a link.
LINE = '{"text": "words"}\n'
ALL = "documents of all files"
C4 = {f"c4-{split}.00000-of-00008.jsonl": LINE for split in ("train", "validation")}
# What is there, what data.path is below it, which names are taken as what, and which are left out for what reason.
CHOICES = {
    "C4's own names": (C4, "", {"train": [[*C4][0]], "valid": [[*C4][1]]}, {}),
    "names that mean nothing by the config": (C4, "", {ALL: [*C4]}, {}),
    "words in the middle, in camel case and in folders": (
        {"en_train_0.txt": "a", "wikiTest.txt": "b", "my-heldout/0.txt": "c", "0.trainset.txt": "d"},
        "",
        {"train": ["0.trainset.txt", "en_train_0.txt"], "valid": ["my-heldout/0.txt"], "test": ["wikiTest.txt"]},
        {},
    ),
    "held out, written with a hyphen": (
        {"news.held-out.txt": "a", "news.training.txt": "b"},
        "",
        {"valid": ["news.held-out.txt"], "train": ["news.training.txt"]},
        {},
    ),
    "all files of one split": (
        {"c4-train.0.jsonl": LINE, "c4-train.1.jsonl": LINE, "other.txt": "a"},
        "*.jsonl",
        {ALL: ["c4-train.0.jsonl", "c4-train.1.jsonl"]},
        {},
    ),
    "one file, whatever its name": (
        {"train-test.txt": "a", "b.txt": "b"},
        "train-test.txt",
        {ALL: ["train-test.txt"]},
        {},
    ),
    "a dataset card": (
        {
            "data.jsonl": LINE,
            "README.md": "card",
            "LICENSE.txt": "free",
            "dataset_card.md": "card",
            "docs/readme_de.md": "x",
        },
        "",
        {ALL: ["data.jsonl"]},
        dict.fromkeys(["LICENSE.txt", "README.md", "dataset_card.md", "docs/readme_de.md"], "describes the data"),
    ),
    "a README that a glob asks for": ({"README.md": "a", "b.md": "b"}, "*.md", {ALL: ["README.md", "b.md"]}, {}),
    "endings in upper case": (
        {"a.JSONL": LINE, "b.Txt": "b", "C.MD": "c"},
        "",
        {ALL: ["C.MD", "a.JSONL", "b.Txt"]},
        {},
    ),
    "compressed in ways that are not read": (
        {"a.jsonl": LINE, "b.jsonl.bz2": "", "c.txt.xz": "", "d.tar.gz": "", "e.csv": "", "f.gz": ""},
        "",
        {ALL: ["a.jsonl"]},
        {
            "b.jsonl.bz2": "compressed with bzip2, which is not read; make it",
            "c.txt.xz": "compressed with xz",
            "d.tar.gz": "an archive",
            "e.csv": "a table",
            "f.gz": "not a kind of file",
        },
    ),
    "JSON lines that are called .json, and other JSON": (
        {
            "a.json": "\ufeff" + LINE,
            "dataset_info.json": '{"text": 3}',
            "list.json": "[" + LINE + "]",
            "pretty.json": '{\n"text": "words"}',
            "none.json": "",
        },
        "",
        {ALL: ["a.json"]},
        dict.fromkeys(["dataset_info.json", "list.json", "none.json", "pretty.json"], "no JSON object with a text"),
    ),
    "a file and its compressed form": (
        {"a.jsonl": LINE, "a.jsonl.gz": "", "a.jsonl.zst": "", "b.txt": "b"},
        "",
        {ALL: ["a.jsonl", "b.txt"]},
        {"a.jsonl.gz": "the compressed form", "a.jsonl.zst": "the compressed form"},
    ),
    "hidden files and folders": (
        {"a.txt": "a", ".b.txt": "b", ".ipynb_checkpoints/a-checkpoint.txt": "a", ".#c.txt": "->user@host.17"},
        "",
        {ALL: ["a.txt"]},
        dict.fromkeys([".#c.txt", ".b.txt", ".ipynb_checkpoints"], "hidden"),
    ),
    "a folder elsewhere that a link leads to": (
        {"in/a.txt": "a", "in/more": "->../elsewhere", "elsewhere/b.txt": "b"},
        "in",
        {ALL: ["a.txt", "more/b.txt"]},
        {},
    ),
    "links to files": (
        {
            "in/part-0.txt": "a",
            "in/latest.txt": "->part-0.txt",
            "in/1.txt": "->../b.txt",
            "in/2.txt": "->1.txt",
            "b.txt": "b",
        },
        "in/*",
        {ALL: ["1.txt", "part-0.txt"]},
        {"latest.txt": "a file that is read already", "2.txt": "a file that is read already"},
    ),
    "folders that a glob reaches twice": (
        {"in/a/b.txt": "b", "in/0": "->a"},
        "in/*/b.txt",
        {ALL: ["a/b.txt"]},
        {"0/b.txt": "a file that is read already"},
    ),
    "links in a circle, to a folder twice, and back up": (
        {"in/a/b.txt": "b", "in/a/again": "->.", "in/0": "->a", "in/up": "->../..", "in/c.txt": "c"},
        "in",
        {ALL: ["a/b.txt", "c.txt"]},
        {"0": "is read already", "a/again": "is read already", "up": "leads back"},
    ),
    "the same links under a glob": (
        {"in/a/b.txt": "b", "in/a/again": "->.", "in/a/too": "->.", "in/0": "->a", "in/.c/d.txt": "d"},
        "in/**/*.txt",
        {ALL: ["a/b.txt"]},
        {"0": "is read already", "a/again": "is read already", "a/too": "is read already"},
    ),
    "a glob that ends at a folder": (
        {"a.txt": "a", "b/c.txt": "c"},
        "*",
        {ALL: ["a.txt"]},
        {"b": r"a folder, and the glob ends at its name; /\*\* after it"},
    ),
    "a glob that spells a leading dot": ({".a/b.txt": "b", "c.txt": "c"}, "**/.a/*", {ALL: [".a/b.txt"]}, {}),
}
# What is there, what data.path is below it, and what the error says.
UNDECIDED = {
    "a name that gives two splits": (
        {"train.txt": "a", "dev-of-train.txt": "b"},
        "",
        r"the name 'dev-of-train.txt' gives two splits, valid \('dev'\) and train \('train'\); .*--no-split-by-name",
    ),
    "a folder and a name that disagree": (
        {"train/a.txt": "a", "train/val.txt": "b"},
        "",
        "'train/val.txt' gives two splits",
    ),
    "held-out text beside text without a name": (
        {"news.en-00001.txt": "a", "news.en.heldout-00000.txt": "b"},
        "",
        "'news.en-00001.txt' names no split, but 'news.en.heldout-00000.txt' gives valid; .*data.split_by_name=false",
    ),
    "held-out text alone": ({"valid.txt": "a", "test.txt": "b"}, "", "'test.txt' gives test, and no name gives train"),
    "a link that leads nowhere": (
        {"a.txt": "a", "b.txt": "->/nowhere/b.txt"},
        "",
        r"b.txt: this link leads nowhere \('/now",
    ),
    "a folder on a disk that is not mounted": (
        {"a.txt": "a", "disk": "->/nowhere"},
        "",
        "disk: this link leads nowhere",
    ),
    "such a folder under a glob": ({"1/a.txt": "a", "2": "->/nowhere"}, "*/a.txt", "2: this link leads nowhere"),
    "such a folder under a deep glob": ({"1/a.txt": "a", "2": "->/nowhere"}, "**/*.txt", "2: this link leads nowhere"),
    "such a link as the path": ({"a.txt": "->b.txt"}, "a.txt", "a.txt: this link leads nowhere"),
    "a link to itself": ({"a.txt": "a", "b.txt": "->b.txt"}, "*.txt", "b.txt: this link leads nowhere"),
    "nothing but a dataset card": (
        {"README.md": "a"},
        "",
        r"no file there ends in .*; left out: 'README.md' \(describes",
    ),
    "a file in JSON that is not lines": (
        {"a.json": "[1]"},
        "a.json",
        "cannot read this kind of file: its first line is no",
    ),
}


def lay_out(folder, layout):
    for name, content in layout.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("->"):
            (folder / name).symlink_to(content[2:])
        else:
            (folder / name).write_text(content)


@pytest.mark.parametrize("situation", CHOICES)
def test_files_are_chosen_and_the_others_are_listed(tmp_path, situation):
    layout, path, taken, left_out = CHOICES[situation]
    lay_out(tmp_path, layout)
    by_name = situation != "names that mean nothing by the config"
    selection = open_corpus(DataConfig(path=f"{tmp_path}/{path}", split_by_name=by_name)).selection
    assert selection.taken == {role: tuple(names) for role, names in taken.items()}
    assert selection.left_out.keys() == left_out.keys()
    for name, reason in left_out.items():
        assert re.search(reason, selection.left_out[name])
        assert any(selection.left_out[name] in line for line in selection.lines())


@pytest.mark.parametrize("situation", UNDECIDED)
def test_files_that_leave_something_open_are_an_error(tmp_path, situation):
    layout, path, message = UNDECIDED[situation]
    lay_out(tmp_path, layout)
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(DataConfig(path=f"{tmp_path}/{path}"))
    assert "\n" not in str(caught.value)


def test_a_link_that_leads_nowhere_and_is_no_text_does_not_stop_a_glob(tmp_path):
    lay_out(tmp_path, {"a.txt": "a", "b/c.txt": "c", "picture.png": "->/nowhere"})
    for pattern in ("*.txt", "**/*.txt", "*/c.txt"):
        assert open_corpus(DataConfig(path=f"{tmp_path}/{pattern}")).selection.left_out == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path):
    lay_out(tmp_path, {"a.txt": "a", "b/c.txt": "c"})
    (tmp_path / "b").chmod(0)
    with pytest.raises(UserError, match="b: cannot be read: Permission denied"):
        open_corpus(DataConfig(path=str(tmp_path)))


def test_prepare_prints_what_was_taken_and_left_out(tmp_path, capsys):
    """On stderr for people, and whole in the result; again if the folder is prepared already."""
    documents = [f'{{"text": "words {number}"}}\n' for number in range(50)]
    layout = {f"c4-train.{index:05d}-of-00005.jsonl": "".join(documents[index::5]) for index in range(5)}
    lay_out(tmp_path / "c4", layout | {"c4-validation.jsonl": LINE, "README.md": "card"})
    command = ["prepare", f"--source={tmp_path / 'c4'}", f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--length=8"]
    for again in ("", "again"):
        assert cli.main([*command, "--json"]) == 0
        out, err = capsys.readouterr()
        result = json.loads(out)["selection"]
        assert result["taken"] == {"train": sorted(layout), "valid": ["c4-validation.jsonl"]}, again
        assert result["left_out"].keys() == {"README.md"}
        lines = err.splitlines()
        assert re.search("/c4': 6 files taken, 1 left out$", lines[0])
        assert lines[1].endswith("00002-of-00005.jsonl' and 2 more") and lines[2:4] == [
            "  taken as valid: 'c4-validation.jsonl'",
            f"  left out: 'README.md' ({result['left_out']['README.md']})",
        ]
    command[2] += "-again"
    assert cli.main([*command, "--json", "--no-split-by-name"]) == 0
    assert json.loads(capsys.readouterr().out)["selection"]["taken"].keys() == {ALL}


def test_fingerprint_follows_contents_and_names_but_not_the_place(tmp_path):
    def fingerprint(folder, name, text):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        return open_corpus(DataConfig(path=str(tmp_path / folder))).fingerprint

    first = fingerprint("1", "a.txt", "text")
    assert fingerprint("2", "a.txt", "text") == first
    assert len({first, fingerprint("3", "a.txt", "texT"), fingerprint("4", "b.txt", "text")}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff", r"a\.txt, line 2: not UTF-8 text \(byte 9\)"),
        ("a.txt", b"one\ntwo\0", r"a\.txt, line 2: holds a NUL character"),
        ("a.txt.gz", GZIPPED[:-100], r"a\.txt\.gz: damaged or truncated gzip"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz: damaged or truncated gzip"),
        ("a.jsonl.gz", GZIPPED[:50] + b"\xff\xff" + GZIPPED[52:], r"a\.jsonl\.gz"),
        ("a.txt.zst", zstd.compress(b"one two " * 99)[:-3], r"a\.txt\.zst: damaged or truncated Zstandard"),
        ("a.txt.zst", b"plain text", r"a\.txt\.zst: damaged or truncated Zstandard"),
        ("a.jsonl.zst", zstd.compress(b"x" * 999)[:20] + b"\xff" * 9, r"a\.jsonl\.zst"),
        ("a.parquet", b"plain text", r"a\.parquet: damaged or truncated Parquet"),
        ("a.parquet", _parquet({"text": ["x"] * 99})[:-20], r"a\.parquet: damaged or truncated Parquet"),
        ("a.parquet", _parquet({"body": ["x"]}), r"a\.parquet: has no column 'text' \(data.text_field\); it has body"),
        ("a.parquet", _parquet({"text": [3]}), r"a\.parquet: its column 'text' \(data.text_field\) is int64, not text"),
        ("a.parquet", _parquet({"text": ["x", None]}), r"a\.parquet, row 2: no text in field 'text'"),
        ("a.parquet", _parquet({"text": ["x", "a\0b"]}), r"a\.parquet, row 2: holds a NUL"),
        ("a.arrow", b"plain text", r"a\.arrow: damaged or truncated Arrow"),
        ("a.arrow", _arrow({"text": ["x" * 999]})[:-900], r"a\.arrow: damaged or truncated Arrow"),
        ("a.arrow", _arrow({"text": ["x"]}, file=True)[:-9], r"a\.arrow: damaged or truncated Arrow"),
        ("a.arrow", _arrow({"text": ["x", "\0"]}, file=True), r"a\.arrow, row 2: holds a NUL"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"a\.jsonl, line 3: no text in field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: no text in field 'text'"),
        ("a.jsonl", b'"text"\n', r"a\.jsonl, line 1: no text in field 'text'"),
        ("a.jsonl", b'{"text": "\\u0000"}\n', r"a\.jsonl, line 1: holds a NUL"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: holds half a surrogate"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8"),
    ],
)
def test_hostile_content_names_the_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(open_corpus(DataConfig(path=str(tmp_path / name))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [_parquet, _arrow], ids=["parquet", "arrow"])
def test_damaged_rows_of_a_table_can_be_left_out(tmp_path, monkeypatch, write):
    """Each alone, whatever batch of rows it is in: no text, a NUL, bytes that are no UTF-8."""
    monkeypatch.setattr(tables, "_ROWS", 2)
    rows = [None, b"one", b"\xff", b"two \xf0\x9f\x98\x80", b"a\0b", b"three", b" "]
    offsets = np.cumsum([0, *(len(row or b"") for row in rows)]).astype(np.int32)
    valid = pyarrow.py_buffer(bytes([sum((row is not None) << bit for bit, row in enumerate(rows))]))
    content = pyarrow.py_buffer(b"".join(row or b"" for row in rows))
    column = pyarrow.StringArray.from_buffers(len(rows), pyarrow.py_buffer(offsets.tobytes()), content, valid)
    (tmp_path / "a").write_bytes(write({"text": column}))
    file = (tmp_path / "a").rename(tmp_path / ("a.parquet" if write is _parquet else "a.arrow"))
    corpus = open_corpus(DataConfig(path=str(file), damaged="skip", valid_fraction=0.0, test_fraction=0.0))
    assert texts(corpus) == {"train": ["one", "two \U0001f600", "three"]}
    left_out = corpus.left_out()["train"]
    assert (left_out.empty, left_out.damaged) == (1, 3) and left_out.first_damaged.endswith(
        f"{file.name}, row 1: no text in field 'text' (data.text_field)"
    )


@pytest.mark.slow
def test_what_datasets_saves(tmp_path):
    """A data set and one with splits; what datasets keeps beside the data is no text."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(20)]})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-0a1b.arrow").write_bytes(_arrow({"text": ["computed"]}))
    corpus = open_corpus(DataConfig(path=str(tmp_path / "one"), valid_fraction=0.0, test_fraction=0.0))
    assert texts(corpus) == {"train": rows["text"][:]}
    assert {name for name in corpus.selection.left_out} == {"cache-0a1b.arrow", "dataset_info.json", "state.json"}
    parts = datasets.DatasetDict({"train": rows, "validation": rows.select([3])})
    parts.save_to_disk(tmp_path / "parts")
    corpus = open_corpus(DataConfig(path=str(tmp_path / "parts")))
    found = texts(corpus)
    assert corpus.splits[:2] == ("train", "valid") and found["valid"] == ["text 3"]


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.txt.zst", "zstd")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name, module):
    """One line with the extra that has it."""
    (tmp_path / name).write_bytes(EXAMPLES[name[1:]])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(text_files, "_zstd", lambda: None)
    with pytest.raises(UserError, match=f"{name}: to read .*install the extra data: pip install"):
        texts(open_corpus(DataConfig(path=str(tmp_path / name), text_field="body")))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "no such file or folder"),
        ("*.txt", "no file there ends in"),
        ("", "no file there ends in"),
        ("picture.png", "cannot read this kind of file"),
    ],
)
def test_source_that_is_not_there(tmp_path, path, message):
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_corpus(DataConfig(path=f"{tmp_path}/{path}"))

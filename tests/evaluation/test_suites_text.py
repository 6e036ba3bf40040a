"""The texts of suites: which files are found, and what their records are."""

import gzip
import json
import subprocess
import sys

import pytest

from armd_jax.errors import UserError
from armd_jax.evaluation import suites_text

LINES = " \n = Title = \n \n A line , with words . \n"


def _records(name, split, folder, tfds=None):
    found = suites_text.find(name, split, folder, tfds)
    return None if found is None else list(found.records())


def test_a_line_of_a_text_file_is_a_record(tmp_path):
    """A line of WikiText keeps its line feed, and a blank one holds nothing; other lines are stripped."""
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "test.txt").write_text(LINES)
    (tmp_path / "ptb.test.txt").write_text(" a line \n another\x85one \n")
    assert _records("wikitext2", "test", tmp_path) == ["", " = Title = \n", "", " A line , with words . \n"]
    assert _records("ptb", "test", tmp_path) == ["a line", "another\x85one"]
    assert _records("wikitext103", "test", tmp_path) is None and _records("wikitext2", "train", tmp_path) is None


@pytest.mark.parametrize("field", ["article", "text"])
def test_fields_of_json_lines(tmp_path, field):
    """The text is in the field that the set's own files have, or in `text`; blank records stay."""
    (tmp_path / "pubmed").mkdir()
    rows = [{field: "one"}, {field: ""}, {field: "two\nlines"}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pubmed" / "valid.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    assert _records("pubmed", "valid", tmp_path) == ["one", "", "two\nlines"]


def test_tables_of_hugging_face(tmp_path):
    """As their folders and files are called there, in several parts."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "wikitext-2-raw-v1"
    folder.mkdir()
    for part, texts in enumerate((["", " = A = \n"], [" b \n"])):
        parquet.write_table(pyarrow.table({"text": texts}), folder / f"test-0000{part}-of-00002.parquet")
    assert _records("wikitext2", "test", tmp_path) == ["", " = A = \n", " b \n"]


def test_what_is_ambiguous_or_broken_is_one_line(tmp_path):
    """Two forms of one split, a file without the field, and broken JSON."""
    for name in ("wikitext2", "wikitext-2-raw"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").write_text(LINES)
    with pytest.raises(UserError, match="both may be meant"):
        suites_text.find("wikitext2", "test", tmp_path, None)
    (tmp_path / "lm1b_test.jsonl").write_text('{"sentence": "a"}\n')
    with pytest.raises(UserError, match=r"lm1b_test\.jsonl.*no text in field 'text'$"):
        _records("lm1b", "test", tmp_path)
    (tmp_path / "ag_news_test.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UserError, match=r"ag_news_test\.jsonl, line 2: not valid JSON"):
        _records("ag_news", "test", tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("ptb/test.txt", "ptb/ptb.test.txt"),
        ("lambada_openai/lambada_test.jsonl", "lambada_openai/lambada_test_de.jsonl"),
    ],
)
def test_only_shards_are_joined(tmp_path, names):
    """Two files of one split are not one text because they lie side by side."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a b"}\n')
    with pytest.raises(UserError, match=r"both may be meant; leave one of them"):
        suites_text.find("ptb" if "ptb" in names[0] else "lambada", "test", tmp_path, None)


def test_names_that_go_on_are_of_other_sets(tmp_path):
    """And hidden files, and those of a clone that holds several sets."""
    for name in ("pubmedqa_test.jsonl", "arxiv_abstracts_valid.jsonl", "._lambada_test.jsonl", "wikitext-20.test.txt"):
        (tmp_path / name).write_text('{"text": "a b"}\n')
    for name, split in (("pubmed", "test"), ("arxiv", "valid"), ("lambada", "test"), ("wikitext2", "test")):
        assert _records(name, split, tmp_path) is None
    for name in ("scientific_papers/pubmed/test.jsonl", "wikitext/wikitext-2-raw-v1/test.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"text": "a b"}\n')
    assert _records("pubmed", "test", tmp_path) == _records("wikitext2", "test", tmp_path) == ["a b"]


def test_the_folder_says_the_split_if_the_file_does_not(tmp_path):
    """And files that nobody can place are named."""
    (tmp_path / "lambada_test").mkdir()
    (tmp_path / "lambada_test" / "data.jsonl").write_text('{"text": "a b"}\n')
    (tmp_path / "ptb").mkdir()
    for name in ("wiki.test.raw", "dev_test.txt", "test.csv"):
        (tmp_path / "ptb" / name).write_text("a b\n")
    assert _records("lambada", "test", tmp_path) == ["a b"]
    assert sorted(suites_text.passed_over("ptb", tmp_path)) == ["ptb/dev_test.txt", "ptb/test.csv", "ptb/wiki.test.raw"]


@pytest.mark.parametrize("name", ["lambada/test.txt", "lambada/test.jsonl"])
def test_a_text_without_records_is_an_error(tmp_path, name):
    """Whatever kind of file is empty. Blank records of LAMBADA are none."""
    (tmp_path / "lambada").mkdir()
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"lambada/test\.\w+: holds no records|lambada/test\.\w+: .*empty"):
        suites_text.find("lambada", "test", tmp_path, None)
    (tmp_path / name).write_text('{"text": ""}\n{"text": "a b"}\n' if name.endswith("jsonl") else "\n a b \n\n")
    assert _records("lambada", "test", tmp_path) == ["a b"]


def test_every_field_that_was_tried_is_said(tmp_path):
    """With the first error, and without a setting that the command does not have."""
    (tmp_path / "ptb_test.jsonl").write_text('{"line": "a"}\n')
    with pytest.raises(UserError, match=r"field 'sentence' \(tried as fields: sentence, text\)$"):
        suites_text.find("ptb", "test", tmp_path, None)


def test_every_set_has_its_splits_and_the_published_ones_are_among_them():
    """In both protocols."""
    for protocol, splits in suites_text.SPLITS.items():
        assert set(splits) == set(suites_text.CORPORA)
        assert suites_text.PUBLISHED[protocol] <= {(name, split) for name in splits for split in splits[name]}


@pytest.mark.slow
def test_datasets_of_tfds(tmp_path):
    """The title and the description of AG News are one text, as elsewhere; splits that are not there are said."""
    program = """
import pathlib, sys
import tensorflow_datasets as tfds
from armd_jax.errors import UserError
from armd_jax.evaluation import suites_text

class AgNewsSubset(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {name: tfds.features.Text() for name in ("title", "description")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, manager):
        return {"train": self._generate_examples(1), "test": self._generate_examples(3)}
    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"title": f"Title {index}", "description": f"says {index}."}

folder = pathlib.Path(sys.argv[1])
AgNewsSubset(data_dir=str(folder), file_format="array_record").download_and_prepare()
assert suites_text.find("lm1b", "test", None, folder) is None
found = suites_text.find("ag_news", "test", folder, folder)
assert found.where == "tfds:ag_news_subset"
assert sorted(found.records()) == [f"Title {index} says {index}." for index in range(3)], list(found.records())
try:
    list(suites_text.find("ag_news", "valid", None, folder).records())
    raise SystemExit("a split that is not there was read")
except UserError as error:
    assert str(error) == "tfds:ag_news_subset: has no valid split"
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]

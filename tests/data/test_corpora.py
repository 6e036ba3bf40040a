"""Corpora: the same documents everywhere, dealt to splits once each; every kind of bad input is one clear line."""

import gzip
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from armd_jax.config import DataConfig
from armd_jax.data import corpora
from armd_jax.data import embedded as embedded_module
from armd_jax.data.corpora import count_words, open_corpus
from armd_jax.errors import UserError


def texts(corpus):
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def write_jsonl(file, items):
    content = "".join(json.dumps(item) + "\n" for item in items).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def embedded():
    return texts(open_corpus(DataConfig()))


def test_embedded_corpus_is_sizeable_unique_and_split_by_share(embedded):
    documents = sum(embedded.values(), [])
    assert len(documents) > 200 and len(set(documents)) == len(documents)
    sizes = {split: sum(len(text.encode()) for text in part) for split, part in embedded.items()}
    assert sum(sizes.values()) > 1_000_000
    for split in ("valid", "test"):
        assert sizes[split] == pytest.approx(0.05 * sum(sizes.values()), rel=0.1)
    paragraphs = [" ".join(block.split()) for text in documents for block in text.split("\n\n")]
    long = [block for block in paragraphs if len(block) >= 200]
    assert len(long) > 1000 and len(set(long)) == len(long)  # no passage is both held out and trained on


def test_embedded_corpus_does_not_depend_on_the_process_and_imports_nothing():
    program = (
        "import sys\n"
        "from armd_jax.config import DataConfig\n"
        "from armd_jax.data.corpora import open_corpus\n"
        "c = open_corpus(DataConfig())\n"
        "import hashlib\n"
        "print(c.fingerprint, [hashlib.sha256(repr(list(c.documents(s))).encode()).hexdigest() for s in c.splits])\n"
        "assert not {'this', 'antigravity', 'turtle', 'pydoc_data.topics'} & set(sys.modules)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert first == second and len(first) > 100


def test_python_without_topics_or_sources_gives_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    read = embedded_module.embedded_documents.__wrapped__
    with pytest.raises(UserError, match="carries no documentation"):
        read()
    prose = "Some prose.\n\n    " + "Indented and long enough. " * 10
    (tmp_path / "module.py").write_text(f'import nothing\ndef f():\n    """{prose}\n\n      More.\n    """\n')
    (tmp_path / "template.py").write_text("class {{name}}:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text(f'"""Left out. {prose}"""')
    assert read() == (prose.replace("    ", "") + "\n\n  More.\n",)


def test_split_follows_the_text_not_its_place(tmp_path):
    """Reordered, and with other files between them, equal documents are dealt alike and never to both sides."""
    documents = [f"document {index} " * 20 for index in range(60)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents + documents])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in reversed(documents)])
    once = texts(open_corpus(DataConfig(path=str(tmp_path / "b.jsonl"), valid_fraction=0.1)))
    twice = texts(open_corpus(DataConfig(path=str(tmp_path / "a.jsonl"), valid_fraction=0.1)))
    for split in corpora.SPLITS:
        assert once[split] and sorted(once[split] * 2) == sorted(twice[split])
    assert sorted(sum(once.values(), [])) == sorted(documents)


def test_share_passes_over_a_document_that_is_too_large(tmp_path):
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"{index} " * (20_000 if index % 3 == 0 else 50))
    parts = texts(open_corpus(DataConfig(path=str(tmp_path), valid_fraction=0.002, test_fraction=0.002)))
    for split in ("valid", "test"):
        assert parts[split] and max(map(len, parts[split])) < 1000


def test_one_document_is_cut_in_order_at_line_ends(tmp_path):
    text = "".join(f"line {index}\n" for index in range(1000)) + "no line end"
    (tmp_path / "one.txt").write_text(text)
    parts = texts(open_corpus(DataConfig(path=str(tmp_path / "one.txt"), valid_fraction=0.1, test_fraction=0.2)))
    assert "".join(part for split in corpora.SPLITS for part in parts[split]) == text
    assert all(len(part) == 1 for part in parts.values())
    assert parts["train"][0].endswith("\n") and parts["valid"][0].endswith("\n")
    assert len(parts["test"][0]) == pytest.approx(0.2 * len(text), rel=0.01)


def test_one_document_without_lines_is_cut_at_characters(tmp_path):
    (tmp_path / "one.txt").write_text("abcde" * 2000)
    parts = texts(open_corpus(DataConfig(path=str(tmp_path / "one.txt"))))
    assert [len(parts[split][0]) for split in corpora.SPLITS] == [9000, 500, 500]


def test_fraction_zero_means_no_such_split(tmp_path):
    (tmp_path / "one.txt").write_text("abcde\n" * 2000)
    corpus = open_corpus(DataConfig(path=str(tmp_path / "one.txt"), valid_fraction=0.0, test_fraction=0.0))
    assert corpus.splits == ("train",) and texts(corpus)["train"] == ["abcde\n" * 2000]
    with pytest.raises(UserError, match="no 'valid' split"):
        corpus.documents("valid")


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki-train.md", "wiki-validation.txt", "wiki-test.txt"),
        ("train/0.txt", "dev/0.txt", "test/train-like-not.txt"),
        ("train-00000-of-00001.txt", "val.txt", "test_0.txt"),
    ],
)
def test_file_and_folder_names_give_the_splits(tmp_path, names):
    for name, split in zip(names, corpora.SPLITS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {split}")
    for path in (str(tmp_path), f"{tmp_path}/**/*"):
        assert texts(open_corpus(DataConfig(path=path))) == {split: [f"text of {split}"] for split in corpora.SPLITS}


def test_named_splits_are_not_completed_but_for_validation(tmp_path):
    write_jsonl(tmp_path / "train.jsonl.gz", [{"text": f"train {index}"} for index in range(100)])
    write_jsonl(tmp_path / "valid.jsonl.gz", [{"text": "valid"}])
    assert open_corpus(DataConfig(path=str(tmp_path))).splits == ("train", "valid")
    (tmp_path / "valid.jsonl.gz").rename(tmp_path / "test.jsonl.gz")
    parts = texts(open_corpus(DataConfig(path=str(tmp_path))))
    assert parts["test"] == ["valid"] and len(parts["valid"]) == 5 and len(parts["train"]) == 95
    (tmp_path / "other.txt").write_text("which split?")
    with pytest.raises(UserError, match="'other.txt' names no split"):
        open_corpus(DataConfig(path=str(tmp_path)))


def test_text_is_kept_byte_for_byte(tmp_path):
    text = "  one\r\n\ttwo  \n\n\u2581 caf\u00e9 \U0001f600"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    write_jsonl(tmp_path / "c.jsonl", [{"body": text}, {"body": " \n"}])
    (tmp_path / "notes.jsonl.txt").write_bytes(text.encode())  # text, whatever it is about
    for name in ("a.txt", "b.txt.gz", "c.jsonl", "notes.jsonl.txt"):
        config = DataConfig(path=str(tmp_path / name), text_field="body", valid_fraction=0.0, test_fraction=0.0)
        assert texts(open_corpus(config)) == {"train": [text]}


def test_fingerprint_follows_contents_and_names_but_not_the_place(tmp_path):
    def fingerprint(folder, name, text):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        return open_corpus(DataConfig(path=str(tmp_path / folder))).fingerprint

    first = fingerprint("1", "a.txt", "text")
    assert fingerprint("2", "a.txt", "text") == first
    assert len({first, fingerprint("3", "a.txt", "texT"), fingerprint("4", "b.txt", "text")}) == 3


def test_count_words_counts_line_ends():
    assert count_words(" = Title = \n \n two words \n") == 3 + 2 + 3


GZIPPED = gzip.compress(np.random.default_rng(0).bytes(10_000).hex().encode())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff", r"a\.txt, line 2: not UTF-8 text \(byte 9\)"),
        ("a.txt", b"one\ntwo\0", r"a\.txt, line 2: holds a NUL character"),
        ("a.txt.gz", GZIPPED[:-100], r"a\.txt\.gz: damaged or truncated gzip"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz: damaged or truncated gzip"),
        ("a.jsonl.gz", GZIPPED[:50] + b"\xff\xff" + GZIPPED[52:], r"a\.jsonl\.gz"),
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


def test_too_few_documents_to_split(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("word " * 100 + str(index))
    with pytest.raises(UserError, match="3 documents leave nothing for data.valid_fraction=0.05"):
        texts(open_corpus(DataConfig(path=str(tmp_path))))
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(UserError, match="one document leave nothing for data.valid_fraction"):
        texts(open_corpus(DataConfig(path=str(tmp_path / "short.txt"))))


def test_tfds_dataset_is_read_without_tensorflow(tmp_path):
    program = """
import sys
import numpy as np
import tensorflow_datasets as tfds
from armd_jax.config import DataConfig
from armd_jax.errors import UserError
from armd_jax.data.corpora import open_corpus

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int32})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        return {"train": self._generate_examples("train", 700), "validation": self._generate_examples("held", 3)}
    def _generate_examples(self, name, count):
        for index in range(count):
            yield index, {"text": f"{name} caf\\u00e9 {index}", "id": index}

folder = sys.argv[1]
Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
found = []
for config in (DataConfig(path="tfds:tiny", tfds_data_dir=folder), DataConfig(path=f"tfds:{folder}/tiny/1.0.0")):
    corpus = open_corpus(config)
    assert corpus.splits == ("train", "valid"), corpus
    assert sorted(corpus.documents("train")) == sorted(f"train caf\\u00e9 {i}" for i in range(700))
    assert sorted(corpus.documents("valid")) == [f"held caf\\u00e9 {i}" for i in range(3)]
    found.append(corpus.fingerprint)
assert found[0] == found[1]
for path, field, message in (
    ("tfds:nothing_here", "text", "no dataset that can be read"),
    (f"tfds:{folder}", "text", "no dataset that can be read"),
    ("tfds:tiny", "body", "no field 'body'"),
    ("tfds:tiny", "id", "is not text"),
):
    try:
        list(open_corpus(DataConfig(path=path, tfds_data_dir=folder, text_field=field)).documents("train"))
        raise SystemExit(f"{path} was read")
    except UserError as error:
        assert message in str(error) and "\\n" not in str(error), error
assert "tensorflow" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_split_hash_is_sha256_of_the_text(tmp_path):
    """The rule is a promise: a held-out document stays held out in every later version."""
    documents = [f"{index:03d}" for index in range(100)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    parts = texts(open_corpus(DataConfig(path=str(tmp_path / "a.jsonl"), valid_fraction=0.1, test_fraction=0.1)))
    in_hash_order = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert parts["valid"] == sorted(in_hash_order[:10]) and parts["test"] == sorted(in_hash_order[10:20])

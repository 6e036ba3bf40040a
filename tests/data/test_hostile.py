"""Hostile data: damaged documents are counted or named with their line, and wrong prepared folders are refused."""

import dataclasses
import gzip
import json
import shutil

import numpy as np
import pytest

from armd_jax.cli import main as cli
from armd_jax.data import batching, loader, manifest, packing, tokenizers
from armd_jax.data.corpora import open_corpus
from armd_jax.data.reading import LeftOut
from armd_jax.data.sentencepiece_training import train_model
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

LENGTH = 32
GOOD = [f"a good document, number {index}, caf\u00e9\n" for index in range(40)]
DAMAGED = {
    "not UTF-8": b'{"text": "caf\xe9"}',
    "NUL": b'{"text": "a\\u0000b"}',
    "raw NUL": b'{"text": "a\0b"}',
    "half a character": b'{"text": "\\udc00"}',
    "no JSON": b'{"text": "cut',
    "too deep": b"[" * 100_000,
    "no field": b'{"body": "words"}',
    "no text": b'{"text": ["words"]}',
    "no object": b"3",
}
EMPTY = [b'{"text": ""}', b'{"text": " \\n\\t"}', b'{"text": "\\u3000"}']


def _lines(*extra: bytes) -> bytes:
    """The good documents with `extra` lines between them, the first as line 2."""
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    for place, line in enumerate(extra):
        lines.insert(1 + 2 * place, line)
    return b"\n".join(lines) + b"\n\n"


def _config(path, **fields) -> DataConfig:
    return DataConfig(path=str(path), tokenizer="bytes", valid_fraction=0.1, test_fraction=0.1, shard_rows=7, **fields)


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
def test_damaged_documents_are_left_out_and_counted(tmp_path, capsys, name):
    """With data.damaged=skip exactly the good documents remain. The manifest and `armd prepare` give both counts."""
    content = _lines(*DAMAGED.values(), *EMPTY)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    config = _config(tmp_path / name, damaged="skip")
    corpus = open_corpus(config)
    assert sorted(text for split in corpus.splits for text in corpus.documents(split)) == sorted(GOOD)
    (left_out,) = corpus.left_out().values()
    assert (left_out.empty, left_out.damaged) == (len(EMPTY), len(DAMAGED))
    assert f"{name}, line 2: not UTF-8" in left_out.first_damaged

    command = ["prepare", f"--source={tmp_path / name}", f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    assert cli.main([*command, "--length=32", "--skip-damaged"]) == 0
    out, err = capsys.readouterr()
    assert f"{len(EMPTY)} documents without text, {len(DAMAGED)} damaged" in out and "line 2: not UTF-8" in out
    assert f"train: {len(DAMAGED)} damaged documents left out" in err
    assert cli.main([*command, "--length=32", "--skip-damaged", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert LeftOut(**result["left_out"]["train"]) == left_out
    assert packing.open_prepared(tmp_path / "out").left_out == {"train": left_out}
    assert sum(split["documents"] for split in result["splits"].values()) == len(GOOD)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_document_is_an_error_by_default(tmp_path, kind):
    """By default a damaged document ends the preparation. The error has its file and line, and says how to go on."""
    (tmp_path / "text.jsonl").write_bytes(_lines(DAMAGED[kind]))
    with pytest.raises(UserError, match=r"text.jsonl, line 2: .*data\.damaged=skip") as error:
        packing.prepare(_config(tmp_path / "text.jsonl"), LENGTH, tmp_path / "cache", progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "cache").exists()


def test_empty_documents_are_always_left_out_and_counted(tmp_path):
    (tmp_path / "text.jsonl").write_bytes(_lines(*EMPTY))
    prepared = packing.prepare(_config(tmp_path / "text.jsonl"), LENGTH, tmp_path / "cache", progress=False)
    assert prepared.left_out == {"train": LeftOut(empty=3)}
    assert sum(prepared.counts(split).documents for split in prepared.splits) == len(GOOD)


def test_damaged_text_files_are_left_out_whole(tmp_path):
    """A text file is one document. If file names give the splits, every split has counts of its own."""
    for name, content in (
        ("train/0.txt", b"good " * 50),
        ("train/1.txt", b"fine\nfine\n\xff"),
        ("train/2.md", b"\0\1\2"),
        ("test/0.txt", b"good too " * 50),
        ("test/1.txt", b"\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    config = dataclasses.replace(_config(tmp_path, damaged="skip"), valid_fraction=0.0)
    prepared = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    assert prepared.left_out["train"].damaged == 2 and "1.txt, line 3" in prepared.left_out["train"].first_damaged
    assert prepared.left_out["test"] == LeftOut(empty=1)


def test_skipping_is_another_preparation(tmp_path):
    """Rows that were made without the damaged documents are not used for a config that calls these an error."""
    (tmp_path / "text.jsonl").write_bytes(_lines(DAMAGED["no JSON"]))
    config = _config(tmp_path / "text.jsonl", damaged="skip")
    prepared = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        packing.prepare(_config(tmp_path / "text.jsonl"), LENGTH, tmp_path / "cache", progress=False)
    with pytest.raises(UserError, match="split rule"):
        packing.open_prepared(prepared.folder, _config(tmp_path / "text.jsonl"))


def test_truncated_gzip_is_never_skipped(tmp_path):
    """A file that ends too early is an error even if damaged documents are skipped: the missing end is unknown."""
    rng = np.random.default_rng(0)
    content = b"".join(json.dumps({"text": rng.bytes(40).hex()}).encode() + b"\n" for _ in range(2000))
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(content)[:-1000])
    config = _config(tmp_path / "text.jsonl.gz", damaged="skip")
    with pytest.raises(UserError, match=r"text.jsonl.gz, after line 1\d\d\d: damaged or truncated gzip"):
        packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)


@pytest.mark.slow
def test_one_line_of_a_hundred_megabytes(tmp_path):
    """It is one whole document, and its words are counted without all of them in memory at once."""
    words = b"all work and no play " * 5_000_000
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + words + b'"}\n')
    config = dataclasses.replace(_config(tmp_path / "line.jsonl"), valid_fraction=0.0, test_fraction=0.0)
    (text,) = open_corpus(config).documents("train")
    assert len(text) == len(words) > 100e6 and text.encode() == words
    assert batching.count_words(text[: 3 << 20]) == len(text[: 3 << 20].split())


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", ["all work and no play " * 80_000, "deadbeef" * 300_000], ids=["words", "one word"])
def test_one_long_line_is_packed_whole(tmp_path, tokenizer, text):
    """Even if the text has no space where a cut would keep the ids, its rows decode to the same text."""
    (tmp_path / "line.txt").write_text(text)
    config = DataConfig(path=str(tmp_path / "line.txt"), tokenizer=tokenizer, vocab_size=300)
    config = dataclasses.replace(config, valid_fraction=0.0, test_fraction=0.0)
    prepared = packing.prepare(config, 1024, tmp_path / "cache", progress=False)
    counts, rows = prepared.counts("train"), prepared.rows("train")
    assert (counts.documents, counts.bytes, counts.words) == (1, len(text), len(text.split()))
    ids = np.concatenate([rows[index] for index in range(len(rows))])[: counts.tokens]
    assert prepared.tokenizer.decode(ids.tolist()) == text
    assert max(map(len, prepared.tokenizer.chunks(text))) <= tokenizers.LONGEST_CHUNK


def test_counting_words_in_parts_counts_the_same(monkeypatch):
    text = "one two\tthree\n\n\u3000four" + "x" * 100 + " \x1c five " * 30
    for size in (1, 2, 7, 50, 10_000):
        monkeypatch.setattr(batching, "WORDS_AT_ONCE", size)
        assert batching.count_words(text) == len(text.split()) + text.count("\n")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A prepared folder with several shards; tests copy it."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "text.jsonl").write_bytes(_lines())
    return packing.prepare(_config(folder / "text.jsonl"), LENGTH, folder / "cache", progress=False).folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "prepared")


def _flip(file, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("place", [0, 100, -1])
def test_flipped_byte_in_large_data_is_found_at_first_use(folder, monkeypatch, place):
    """If the data are too large to hash at every start, each shard is hashed before its first row is returned."""
    monkeypatch.setattr(packing, "HASHED_AT_ONCE", 0)
    _flip(folder / "train-00001.array_record", place)
    try:
        prepared = packing.open_prepared(folder)
    except UserError as error:  # the library itself noticed
        assert "train-00001.array_record: this shard is damaged" in str(error)
        return
    rows = prepared.rows("train")
    assert not prepared.hashed and rows[0].shape == (LENGTH,)
    with pytest.raises(UserError, match=r"train-00001.array_record: this shard is damaged or was changed"):
        rows[7]
    with (
        loader.train_batches(prepared, 64, seed=0) as batches,
        pytest.raises(UserError, match="train-00001.array_record"),
    ):
        next(batches)
    with pytest.raises(UserError, match="train-00001.array_record"):
        list(loader.eval_batches(prepared, "train", 16))


def test_shorter_or_longer_shard_is_found_at_once_however_large_the_data(folder, monkeypatch):
    monkeypatch.setattr(packing, "HASHED_AT_ONCE", 0)
    shard = folder / "train-00001.array_record"
    content = shard.read_bytes()
    for changed in (content[:-1], content + b"\0", b""):
        shard.write_bytes(changed)
        with pytest.raises(UserError, match="train-00001.array_record: this shard is damaged"):
            packing.open_prepared(folder)


def test_shard_damaged_while_it_is_in_use(folder):
    """If the library cannot read a record, the error names the file and is not the library's RuntimeError."""
    rows = packing.open_prepared(folder).rows("train")
    shard = folder / "train-00000.array_record"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(UserError, match="train-00000.array_record: this shard is damaged"):
        rows[0]


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "tokenizer/../../x", "train-0.array_record", "train-00000.array_record/..", ""]
    + ["..", "train-00000.array_record\n", "TRAIN-00000.array_record", 3, None, ["train-00000.array_record"]],
)
def test_names_in_a_manifest_cannot_leave_the_folder(folder, name):
    about = json.loads((folder / "manifest.json").read_text())
    about["splits"]["train"]["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"manifest.json: .*(is not the name of a shard|damaged manifest)"):
        packing.open_prepared(folder)


def test_links_in_a_prepared_folder_cannot_leave_it(folder, tmp_path):
    shard = folder / "train-00000.array_record"
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="train-00000.array_record: this shard is a link out of its folder"):
        packing.open_prepared(folder)
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be a link
    shard.unlink()
    (tmp_path / "outside").rename(shard)
    assert packing.open_prepared(tmp_path / "link").splits == ("train", "valid", "test")


def _places(node, path=()):
    """The path of every value in nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def test_no_value_in_a_manifest_is_trusted(folder):
    """If any value is wrong or missing, the folder is refused in one line, or its rows are the same all the same."""
    text = (folder / "manifest.json").read_text()
    expected = packing.open_prepared(folder).rows("train")[0].tolist()
    refused = accepted = 0
    for path in _places(json.loads(text)):
        for wrong in (None, -1, 0, 1 << 40, 1.5, True, "x", [], {}, [[]], {"x": 1}, "gone"):
            about = json.loads(text)
            node = about
            for key in path[:-1]:
                node = node[key]
            if wrong == "gone":
                del node[path[-1]]
            else:
                node[path[-1]] = wrong
            (folder / manifest.MANIFEST_FILE).write_text(json.dumps(about))
            try:
                prepared = packing.open_prepared(folder)
                assert prepared.rows("train")[0].tolist() == expected
                assert all(isinstance(counts, LeftOut) for counts in prepared.left_out.values())
                accepted += 1
            except UserError as error:
                assert str(error) and "\n" not in str(error)
                refused += 1
    assert refused > 5 * accepted > 0


def test_vocabulary_of_other_rows_is_refused(folder):
    """If the tokenizer beside the rows is exchanged for another one, that is an error."""
    model = train_model(["another text altogether"], 300)
    tokenizers.SentencePieceTokenizer(model).save(folder / "tokenizer")
    with pytest.raises(UserError, match="its tokenizer's kind is not that of manifest.json"):
        packing.open_prepared(folder)

"""Packing: rows hold the documents' tokens and nothing else; a prepared folder is whole, unchanged and fitting."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from armd_jax.cli import main as cli
from armd_jax.data import batching, building, packing, text_files, tokenizers
from armd_jax.data.corpora import open_corpus
from armd_jax.data.sentencepiece_training import train_model
from armd_jax.data.tokenizers import SentencePieceTokenizer
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

LENGTH = 32


@pytest.fixture
def config(tmp_path):
    """200 short documents with characters of one to four bytes, as bytes, in shards of 7 rows."""
    lines = (
        json.dumps({"text": f"document {index}\n caf\u00e9 \U0001f600 " + "x " * (index % 13)}) for index in range(200)
    )
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return DataConfig(path=str(tmp_path / "text.jsonl"), tokenizer="bytes", shard_rows=7)


def stream(prepared, split):
    """All tokens of the split without the padding."""
    rows = prepared.rows(split)
    return np.concatenate([rows[index] for index in range(len(rows))])[: prepared.counts(split).tokens].tolist()


@pytest.mark.parametrize("batch", [batching.BATCH_CHARACTERS, 100])
def test_rows_are_the_documents_each_followed_by_end_of_text(config, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(batching, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(tokenizers, "CHUNK", 16)
    prepared = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    corpus = open_corpus(config)
    assert prepared.splits == ("train", "valid", "test")
    for split in prepared.splits:
        documents = list(corpus.documents(split))
        assert stream(prepared, split) == [token for text in documents for token in [*text.encode(), 256]]
        counts = prepared.counts(split)
        num_bytes = sum(len(text.encode()) for text in documents)
        assert (counts.documents, counts.bytes) == (len(documents), num_bytes)
        assert counts.tokens == num_bytes + len(documents)
        assert counts.words == sum(len(text.split()) + 1 for text in documents)
        assert counts.rows == prepared.num_rows(split) == len(prepared.rows(split)) == -(-counts.tokens // LENGTH)
        last = prepared.rows(split)[counts.rows - 1]
        assert last.dtype == np.int32 and last.shape == (LENGTH,)
        assert (last[counts.tokens - LENGTH * counts.rows :] == 256).all()
    assert len(prepared.manifest.splits["train"].shards) > 5
    with pytest.raises(IndexError):
        prepared.rows("train")[prepared.num_rows("train")]
    with pytest.raises(UserError, match="no 'dev' split"):
        prepared.rows("dev")


def test_long_document_keeps_its_end_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "BATCH_CHARACTERS", 40)
    monkeypatch.setattr(tokenizers, "CHUNK", 16)
    text = "words and words\n" * 200
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(path=str(tmp_path / "a.txt"), vocab_size=300, valid_fraction=0.0, test_fraction=0.0)
    prepared = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    assert stream(prepared, "train") == [*prepared.tokenizer.encode(text), prepared.tokenizer.end_of_text]


def test_trained_tokenizer_has_seen_the_train_split_only(config, tmp_path):
    config = dataclasses.replace(config, tokenizer="sentencepiece", vocab_size=320)
    prepared = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    alone = SentencePieceTokenizer(train_model(open_corpus(config).documents("train"), 320))
    assert prepared.tokenizer.hash == alone.hash and prepared.tokenizer.lossless
    sample = prepared.manifest.tokenizer.sample  # all of it, without the line ends
    counts, lines = prepared.counts("train"), sum(text.count("\n") for text in open_corpus(config).documents("train"))
    assert (sample.every, sample.bytes, sample.largest) == (1, counts.bytes - lines, 1 << 24)
    about = json.loads((prepared.folder / "manifest.json").read_text())
    del about["tokenizer"]["sample"]  # as earlier versions wrote it
    (prepared.folder / "manifest.json").write_text(json.dumps(about))
    assert packing.prepare(config, LENGTH, tmp_path / "cache", progress=False).manifest.tokenizer.sample is None


def test_large_vocabularies_take_four_bytes(tmp_path):
    (tmp_path / "words").mkdir()
    words = ["[UNK]", "[SEP]", *(f"w{index}" for index in range(70_000))]
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "a.txt").write_text("w69999 w3 " * 50)
    config = DataConfig(
        path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "words"), valid_fraction=0.0, test_fraction=0.0
    )
    prepared = packing.prepare(config, 10, tmp_path / "cache", progress=False)
    assert prepared.manifest.dtype == "<u4" and prepared.rows("train")[0].tolist() == [70_001, 5] * 5


def test_second_call_loads_what_is_there_and_other_requests_get_other_folders(config, tmp_path, monkeypatch):
    first = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    others = [
        packing.prepare(config, 16, tmp_path / "cache", progress=False),
        packing.prepare(dataclasses.replace(config, test_fraction=0.1), LENGTH, tmp_path / "cache", progress=False),
        packing.prepare(
            dataclasses.replace(config, tokenizer="sentencepiece", vocab_size=300),
            LENGTH, tmp_path / "cache", progress=False,
        ),
    ]  # fmt: skip
    assert len({prepared.folder for prepared in [first, *others]}) == 4
    monkeypatch.setattr(packing, "large_folder", None)
    again = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    assert again.folder == first.folder and again.manifest == first.manifest


def _count_hashed(monkeypatch):
    """A list that every source file appears in whose content is read for its hash."""
    hashed, hash_file = [], text_files.hash_file
    monkeypatch.setattr(text_files, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    return hashed


@pytest.mark.parametrize("into", [False, True], ids=["cache", "out"])
def test_source_files_are_hashed_once(config, tmp_path, monkeypatch, into):
    """As long as size and modification time are as recorded, the content is not read again."""
    (tmp_path / "more").mkdir()
    shutil.copy(config.path, tmp_path / "more" / "a.jsonl")
    (tmp_path / "more" / "b.txt").write_text("one more document\n")
    config = dataclasses.replace(config, path=str(tmp_path / "more"))
    prepare = packing.prepare_into if into else packing.prepare
    hashed = _count_hashed(monkeypatch)
    first = prepare(config, LENGTH, tmp_path / "cache", progress=False)
    assert hashed == ["a.jsonl", "b.txt"]
    monkeypatch.chdir(tmp_path)
    for path in (config.path, "more", "./more/", "more/*"):
        again = prepare(dataclasses.replace(config, path=path), LENGTH, tmp_path / "cache", progress=False)
        assert again.folder == first.folder
    os.rename(tmp_path / "more", tmp_path / "moved")
    prepare(dataclasses.replace(config, path="moved"), LENGTH, tmp_path / "cache", progress=False)
    assert len(hashed) == 2
    os.utime(tmp_path / "moved" / "b.txt", ns=(0, 1))  # the same content: read again, and then found to be the same
    prepare(dataclasses.replace(config, path="moved"), LENGTH, tmp_path / "cache", progress=False)
    assert hashed[2:] == ["b.txt"]


def test_a_change_that_keeps_the_size_is_seen(config, tmp_path):
    """Another content has another time, so the rows of the old one are not taken."""
    first = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    text = (tmp_path / "text.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(text.replace("document", "DOCUMENT"))
    assert os.path.getsize(config.path) == first.manifest.source.files[0].bytes
    assert packing.prepare(config, LENGTH, tmp_path / "cache", progress=False).folder != first.folder


def test_rows_of_earlier_versions_are_taken(config, tmp_path, monkeypatch):
    """A manifest without the list of source files is compared by their content, as ever."""
    first = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    about = json.loads((first.folder / "manifest.json").read_text())
    assert about["source"].pop("files")
    (first.folder / "manifest.json").write_text(json.dumps(about))
    hashed = _count_hashed(monkeypatch)
    assert packing.prepare(config, LENGTH, tmp_path / "cache", progress=False).folder == first.folder
    assert hashed == ["text.jsonl"]


def test_a_prepared_folder_is_a_cache_of_itself(config, tmp_path):
    """If `data.cache_dir` is what `armd prepare --out` wrote, its rows are taken, or the error says why not."""
    made = packing.prepare_into(config, LENGTH, tmp_path / "prep", progress=False)
    before = sorted(path.name for path in made.folder.iterdir())
    assert packing.prepare(config, LENGTH, tmp_path / "prep", progress=False).folder == made.folder
    with pytest.raises(UserError, match="row length 32, but the config asks for 16"):
        packing.prepare(config, 16, tmp_path / "prep", progress=False)
    assert sorted(path.name for path in made.folder.iterdir()) == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "emptied", "replaced"])
def test_damaged_shard_is_found(config, tmp_path, damage):
    prepared = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    shard, other = (prepared.folder / f"train-0000{index}.array_record" for index in (1, 2))
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        shard.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    elif damage == "emptied":
        shard.write_bytes(b"")
    else:
        shard.write_bytes(other.read_bytes())
    message = r"train-00001.array_record: this shard is (missing|damaged)"
    with pytest.raises(UserError, match=message):
        packing.open_prepared(prepared.folder)
    with pytest.raises(UserError, match=message):
        packing.prepare(config, LENGTH, tmp_path / "cache")


def test_damaged_manifest_or_tokenizer_is_found(config, tmp_path):
    config = dataclasses.replace(config, tokenizer="sentencepiece", vocab_size=300)
    folder = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False).folder
    manifest = json.loads((folder / "manifest.json").read_text())

    def with_manifest(text, message):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            packing.open_prepared(folder)

    with_manifest("{", "damaged manifest")
    with_manifest(json.dumps(manifest | {"format": 99}), "format 99")
    with_manifest(json.dumps({"format": 2}), "damaged manifest: row_length is missing")
    changed = json.loads(json.dumps(manifest))
    changed["splits"]["train"]["tokens"] += 2 * LENGTH
    with_manifest(json.dumps(changed), "contradict")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    packing.open_prepared(folder)
    other = SentencePieceTokenizer(train_model(["another text altogether"], 300))
    other.save(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer's hash"):
        packing.open_prepared(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing"):
        packing.open_prepared(folder)


def test_config_that_does_not_fit_names_the_field(config, tmp_path):
    folder = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False).folder
    assert packing.open_prepared(folder, config, LENGTH).length == LENGTH
    (tmp_path / "other.jsonl").write_text((tmp_path / "text.jsonl").read_text().replace("document", "Document"))
    for changed, message in (
        ({"path": str(tmp_path / "other.jsonl")}, "another corpus than data.path"),
        ({"valid_fraction": 0.2}, "data.valid_fraction"),
        ({"tokenizer": "sentencepiece"}, "data.tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            packing.open_prepared(folder, dataclasses.replace(config, **changed))
    with pytest.raises(UserError, match="row length 32, but the config asks for 64"):
        packing.open_prepared(folder, length=64)
    (tmp_path / "text.jsonl").write_text((tmp_path / "other.jsonl").read_text())
    with pytest.raises(UserError, match="content has changed"):
        packing.open_prepared(folder, config)


def test_interrupted_preparation_leaves_nothing(config, tmp_path, monkeypatch):
    def stop_after_train(documents, *rest):
        packed.append(pack(documents, *rest))
        if len(packed) == 2:
            raise KeyboardInterrupt
        return packed[-1]

    pack, packed = packing._pack, []
    monkeypatch.setattr(packing, "_pack", stop_after_train)
    with pytest.raises(KeyboardInterrupt):
        packing.prepare(config, LENGTH, tmp_path / "work" / "cache", progress=False)
    assert not (tmp_path / "work").exists()
    monkeypatch.undo()
    assert packing.prepare(config, LENGTH, tmp_path / "work" / "cache", progress=False).splits[-1] == "test"


def test_what_a_killed_preparation_left_is_no_data(config, tmp_path):
    """It is not taken for prepared data, and the next preparation of the same removes what it cannot go on with."""
    program = (
        "import os, sys\n"
        "from armd_jax.data_config import DataConfig\n"
        "from armd_jax.data import packing\n"
        "from pathlib import Path\n"
        "packing.write_manifest = lambda *a: os._exit(9)  # killed when only the manifest is not written\n"
        "packing.prepare(DataConfig(**eval(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3]), progress=False)\n"
    )
    arguments = [repr(dataclasses.asdict(config)), str(LENGTH), str(tmp_path / "cache")]
    assert subprocess.run([sys.executable, "-c", program, *arguments]).returncode == 9
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".") and (left[0] / "test-00000.array_record").exists()
    with pytest.raises(UserError, match="no prepared data"):
        packing.open_prepared(left[0])
    busy = left[0].with_name(left[0].name[:-1] + "x")  # as if another process were writing it
    busy.mkdir()
    for folder in (*left, busy):
        os.utime(folder, (0, 0))
    with building.locked(busy):
        folder = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False).folder
    assert set((tmp_path / "cache").iterdir()) == {folder, busy}  # what the killed one left is gone


_KILLED = """
import os, signal, sys
from pathlib import Path
from armd_jax.data_config import DataConfig
from armd_jax.data import batching, encoding, packing, progress

batching.BATCH_CHARACTERS, after, real = 700, int(sys.argv[2]), progress.Progress.write
notes = []

def write(self, folder):
    real(self, folder)
    notes.append(self)
    if len(notes) == after:
        os.kill(os.getpid(), signal.SIGKILL)

progress.Progress.write = write
encoded = []
encode = encoding._encode
encoding._encode = lambda *a: (encoded.append(a[1]), encode(*a))[1]
config = DataConfig(path=sys.argv[1], tokenizer="sentencepiece", vocab_size=300, shard_rows=9)
packing.prepare(config, 16, Path(sys.argv[3]), progress=False)
print(len(encoded))
"""


@pytest.mark.slow
def test_a_killed_preparation_goes_on(corpus, tmp_path):
    """Killed after a note, again and again: the same folder in the end, and what was finished is not encoded again."""

    def run(after: int, cache: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", _KILLED, str(corpus), str(after), str(tmp_path / cache)]
        return subprocess.run(words, capture_output=True, text=True)

    def content(cache: str) -> dict[str, bytes]:
        files = (file for file in (tmp_path / cache).rglob("*") if file.is_file())
        return {file.relative_to(tmp_path / cache).as_posix(): file.read_bytes() for file in files}

    whole = run(-1, "whole")
    assert whole.returncode == 0, whole.stderr
    for kills in ([1], [4], [3, 2, 4, 5]):
        cache = f"killed{len(kills)}{kills[0]}"
        for after in kills:
            assert run(after, cache).returncode == -signal.SIGKILL
            assert len(list((tmp_path / cache).iterdir())) == 1
        done = run(-1, cache)
        assert done.returncode == 0, done.stderr
        assert content(cache) == content("whole")
        assert kills == [1] or int(done.stdout) < int(whole.stdout)
    # Of a shard that is no longer what was written, nothing is taken.
    assert run(4, "damaged").returncode == -signal.SIGKILL
    shard = next((tmp_path / "damaged").rglob("train-00000.array_record"))
    shard.write_bytes(shard.read_bytes()[::-1])
    done = run(-1, "damaged")
    assert done.stdout == whole.stdout and content("whole").items() <= content("damaged").items()


def test_process_that_comes_second_takes_the_winners_folder(config, tmp_path, monkeypatch):
    def write_late(*arguments):
        monkeypatch.undo()
        packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
        write(*arguments)

    write = packing._write
    monkeypatch.setattr(packing, "_write", write_late)
    prepared = packing.prepare(config, LENGTH, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == [prepared.folder]


def test_bad_corpora_and_places_leave_nothing(config, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "short.txt").write_text("too short for one row\n")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("enough text " * 50)
    (tmp_path / "splits" / "valid.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "%s"}\n{' % ("long enough " * 50))
    no_split = {"valid_fraction": 0.0, "test_fraction": 0.0}
    for changed, message in (
        ({"path": str(tmp_path / "missing")}, "no such file"),
        ({"path": str(tmp_path / "blank.txt")}, "no text for the train split"),
        ({"path": str(tmp_path / "short.txt")} | no_split, "23 training tokens are fewer than the 32 of one row"),
        ({"path": str(tmp_path / "splits")}, "no text for the valid split"),
        ({"path": str(tmp_path / "bad.jsonl")} | no_split, "line 2: not valid JSON"),
        ({"path": str(tmp_path / "blank.txt"), "tokenizer": "sentencepiece"}, "no text"),
        ({"tokenizer": str(tmp_path / "missing")}, "neither a kind"),
    ):
        for prepare in (packing.prepare, packing.prepare_into):
            with pytest.raises(UserError, match=message):
                prepare(dataclasses.replace(config, **changed), LENGTH, tmp_path / "new" / "cache", progress=False)
            assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="cannot write prepared data"):
        packing.prepare(config, LENGTH, tmp_path / "short.txt" / "cache", progress=False)


@pytest.mark.parametrize("size", [0, 300, 3000])
def test_a_full_disk_is_one_line_and_leaves_nothing(config, tmp_path, capsys, full_disk, size):
    """Wherever it gets full, in the tokenizer's files, in a shard or in the manifest: it is said, with exit code 1."""
    command = ["prepare", f"--source={config.path}", f"--out={tmp_path / 'new' / 'out'}", "--tokenizer=bytes"]
    with full_disk(size):
        assert cli.main([*command, "--length=32"]) == 1
    assert not (tmp_path / "new").exists()
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    errors = [line for line in shown if "error" in line]
    assert len(errors) == 1 and shown[-1] == errors[0] and errors[0].startswith(f"error: {tmp_path / 'new' / 'out'}: ")
    assert "File too large" in errors[0] and "free some space" in errors[0]
    assert cli.main([*command, "--length=32"]) == 0


def test_prepare_into_a_folder(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepared = packing.prepare_into(config, LENGTH, out, progress=False)
    assert prepared.folder == out and stream(prepared, "test")
    assert packing.prepare_into(config, LENGTH, out, progress=False).manifest == prepared.manifest
    with pytest.raises(UserError, match="row length"):
        packing.prepare_into(config, 64, out, progress=False)
    for place in (tmp_path, tmp_path / "text.jsonl"):
        with pytest.raises(UserError, match="holds no prepared data|is a file"):
            packing.prepare_into(config, LENGTH, place, progress=False)


def test_count_words_counts_line_ends():
    assert batching.count_words(" = Title = \n \n two words \n") == 3 + 2 + 3


def test_progress_goes_to_stderr(config, tmp_path, capfd):
    packing.prepare(config, LENGTH, tmp_path / "cache")
    out, err = capfd.readouterr()
    assert "preparing train" in err and out == ""


def test_the_bar_knows_how_much_there_is(tmp_path):
    """To the byte if the documents are divided; if not, the size of the files, unless they are compressed."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("a line \u00e9\n" * 40)
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": "x" * size}) for size in range(1, 99)))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.jsonl").read_bytes()))
    corpora = {name: open_corpus(DataConfig(path=str(tmp_path / name))) for name in ("lines.jsonl", "lines.jsonl.gz")}
    for corpus in corpora.values():
        texts = {split: list(corpus.documents(split)) for split in corpus.splits}
        assert all(corpus.size(split) == sum(map(len, found)) for split, found in texts.items())
    named = open_corpus(DataConfig(path=str(tmp_path / "*.txt")))
    assert named.splits == ("train", "valid") and named.size("valid") == 40 * 10
    whole = {"valid_fraction": 0.0, "test_fraction": 0.0}
    sizes = [open_corpus(DataConfig(path=str(tmp_path / name), **whole)).size("train") for name in corpora]
    assert sizes == [(tmp_path / "lines.jsonl").stat().st_size, None]

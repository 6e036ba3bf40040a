"""Parts that any machines make are, together, what one process writes; what is missing, damaged or foreign is found."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest

from armd_jax.cli import main as cli
from armd_jax.data import batching, embedded, encoding, merging, packing, parts, text_files, tokenizers
from armd_jax.data.corpora import open_corpus
from armd_jax.data.reading import Piece, SourceFile
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

LENGTH = 16
WORDS = ["the", "a", "river", "stone", "light", "moves", "under", "over", "slowly", "caf\u00e9", "\U0001f600"]
COUNTS = (1, 2, 3, 7)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _texts(rng: random.Random, count: int, words: int = 40) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(count)]


def _write_lines(file: pathlib.Path, texts: list[str], damage: bool = False) -> None:
    lines = [json.dumps({"text": text}) for text in texts]
    if damage:  # documents that are left out, of both kinds
        lines[len(lines) // 2 :: 7] = ["{"] * len(lines[len(lines) // 2 :: 7])
        lines[::9] = [json.dumps({"text": " "})] * len(lines[::9])
    file.write_text("\n".join(lines))


@pytest.fixture
def sources(tmp_path):
    """Text by a name: many files of several sizes, one file, one document, that one among empty files, named splits."""
    rng, text = random.Random(0), tmp_path / "text"
    for name in ("files", "among", "named"):
        (text / name).mkdir(parents=True)
    for number in range(7):
        _write_lines(text / "files" / f"{number}.jsonl", _texts(rng, rng.randint(5, 60)), damage=True)
    (text / "files" / "whole.txt").write_text(" ".join(_texts(rng, 9)))
    _write_lines(text / "lines.jsonl", _texts(rng, 150), damage=True)
    (text / "document.txt").write_text("\n".join(_texts(rng, 300, 9)))
    (text / "among" / "a.txt").write_text(" \n")
    shutil.copy(text / "document.txt", text / "among" / "b.txt")
    _write_lines(text / "among" / "c.jsonl", _texts(rng, 9), damage=True)
    (text / "among" / "c.jsonl").write_text("{\n")
    for name in ("train-0", "train-1", "valid"):
        _write_lines(text / "named" / f"{name}.jsonl", _texts(rng, 40))
    return text


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few documents, or of a part of one."""
    monkeypatch.setattr(batching, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(tokenizers, "CHUNK", 16)
    monkeypatch.setattr(merging, "_AT_ONCE", 700)


def _config(path, **more) -> DataConfig:
    return DataConfig(path=str(path), **{"tokenizer": "bytes", "damaged": "skip", "shard_rows": 11} | more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["files", "lines.jsonl", "document.txt", "among", "named"])
def test_any_number_of_parts_makes_the_same(sources, tmp_path, small, name):
    """Every file of the folder, to the last byte, in whichever sequence the parts are made."""
    config = _config(sources / name)
    whole = packing.prepare_into(config, LENGTH, tmp_path / "whole", progress=False)
    assert len(list(whole.folder.glob("train-*"))) > 2
    for count in (1, 2, 3, 7):
        work = parts.Work(config, tmp_path / f"{count}", count)
        notes = [parts.prepare_part(work, number, shown=False) for number in reversed(range(count))]
        assert name in ("among", "files") or all(note.tokens for note in notes)
        merging.merge(work, LENGTH, shown=False)
        assert content(work.out) == content(whole.folder)


def test_parts_of_a_source_without_files(tmp_path, small, monkeypatch):
    """As the embedded corpus, which is shortened here, and TFDS."""
    documents = tuple(_texts(random.Random(1), 80))
    monkeypatch.setattr(embedded, "embedded_documents", lambda: documents)
    work = parts.Work(_config(""), tmp_path / "out", 2)
    whole = packing.prepare_into(work.config, LENGTH, tmp_path / "whole", progress=False)
    assert all(parts.prepare_part(work, number, shown=False).documents > 20 for number in range(2))
    assert content(merging.merge(work, LENGTH, shown=False).folder) == content(whole.folder)


@pytest.mark.slow
def test_another_tokenizer_and_no_held_out_splits(sources, tmp_path, small):
    """Tokens of several bytes, from a vocabulary that a prepared sample brings, and processes in each part."""
    sample = packing.prepare_into(_config(sources / "lines.jsonl", tokenizer="sentencepiece", vocab_size=300),
                                  LENGTH, tmp_path / "sample", progress=False)  # fmt: skip
    config = _config(sources / "files", tokenizer=str(sample.folder), valid_fraction=0.0, test_fraction=0.0)
    whole = packing.prepare_into(config, LENGTH, tmp_path / "whole", progress=False)
    work = parts.Work(config, tmp_path / "out", 2)
    for number in range(2):
        parts.prepare_part(work, number, workers=2 if number else 1, shown=False)
    assert content(merging.merge(work, LENGTH, shown=False).folder) == content(whole.folder)


def test_a_part_neither_reads_nor_tokenizes_what_is_not_its_own(sources, tmp_path, small, monkeypatch):
    """Of many files, each is opened by one part, and every document is tokenized once. Merging reads no text."""
    hashed, opened, tokenized = [], [], []
    hash_file, read, encode = parts.hash_file, text_files._read_files, encoding._encode
    monkeypatch.setattr(text_files, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    monkeypatch.setattr(text_files, "_read_files", lambda files, field: opened.append(files) or read(files, field))
    monkeypatch.setattr(encoding, "_encode", lambda *args: tokenized.extend(args[1]) or encode(*args))
    for path in (sources / "files" / "*.jsonl", sources / "lines.jsonl", sources / "document.txt"):
        tokenized.clear()
        config, count = _config(path), 3
        work = parts.Work(config, tmp_path / path.name.replace("*", "all"), count)
        for number in range(count):
            opened.clear()
            note = parts.prepare_part(work, number, shown=False)
            assert {file.path.name for files in opened for file in files} == {file.name for file in note.files}
            assert path.parent.name != "files" or len(note.files) < 7
        every = [text for text, _ in tokenized]
        documents = [text for split in open_corpus(config).splits for text in open_corpus(config).documents(split)]
        assert sorted("".join(every)) == sorted("".join(documents))
        tokenized.clear(), opened.clear(), hashed.clear()
        merging.merge(work, LENGTH, shown=False)
        assert not (tokenized or opened or hashed)


def test_owners_of_files():
    """Files go whole to the part in whose share their middle lies; a large one is dealt out, and so is what is none."""

    def owners(*sizes, count):
        pieces = [Piece(lambda: (), file=SourceFile("x", size, 0, "")) for size in sizes]
        return parts.owners(pieces, count)

    assert owners(5, 5, 5, 5, count=2) == [0, 0, 1, 1]
    assert owners(5, 6, 5, 4, count=4) == [0, 1, 2, 3]
    assert owners(1, 1, 90, 1, count=3) == [0, 0, None, 2]
    assert owners(7, count=1) == [0] and owners(7, count=2) == [None]
    assert owners(0, 0, count=3) == [0, 0]
    assert parts.owners([Piece(lambda: ())], 1) == [None]


@pytest.fixture
def work(sources, tmp_path, small):
    """Three parts of lines.jsonl that are made."""
    work = parts.Work(_config(sources / "lines.jsonl"), tmp_path / "out", 3)
    for number in range(3):
        parts.prepare_part(work, number, shown=False)
    return work


def test_a_finished_part_is_not_made_again(work, monkeypatch):
    before = content(pathlib.Path(work.folder))
    monkeypatch.setattr(parts, "large_folder", None)
    assert parts.prepare_part(work, 1, shown=False).documents
    assert content(pathlib.Path(work.folder)) == before


def test_two_processes_on_one_part_do_no_harm(sources, tmp_path, monkeypatch):
    """The one that is second takes what the first has made."""

    def write_late(self, identity):
        monkeypatch.undo()
        parts.prepare_part(work, 0, shown=False)
        return write(self, identity)

    work, write = parts.Work(_config(sources / "lines.jsonl"), tmp_path / "out", 1), parts._Writer.write
    monkeypatch.setattr(parts._Writer, "write", write_late)
    parts.prepare_part(work, 0, shown=False)
    assert [file.name for file in pathlib.Path(work.folder).iterdir()] == ["00000-of-00001"]


@pytest.mark.parametrize("damage", ["tokens", "records", "missing", "note", "digit"])
def test_a_damaged_part_is_found(work, damage):
    folder = work.part(1)
    file = folder / {"tokens": "train.tokens", "records": "train.records", "missing": "train.tokens"}.get(
        damage, "part.json"
    )
    changed = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "note":
        file.write_bytes(changed[:-9])
    elif damage == "digit":  # a note that can be read and says something else
        file.write_bytes(changed.replace(b'"empty": ', b'"empty": 1'))
    else:
        file.write_bytes(changed[:9] + bytes([changed[9] ^ 1]) + changed[10:])
    for step in (lambda: merging.merge(work, LENGTH, shown=False), lambda: parts.prepare_part(work, 1, shown=False)):
        with pytest.raises(UserError, match=f"{folder}.*remove this folder and make the part again"):
            step()
    assert not work.out.exists()
    shutil.rmtree(folder)
    parts.prepare_part(work, 1, shown=False)
    merging.merge(work, LENGTH, shown=False)


def test_foreign_and_missing_parts_are_named(work, sources, tmp_path):
    with pytest.raises(UserError, match="a part of another work"):
        merging.merge(parts.Work(_config(sources / "document.txt"), work.out, 3), LENGTH)
    with pytest.raises(UserError, match="a part of another work"):
        parts.prepare_part(parts.Work(_config(sources / "lines.jsonl", valid_fraction=0.1), work.out, 3), 0)
    shutil.copytree(work.part(0), work.part(0).with_name("other"))
    shutil.rmtree(work.part(2))
    shutil.copytree(work.part(0), work.part(2))
    with pytest.raises(UserError, match="00002-of-00003: a part of another work"):
        merging.merge(work, LENGTH)
    shutil.rmtree(work.part(2))
    with pytest.raises(UserError, match="1 of 3 parts missing: 2; make them, with --shard=2/3"):
        merging.merge(work, LENGTH)
    with pytest.raises(UserError, match="5 of 5 parts missing: 0, 1, 2, 3, 4;"):
        merging.merge(parts.Work(work.config, work.out, 5), LENGTH)
    assert not work.out.exists()


def test_text_that_changed_between_parts_is_found(work, sources):
    """With the same size, which only the content tells, or with another."""
    file = sources / "lines.jsonl"
    text = file.read_text()
    shutil.rmtree(work.part(2))
    file.write_text(text.replace("river", "RIVER"))
    parts.prepare_part(work, 2, shown=False)
    with pytest.raises(UserError, match="00000-of-00003: made from other content of lines.jsonl"):
        merging.merge(work, LENGTH)
    file.write_text(text + "\n")
    with pytest.raises(UserError, match="a part of another work"):
        merging.merge(work, LENGTH)


_KILLED = """
import os, signal, sys
from pathlib import Path
from armd_jax.cli import main
from armd_jax.data import batching, encoding, merging, progress
merging._AT_ONCE = 700
batching.BATCH_CHARACTERS = 500
after, calls = int(sys.argv[1]), []
def counted(function):
    def call(*args):
        calls.append(args)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
encoding._encode = counted(encoding._encode)
progress.Progress.write = counted(progress.Progress.write)
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_parts_and_a_killed_merge(sources, tmp_path, small, capsys):
    """By the command line: the same command once more, and in the end the folder of one process."""
    words = ["prepare", f"--source={sources / 'lines.jsonl'}", "--tokenizer=bytes", f"--length={LENGTH}", "--workers=1"]
    words += ["--skip-damaged", "--json"]
    out = f"--out={tmp_path / 'out'}"

    def killed(after: int, *more: str) -> bool:
        command = [sys.executable, "-c", _KILLED, str(after), *words, *more]
        return subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL

    def run(*more: str) -> dict:
        assert cli.main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    whole = run(f"--out={tmp_path / 'whole'}")
    assert killed(4, out, "--shard=0/2") and not (tmp_path / "out.parts" / "00000-of-00002").exists()
    for number in range(2):
        assert run(out, f"--shard={number}/2")["part"].endswith(f"0000{number}-of-00002")
    assert killed(2, out, "--merge=2") and not (tmp_path / "out").exists()
    merged = run(out, "--merge=2")
    assert content(tmp_path / "out") == content(tmp_path / "whole") and merged["splits"] == whole["splits"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.parts", "text", "whole"]
    shutil.rmtree(tmp_path / "out.parts")
    assert run(out, "--merge=2") == merged  # it is there


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard=2/2"], "--shard: '2/2': expected i/n with i from 0 to n - 1"),
        (["--shard=1"], "--shard: '1': expected i/n"),
        (["--shard=0/2", "--merge=2"], "--shard and --merge: only one of them"),
        (["--merge=0"], "--merge: 0 parts; there may be 1 to 99,999"),
        (["--shard=7/100000"], "--shard: 100000 parts; there may be"),
        (["--beam-flag=--runner=DirectRunner"], "--beam-flag: needs --beam=n"),
        (["--shard=0/2", "--tokenizer=sentencepiece"], "train it on a sample with armd prepare --source=SAMPLE"),
        (["--merge=2"], "2 of 2 parts missing: 0, 1; make them, with --shard=0/2"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, message):
    assert cli.main(["prepare", f"--out={tmp_path / 'out'}", "--tokenizer=bytes", *words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_part(sources, tmp_path, full_disk):
    work = parts.Work(_config(sources / "lines.jsonl"), tmp_path / "new" / "out", 2)
    with full_disk(300), pytest.raises(OSError, match="File too large"):
        parts.prepare_part(work, 0, shown=False)
    assert not (tmp_path / "new").exists()
    assert os.listdir(tmp_path) == ["text"]

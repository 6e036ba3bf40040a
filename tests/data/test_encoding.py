"""Several processes tokenize as one does: the same files, one line for what goes wrong, and nothing left behind."""

import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from armd_jax.cli import main as cli
from armd_jax.data import batching, encoding, packing, tokenizers
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError

pytestmark = pytest.mark.slow


def _content(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_any_number_of_workers_writes_the_same(tmp_path, monkeypatch, corpus, tokenizer):
    """Every file, to the last byte, with batches of a few documents and of parts of one."""
    monkeypatch.setattr(batching, "BATCH_CHARACTERS", 500)
    config = DataConfig(path=str(corpus), tokenizer=tokenizer, vocab_size=300, shard_rows=40)
    folders = [
        packing.prepare_into(config, 16, tmp_path / f"{workers}", progress=False, workers=workers).folder
        for workers in (1, 2, 3)
    ]
    assert len(list(folders[0].glob("train-*"))) > 3
    assert _content(folders[0]) == _content(folders[1]) == _content(folders[2])
    assert not multiprocessing.active_children()


def test_results_keep_the_sequence_of_batches(tmp_path):
    """Also if some take much longer than others, and few batches are read ahead."""
    tokenizer = tokenizers.BytesTokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    texts = ["a" * (1 if number % 3 else 300_000) + f"{number}" for number in range(24)]
    read = []

    def batches() -> Iterator[encoding.Batch]:
        for text in texts:
            read.append(text)
            yield [(text, False), (text[-1:], True)]

    found = encoding.encode_all(batches(), tokenizer, tmp_path / "tokenizer", np.dtype("<u2"), 2)
    for number, (ids, text) in enumerate(zip(found, texts, strict=True)):
        assert bytes(ids[:-1].astype(np.uint8)).decode() == text + text[-1:] and ids[-1] == tokenizer.end_of_text
        assert len(read) <= number + 6


def test_a_worker_that_is_killed_is_one_line(tmp_path, monkeypatch, corpus):
    """The folder that was being written is gone, as after any other error."""
    monkeypatch.setattr(batching, "BATCH_CHARACTERS", 500)

    def batches(*args: object) -> Iterator[encoding.Batch]:
        for number in range(50):
            if number == 20:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            yield [("one text", True)]

    monkeypatch.setattr(batching, "batches", batches)
    config = DataConfig(path=str(corpus), tokenizer="bytes")
    with pytest.raises(UserError, match="one of 2 processes that tokenize was ended from outside"):
        packing.prepare_into(config, 16, tmp_path / "out", progress=False, workers=2)
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()


def _children(process: int) -> list[int]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def _lives(process: int) -> bool:
    state = pathlib.Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_workers_end_with_a_killed_parent(tmp_path):
    """Nobody else would end them."""
    text = "".join(json.dumps({"text": f"the old river {number} " * 40}) + "\n" for number in range(30_000))
    (tmp_path / "text.jsonl").write_text(text)
    words = ["prepare", f"--source={tmp_path / 'text.jsonl'}", f"--out={tmp_path / 'out'}", "--tokenizer=bytes"]
    parent = subprocess.Popen([sys.executable, "-m", "armd_jax", *words, "--workers=3"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(children := _children(parent.pid)) < 4 and time.monotonic() < until:  # one of them tracks resources
        time.sleep(0.05)
    assert len(children) == 4 and parent.poll() is None
    parent.kill()
    parent.wait()
    while any(map(_lives, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(_lives, children))


def test_no_workers_are_a_mistake(tmp_path, capsys):
    """One line, before anything is read."""
    assert cli.main(["prepare", f"--out={tmp_path / 'out'}", "--workers=0"]) == 2
    assert capsys.readouterr().err == "error: --workers=0: must be at least 1\n"

"""Nobody listens: a reader that went away, a lost or missing stream, a full log. No verb's work depends on it."""

import errno
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from armd_jax import streams
from armd_jax.cli import main as cli

pytestmark = pytest.mark.usefixtures("quick_compilation")

FULL = pathlib.Path("/dev/full")  # every write to it fails as on a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def _unread() -> TextIO:
    """A pipe whose reader went away."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.fixture
def unread() -> Iterator[TextIO]:
    stream = _unread()
    yield stream
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())  # closing writes what is still buffered
    stream.close()


def test_what_cannot_be_written_is_dropped(tmp_path, unread):
    """A pipe without a reader, a closed file: nothing is raised, and the reason is kept. What can be written is."""
    for stream, kind in ((unread, BrokenPipeError), (open(tmp_path / "closed", "w"), ValueError)):  # noqa: SIM115
        forgiving = streams.Forgiving(stream)
        if stream is not unread:
            stream.close()
        for _ in range(2):
            assert forgiving.write("text\n") == 5
            forgiving.flush()
        assert isinstance(forgiving.fault, kind)
        forgiving.let_go()
    with open(tmp_path / "log", "w") as file:
        forgiving = streams.Forgiving(file)
        print("text", file=forgiving, flush=True)
        assert (tmp_path / "log").read_text() == "text\n" and forgiving.fault is None
        assert forgiving.fileno() == file.fileno() and not forgiving.isatty()


def test_a_missing_stream_takes_everything():
    """Python's standard streams are None in a process that was started without them."""
    forgiving = streams.Forgiving(None)
    print("text", file=forgiving, flush=True)
    assert forgiving.fault is None and not forgiving.isatty()


def test_text_that_the_encoding_lacks_is_not_dropped():
    """That is no lost reader, and to lose the text silently would be wrong."""
    forgiving = streams.Forgiving(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        forgiving.write("\u00e9")
    assert forgiving.fault is None


@needs_full
def test_a_full_log_is_tried_again(tmp_path):
    """What a full disk did not take is written as soon as there is space."""
    with open(FULL, "w") as log:
        forgiving = streams.Forgiving(log)
        forgiving.write("first\n")
        forgiving.flush()
        assert isinstance(forgiving.fault, OSError) and forgiving.fault.errno == errno.ENOSPC
        with open(tmp_path / "log", "w") as freed:
            os.dup2(freed.fileno(), log.fileno())
        forgiving.write("second\n")
        forgiving.flush()
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


_OPENS_A_FILE = """
import os, sys
from armd_jax import streams
with streams.forgiving():
    with open(sys.argv[1], "wb") as file:
        for number in range(3):
            os.write(number, b"what a library prints without Python")
        print("error", file=sys.stderr, flush=True)
        file.write(b"content")
"""


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """With 0, 1 and 2 closed, what libraries print there does not end up in the next file that is opened."""
    root = pathlib.Path(__file__).resolve().parent.parent
    command = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "-c", command, sys.executable, _OPENS_A_FILE, tmp_path / "file"], env=environment)
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b"content"


# --- verbs ----------------------------------------------------------------------------------------------------------


def _commands(done: pathlib.Path, smoke_config: str, corpus: pathlib.Path, place: pathlib.Path) -> dict[str, list[str]]:
    """A command of each verb that prints something, on a copy of a run that is complete."""
    run = shutil.copytree(done, place / "run")
    return {
        "prepare": [f"--source={corpus}", f"--out={place / 'prepared'}", "--tokenizer=bytes", "--length=64"],
        "train": [f"--config={smoke_config}", f"--workdir={run}", f"--config.data.path={corpus}"],
        "eval": [f"--run={run}", "--streams=2", "--draws=0"],
        "sample": [f"--run={run}", "--length=8"],
        "checkpoints": [f"--run={run}"],
        "export": [f"--run={run}", f"--out={place / 'export'}"],
        "report": [f"--run={run}"],
    }


VERBS = ("prepare", "train", "eval", "sample", "checkpoints", "export", "report")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_works_if_nobody_reads_its_progress(
    tmp_path, monkeypatch, capsys, smoke_run, smoke_config, corpus, verb
):
    """With the reader of standard error gone, the exit code is 0 and the result is printed as ever."""
    argv = _commands(smoke_run, smoke_config, corpus, tmp_path)[verb]
    monkeypatch.setattr(sys, "stderr", _unread())
    assert cli.main([verb, *argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("verb", ["prepare", "train", "checkpoints"])
def test_a_result_that_nobody_reads(tmp_path, monkeypatch, capsys, smoke_run, smoke_config, corpus, verb):
    """The exit code is 1 without a word, as `| head` needs none, but 0 if what counts is the run's folder."""
    argv = _commands(smoke_run, smoke_config, corpus, tmp_path)[verb]
    monkeypatch.setattr(sys, "stdout", _unread())
    assert cli.main([verb, *argv]) == (0 if verb == "train" else 1)
    assert "error" not in capsys.readouterr().err


@needs_full
def test_a_result_that_a_full_disk_does_not_take(monkeypatch, capsys, smoke_run):
    """`armd checkpoints > FILE` on a full disk does not pass for a success."""
    with monkeypatch.context() as patched, open(FULL, "w") as full:
        patched.setattr(sys, "stdout", full)
        assert cli.main(["checkpoints", f"--run={smoke_run}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: standard output: ") and "No space left" in line


@pytest.mark.slow
@pytest.mark.parametrize("how", ["2>&-", ">&- 2> >(head -c 300 >LOG)"], ids=["closed", "a reader that goes away"])
def test_training_needs_no_listener(tmp_path, smoke_config, corpus, how):
    """As a process of its own, it trains to its end and saves, and the exit code is 0."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "armd_jax", "train", f"--config={smoke_config}", f"--workdir={run}"]
    command += [f"--config.data.path={corpus}", "--config.training.num_steps=6", "--config.order.sbp_steps=0"]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "LOG": str(log)}
    script = f'exec "$@" {how.replace("LOG", chr(34) + "$LOG" + chr(34))}'
    done = subprocess.run(["bash", "-c", script, "train", *command], env=environment, timeout=150)
    assert done.returncode == 0
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert (run / "checkpoints" / "6").is_dir()
    assert not log.exists() or log.stat().st_size == 300

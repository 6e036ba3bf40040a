"""Reading a run needs no right to write into it, and no result is lost because it cannot be kept."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from armd_jax import files
from armd_jax.cli import main as cli
from armd_jax.cli.arguments import show_and_keep

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = ["sample", "--length=8", "--json"]
EVAL = ["eval", "--draws=0", "--streams=2", "--json"]

# Runs command lines one after the other; each prints its results, and then its exit code as a line of its own.
_PROGRAM = """
import json, sys
from armd_jax.cli import main as cli
for argv in json.loads(sys.argv[1]):
    print(cli.main(argv), flush=True)
"""
_READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


def _can_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _can_mount(), reason="this machine gives nobody a mount of their own (unshare -rm)")
def test_every_reading_verb_works_on_a_read_only_mount(tmp_path, smoke_run):
    """All of them print their results; what cannot be kept is named, and `--out` keeps it."""
    run, other, out = tmp_path / "run", tmp_path / "other.txt", tmp_path / "out"
    shutil.copytree(smoke_run, run)
    other.write_text("A river runs past an old stone.\n" * 200)
    lines = [
        [*SAMPLE, f"--run={run}"],
        [*SAMPLE, f"--run={run}", f"--out={out}"],
        [*EVAL, f"--run={run}"],
        [*EVAL, f"--run={run}", f"--data={other}"],  # its rows have to be prepared somewhere
        ["export", f"--run={run}", f"--out={tmp_path / 'export'}", "--json"],
        ["checkpoints", f"--run={run}", "--json"],
        ["report", f"--run={run}", f"--out={out}", "--json"],
    ]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", _READ_ONLY, "sh", str(run)]
        + [sys.executable, "-c", _PROGRAM, json.dumps([*lines, ["report", f"--run={run}"]])],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *results, last = done.stdout.splitlines()
    assert results[1::2] == ["0"] * len(lines) and last == "2", done.stdout + done.stderr
    sample, again, scores, others, *_ = (json.loads(line) for line in results[::2])
    assert sample["samples"][0]["tokens"] == again["samples"][0]["tokens"]
    assert json.loads((out / "samples.json").read_text())["samples"][0]["tokens"] == again["samples"][0]["tokens"]
    assert scores["left_to_right"]["bits_per_byte"] < others["left_to_right"]["bits_per_byte"]
    assert (out / "report.html").exists() and (tmp_path / "export" / "model.safetensors").exists()
    kept = [line for line in done.stderr.splitlines() if "was not written" in line]
    assert [line.partition(" ")[0] for line in kept] == [str(run / "samples.json"), str(run / "eval.json")]
    assert all("(Read-only file system); --out=FOLDER" in line for line in kept)
    assert "error: " + str(run) in done.stderr.splitlines()[-1] and "--out=FOLDER" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_samples_are_printed_although_they_cannot_be_kept(tmp_path, capsys, smoke_run):
    """They are on stdout, one line on stderr says what was not written and why, and the exit code is 0."""
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run, ignore=shutil.ignore_patterns("samples.json"))
    (run / "samples.json").mkdir()  # a folder is in the way, which stops even the superuser
    capsys.readouterr()
    assert cli.main([*SAMPLE, f"--run={run}"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["samples"][0]["tokens"]) == 8
    last = err.splitlines()[-1]
    assert last.startswith(f"{run / 'samples.json'} was not written (") and last.endswith("keeps it elsewhere")
    assert not [path for path in run.iterdir() if path.name.startswith(".samples")]


def _arguments(out: pathlib.Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(json=True, out=out)


def test_results_are_kept_if_their_reader_goes_away(tmp_path, monkeypatch):
    """`armd sample | true`: what nobody read is still written."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as stdout:  # closing it flushes it once more
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError):
            show_and_keep(_arguments(), {"bits": 1.5}, "1.5", tmp_path, "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text()) == {"bits": 1.5}


def test_a_folder_that_was_asked_for_is_made_and_has_to_take_the_file(tmp_path, capsys):
    """`--out` takes the place of the run; if it cannot be written in the end, that is an error, after the printing."""
    out, run = tmp_path / "made" / "here", tmp_path / "run"
    assert show_and_keep(_arguments(out), {"bits": 1.5}, "1.5", run, "eval.json") == 0
    assert json.loads((out / "eval.json").read_text()) == {"bits": 1.5} and not run.exists()
    capsys.readouterr()
    with pytest.raises(OSError):
        show_and_keep(_arguments(out / "eval.json"), {"bits": 2.5}, "2.5", run, "eval.json")
    assert json.loads(capsys.readouterr().out) == {"bits": 2.5}


@pytest.mark.parametrize("folder", ["new", "new/deeper", "."])
def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path, monkeypatch, folder):
    """A folder that could be made counts as writable, and is not made."""
    monkeypatch.chdir(tmp_path)
    assert files.unwritable(pathlib.Path(folder)) == "" and not list(tmp_path.iterdir())

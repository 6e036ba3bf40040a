"""The folder of a sweep: one sweep at a time, what has been done, and files that are not what they should be."""

import pathlib
import subprocess
import sys
import time

import pytest

from armd_jax.errors import UserError
from armd_jax.studies import record
from armd_jax.studies.record import Done, Folder


def test_a_second_sweep_is_refused(tmp_path):
    """While one holds the folder, another is told who; afterwards it is free."""
    folder, told = Folder(tmp_path / "out"), []
    reason = r"a sweep is running in it \(process \d+ on .*\)"
    with record.held(folder, told.append), pytest.raises(UserError, match=reason), record.held(folder, told.append):
        pass
    with record.held(folder, told.append):
        pass
    assert not told


def test_processes_of_a_dead_sweep_are_waited_for(tmp_path):
    """They hold the lock too: the next sweep begins when the last of them has ended."""
    sweep = (
        "import pathlib, subprocess, sys\nfrom armd_jax.studies import record\n"
        "with record.held(record.Folder(pathlib.Path(sys.argv[1])), print) as lock:\n"
        "    subprocess.Popen(['sleep', '1'], pass_fds=(lock,), stdout=subprocess.DEVNULL)\n"
    )
    began, told = time.monotonic(), []
    subprocess.run([sys.executable, "-c", sweep, str(tmp_path)], check=True)
    with record.held(Folder(tmp_path), told.append):
        assert time.monotonic() - began > 1 and told == [
            "waiting for the processes of a sweep that was killed: they save and end"
        ]


def test_what_is_done_is_kept(tmp_path):
    folder = Folder(tmp_path)
    folder.member("a=1").mkdir(parents=True)
    assert folder.done("a=1") == record.NOTHING and folder.names() == [] and folder.config("a=1") is None
    done = Done("failed", ("train",), "eval: no such thing")
    folder.note("a=1", done)
    assert folder.done("a=1") == done
    folder.note("a=1", record.NOTHING)
    assert folder.done("a=1") == record.NOTHING and not list(folder.member("a=1").iterdir())


@pytest.mark.parametrize("text", ["{", '{"status": "done"}', '{"done": 3}', "[]"])
def test_a_damaged_record_is_one_line(tmp_path, text):
    """It names the file, and nothing counts as done or undone on its word."""
    folder = Folder(tmp_path)
    folder.member("a=1").mkdir(parents=True)
    (folder.member("a=1") / "member.json").write_text(text)
    with pytest.raises(UserError, match=r"member\.json"):
        folder.done("a=1")
    pathlib.Path(tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json"):
        folder.names()

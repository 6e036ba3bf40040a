"""launch/chaos.py with a few faults and a fixed seed."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_survives_what_is_done_to_it(tmp_path):
    """Killed in a step, a save and a restore, stopped and damaged, with a log that nobody reads and with a full disk, a
    run ends with the bits of an unbroken one."""
    command = [
        sys.executable,
        str(ROOT / "launch" / "chaos.py"),
        "--kills=8",
        "--seed=1",
        f"--folder={tmp_path / 'run'}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # many short processes
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"8 faults in \d+ s; \d+ arrays and \d+ rows of metrics equal, bit for bit", done.stdout)
    assert re.search(r"disk full to the end +(SKIPPED: no tmpfs|\d+ arrays and \d+ rows of metrics equal)", done.stdout)
    assert re.search(r"where the time went: [\d.]+ s of [\d.]+ s, \d+ steps lost: training ", done.stdout)  # within 1%
    events = done.stdout.splitlines()[-1]
    assert "1 start" in events and "1 end" in events and " skip" in events and " save_failed" in events
    assert int(re.search(r"(\d+) stop", events)[1]) >= 3


def test_no_other_folder_is_emptied(tmp_path):
    """A folder that contains anything else is named in an error of one line, and stays as it is."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "my_run").mkdir()
    command = [sys.executable, str(ROOT / "launch" / "chaos.py"), "--kills=1", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "my_run" in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "my_run"]

"""launch/keep_running.sh with real, small commands."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "keep_running.sh"
# Adds a line to ./starts, and ends with the code on the line of ./codes that has the number of this start.
NEXT_CODE = 'echo x >>starts; exit "$(sed -n "$(wc -l <starts)p" codes)"'


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "starts"),
    [
        ("0", 5, 0, 1),
        ("2 0", 5, 2, 1),
        ("1 134 75 0", 5, 0, 4),
        ("1 1 1 1", 2, 1, 3),
        ("9 0", 0, 9, 1),
    ],
)
def test_runs_again_until_done(tmp_path, codes, restarts, code, starts):
    """The command starts again after a crash or a stop by others, never after a mistake, and only so often."""
    (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
    command = ["bash", SCRIPT, f"--max-restarts={restarts}", "--pause=0", "--status-file=status"]
    result = subprocess.run([*command, "--", "bash", "-c", NEXT_CODE], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
    assert (tmp_path / "status").read_text() == f"ended {code}\n"


def wait_for(path: pathlib.Path) -> None:
    """Waits until the file exists."""
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_a_stop_is_passed_on_and_final(tmp_path):
    """SIGTERM reaches the command, which has time to save, and its exit code 75 is then the end.

    While the command runs, a second start is refused.
    """
    saves = "trap 'sleep 0.3; echo saved >saved; exit 75' TERM; echo >ready; while :; do sleep 0.05; done"
    command = ["bash", SCRIPT, "--pause=0", "--status-file=status", "--", "bash", "-c", saves]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "ready")
    assert (tmp_path / "status").read_text() == f"running {running.pid}\n"
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"already running here as process {running.pid}" in second.stderr
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "status").read_text() == "ended 75\n"


# A shell that starts with SIGINT ignored cannot trap it, and Python can.
SAVES_ON_A_SIGNAL = """
import pathlib, signal, sys, time
def note(*_):
    with open("signals", "a") as file:
        file.write("x\\n")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
pathlib.Path("ready").touch()
while not pathlib.Path("signals").exists():
    time.sleep(0.05)
time.sleep(0.5)
sys.exit(75)
"""


def test_ctrl_c_reaches_the_command_once(tmp_path):
    """A terminal sends SIGINT to a whole process group, but the command receives it only once.

    `armd train` ends at once at a second signal, and would have no time to save.
    """
    command = ["bash", SCRIPT, "--pause=0", "--", sys.executable, "-c", SAVES_ON_A_SIGNAL]
    # The script itself could not trap SIGINT either if it were started with SIGINT ignored, as in the background.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=listen)
    try:
        wait_for(tmp_path / "ready")
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(timeout=30) == 75
        assert (tmp_path / "signals").read_text() == "x\n"
    finally:
        (tmp_path / "signals").touch()  # ends the command in any case
        running.kill()
        running.wait()


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_a_warning_reaches_the_command_once(tmp_path, number):
    """A lost connection (whose signal comes twice) or a time limit that is near: the command has the time to save."""
    command = ["bash", SCRIPT, "--pause=0", "--", sys.executable, "-S", "-c", SAVES_ON_A_SIGNAL]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "ready")
        for _ in range(2):
            running.send_signal(number)
            wait_for(tmp_path / "signals")
        assert running.wait(timeout=30) == 75
        assert (tmp_path / "signals").read_text() == "x\n"
    finally:
        (tmp_path / "signals").touch()
        running.kill()
        running.wait()


def test_nobody_reads_the_output(tmp_path):
    """If the reader of the script's messages is gone, the command is started again as ever."""
    (tmp_path / "codes").write_text("1\n1\n0\n")
    command = ["bash", SCRIPT, "--pause=0", "--", "bash", "-c", NEXT_CODE]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    running.stderr.close()
    assert running.wait(timeout=30) == 0
    assert len((tmp_path / "starts").read_text().splitlines()) == 3


def test_a_stop_between_two_tries(tmp_path):
    """A signal in the pause between two starts ends the script at once, and the command does not start again."""
    command = ["bash", SCRIPT, "--pause=60", "--", "bash", "-c", "echo x >>starts; exit 1"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "restart 1 of 10" in running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 1
    running.stderr.close()
    assert (tmp_path / "starts").read_text() == "x\n"


def test_a_left_over_status_does_not_refuse(tmp_path):
    """A machine that crashed leaves `running PID` of a process that no longer exists, and a new start is allowed."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "status").write_text(f"running {ended.pid}\n")
    subprocess.run(["bash", SCRIPT, "--status-file=status", "--", "true"], cwd=tmp_path, check=True)

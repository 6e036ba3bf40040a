"""launch/local_processes.py with real, small processes: output, first failure, signals, exit codes."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launch" / "local_processes.py"
# Prints that it is ready. At a signal that asks for it, it "saves" for the seconds of its first argument, and ends with
# 75.
SAVES_WHEN_ASKED = """
import signal, sys, time
def save(number, frame):
    print("saving after", signal.Signals(number).name); time.sleep(float(sys.argv[1])); sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2): signal.signal(number, save)
print("ready"); time.sleep(60)
"""
IGNORES_SIGTERM = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print("ready"); time.sleep(60)'


def python(code: str, *arguments: str) -> list[str]:
    """The words after the launcher's options that run some Python in every process. -S makes Python start fast."""
    return ["--", sys.executable, "-S", "-c", code, *arguments]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher to its end."""
    return subprocess.run([sys.executable, LAUNCHER, *arguments], capture_output=True, text=True, timeout=50)


def launch_and_signal(number: int, *arguments: str, ready: int) -> tuple[int, str, str]:
    """Starts the launcher, and sends it a signal when `ready` processes are ready.

    Returns exit code, standard output and standard error.
    """
    launcher = subprocess.Popen(
        [sys.executable, LAUNCHER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = ""
    while seen.count("ready") < ready:
        line = launcher.stdout.readline()
        assert line, launcher.stderr.read()
        seen += line
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=50)
    return launcher.returncode, seen + out, err


def test_each_line_names_its_process():
    """Standard output and error stay apart, and every line, even an unfinished one, begins with the process's id."""
    code = 'import sys; print("out {process} of {processes}"); print("no end", end="", file=sys.stderr)'
    result = launch("--processes=3", *python(code))
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [f"[{i}] out {i} of 3" for i in range(3)]
    assert sorted(result.stderr.splitlines()) == [f"[{i}] no end" for i in range(3)]


def test_lines_that_the_terminal_cannot_show_are_passed_on():
    """Far more of them than a pipe holds: in a terminal of ASCII alone, a process that writes them does not block."""
    code = 'import sys; sys.stdout.buffer.write(b"caf\\xc3\\xa9\\n" * 40_000)'
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, LAUNCHER, "--processes=1", *python(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=ascii_only)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "[0] caf\\ufffd\\ufffd\n" * 40_000


def test_environment_of_the_processes(monkeypatch):
    """Each process has its number of virtual CPU devices. The platform is the CPU unless JAX_PLATFORMS is set."""
    code = 'import os; print(os.environ["JAX_NUM_CPU_DEVICES"], os.environ["JAX_PLATFORMS"])'
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert launch("--processes=1", "--devices-per-process=4", *python(code)).stdout == "[0] 4 cpu\n"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert launch("--processes=1", *python(code)).stdout == "[0] 1 cuda\n"


def test_processes_talk_over_the_coordinator_address():
    """All processes are given the same free port: process 0 listens there, and process 1 reaches it."""
    code = """
import socket, sys, time
host, port = "{coordinator}".split(":")
if {process} == 0:
    print("got", socket.create_server((host, int(port))).accept()[0].recv(9).decode())
else:
    for _ in range(100):
        try:
            socket.create_connection((host, int(port))).sendall(b"a message")
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""
    result = launch("--processes=2", *python(code))
    assert (result.returncode, result.stdout) == (0, "[0] got a message\n"), result.stderr


def test_first_failure_wins_and_ends_the_others():
    """Exit code and last lines are those of the process that failed first, not of the others, which are then ended."""
    code = f"""
if {{process}} == 1:
    import sys, time; time.sleep(0.5); print("the reason", file=sys.stderr); sys.exit(7)
{SAVES_WHEN_ASKED}
"""
    start = time.monotonic()
    result = launch("--processes=3", "--grace=20", *python(code, "0"))
    assert result.returncode == 7
    assert time.monotonic() - start < 15
    assert sorted(result.stdout.splitlines())[-2:] == ["[2] ready", "[2] saving after SIGTERM"]
    assert "process 1 ended with code 7: ending the others" in result.stderr
    assert result.stderr.endswith("process 1 failed first, with code 7; its last lines:\n[1] the reason\n")


@pytest.mark.slow
def test_a_process_that_does_not_end_is_killed_within_the_bound():
    """If one process dies of a signal, which is reported as by a shell, one that ignores SIGTERM is killed in time."""
    code = f"""
if {{process}} == 0:
    import os, time; time.sleep(0.5); os.abort()
{IGNORES_SIGTERM}
"""
    start = time.monotonic()
    result = launch("--grace=1", *python(code))
    assert result.returncode == 128 + signal.SIGABRT
    assert 1 < time.monotonic() - start < 15
    assert "still running after 1 s: killed" in result.stderr


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_signals_are_passed_on(number):
    """Every process receives the signal once and has time to save. The exit code is then 75, and shows no failure."""
    code, out, err = launch_and_signal(number, "--grace=20", *python(SAVES_WHEN_ASKED, "0.3"), ready=2)
    assert code == 75, err
    name = signal.Signals(number).name
    assert sorted(out.splitlines()) == sorted(
        f"[{i}] {line}" for i in (0, 1) for line in ("ready", f"saving after {name}")
    )
    assert "failed first" not in err


def test_a_signal_has_a_bound_too():
    """Processes that ignore the signal are killed after the time of --grace."""
    code, _, err = launch_and_signal(signal.SIGTERM, "--grace=0.5", *python(IGNORES_SIGTERM), ready=2)
    assert code == 128 + signal.SIGKILL
    assert "killed" in err


@pytest.mark.slow
def test_what_a_failed_process_started_ends_too(tmp_path):
    """No child of a process is left behind if the group failed."""
    code = """
import subprocess, sys
child = subprocess.Popen(["sleep", "60"]); open(sys.argv[1] + "/{process}", "w").write(str(child.pid)); sys.exit(3)
"""
    assert launch("--processes=1", *python(code, str(tmp_path))).returncode == 3
    pid = int((tmp_path / "0").read_text())
    for _ in range(100):
        try:
            if (
                pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
            ):  # it has ended, but nobody has asked for its code
                return
        except OSError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("still running")


def test_nobody_reads_the_output():
    """The processes continue if the reader of the output goes away, as `| head` does."""
    code = "for i in range(20000): print(i)"
    command = [sys.executable, LAUNCHER, *python(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        launcher.stdout.readline()
        launcher.stdout.close()
        assert launcher.wait(timeout=50) in (0, 120)  # 120: Python could not flush its own output at the very end


@pytest.mark.slow
def test_a_training_of_two_processes(tmp_path, smoke_config, corpus):
    """Both processes of an `armd train` end well, and process 0 has written a complete run."""
    run, armd = tmp_path / "run", tmp_path / "bin" / "armd"
    armd.parent.mkdir()
    armd.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m armd_jax "$@"\n')
    armd.chmod(0o755)
    command = ["armd", "train", f"--config={smoke_config}", f"--workdir={run}", f"--config.data.path={corpus}"]
    command += ["--config.training.num_steps=4", "--config.training.eval_every=0", "--config.order.sbp_steps=0"]
    result = subprocess.run(
        [sys.executable, LAUNCHER, "--processes=2", "--devices-per-process=1", "--", *command],
        # Compiling takes longer than these few steps, and is quicker without the costly passes.
        env=os.environ | {"PATH": f"{armd.parent}:{os.environ['PATH']}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert result.returncode == 0, result.stderr
    assert f"[0] {run}: trained 4 steps" in result.stdout and result.stdout.count("trained 4 steps") == 1
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    assert [int(step.name) for step in (run / "checkpoints").iterdir()] == [4]
    assert {"config.json", "events.jsonl", "tokenizer", "data"} <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the command is missing"),
        (["--processes=0", "--", "true"], "must be positive"),
        (["--processes=two", "--", "true"], "invalid int value"),
        (["--grace=0", "--", "true"], "must be positive"),
        (["--config=a.py"], "--config=a.py"),
        (["--", "no-such-program-here"], "no program 'no-such-program-here' on PATH"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    """A mistake has exit code 2 and one line that says what is wrong."""
    result = launch(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ports_differ_and_are_free():
    """Without --port, the launcher chooses a port that is free."""
    result = launch("--dry-run", "--processes=1", "--", "armd", "train")
    port = int(result.stdout.split("--coordinator=127.0.0.1:")[1].split()[0])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))

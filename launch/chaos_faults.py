"""What launch/chaos.py does to a run: each fault starts a process of it, breaks something, and ends the process."""

import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
STOPPED = 75  # exit code of a run that a signal stopped after saving
PATIENCE = 300.0  # seconds after which a process that makes no progress counts as hung
CHECKPOINT_EVERY = 4
TEXT = "text.md"


class Broken(Exception):
    """A promise was not kept."""


@dataclasses.dataclass
class Run:
    """One workdir and the command that trains in it.

    cache: what all runs share: the text, the prepared data and the compiled programs.
    """

    workdir: pathlib.Path
    cache: pathlib.Path
    steps: int

    def start(self, piped: bool = False) -> subprocess.Popen[bytes]:
        """Starts the training, with the same command every time.

        piped: whether its standard error is a pipe to here instead of the log.
        """
        command = [sys.executable, "-m", "armd_jax", "train", f"--workdir={self.workdir}"]
        command += [f"--config={ROOT / 'experiments' / 'quickstart.py'}:smoke", "--config.model.dropout=0.1"]
        command += [f"--config.data.path={self.cache / TEXT}", f"--config.data.cache_dir={self.cache / 'data'}"]
        command += [f"--config.training.num_steps={self.steps}"]
        command += [f"--config.training.checkpoint_every={CHECKPOINT_EVERY}", "--config.training.eval_every=8"]
        command += ["--config.training.keep_checkpoints=3", "--config.training.tensorboard=false"]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.PIPE if piped else log,
                # It must heed SIGHUP even if this program was started with `nohup`.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )

    @property
    def log(self) -> pathlib.Path:
        """The file with everything that the run's processes print."""
        return self.cache / f"{self.workdir.parent.name}-{self.workdir.name}.log"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The complete rows of metrics.jsonl or events.jsonl."""
        path = self.workdir / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_step(self) -> int:
        """The last step that metrics.jsonl shows."""
        return max((row["step"] for row in self.rows("metrics.jsonl")), default=0)

    def lives(self) -> int:
        """How many processes got as far as training."""
        return sum(row["event"] in ("start", "resume") for row in self.rows("events.jsonl"))

    def checkpoints(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first. Some of them may be damaged."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def wait_until(process: subprocess.Popen[bytes], what: str, condition: Callable[[], bool]) -> bool:
    """Waits for a condition. False if the process ended first; raises Broken if neither happens in time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise Broken(f"no {what} within {PATIENCE:.0f} s")
        time.sleep(0.002)
    return True


def end(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end of a process. Returns its exit code; raises Broken if it does not end in time."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Broken(f"a process did not end within {PATIENCE:.0f} s") from None


def wait_for_steps(run: Run, process: subprocess.Popen[bytes], count: int) -> bool:
    """Waits until this process has written `count` steps more to metrics.jsonl than the run had before."""
    lives = run.lives()
    if not wait_until(process, "start of training", lambda: run.lives() > lives):
        return False
    first = [row["step"] for row in run.rows("events.jsonl") if row["event"] in ("start", "resume")][-1]
    return wait_until(process, f"step {first + count}", lambda: run.last_step() >= first + count)


# --- faults: each takes a run whose first checkpoint is on disk, starts a process and ends it -------------------------


def kill_in_a_step(run: Run, rng: random.Random) -> None:
    """Sends SIGKILL between two steps, or in one."""
    process = run.start()
    if wait_for_steps(run, process, rng.randint(1, 2 * CHECKPOINT_EVERY)):
        time.sleep(rng.uniform(0, 0.05))
    process.kill()
    end(process)


def kill_in_a_save(run: Run, rng: random.Random) -> None:
    """Sends SIGKILL while a checkpoint is being written."""
    process = run.start()
    lives = run.lives()

    def saving() -> bool:
        return run.lives() > lives and any(run.workdir.glob("checkpoints/*tmp*"))

    if wait_until(process, "save", saving):
        time.sleep(rng.uniform(0, 0.02))
    process.kill()
    end(process)


def kill_in_a_restore(run: Run, rng: random.Random) -> None:
    """Sends SIGKILL after the process has locked the workdir and before its first step."""
    process = run.start()
    wait_until(process, "lock", (run.workdir / ".lock").exists)
    time.sleep(rng.uniform(0, 1.5))
    process.kill()
    end(process)


def stop_now(run: Run, process: subprocess.Popen[bytes], number: signal.Signals, times: int = 1) -> None:
    """Asks a process to stop. Its step must be finished and saved, and its exit code say so."""
    for _ in range(times):
        process.send_signal(number)
    code = end(process)
    if code not in (0, STOPPED):
        raise Broken(f"{number.name} ended training with exit code {code}, not {STOPPED}")
    saved = run.rows("events.jsonl")[-1]
    if code == STOPPED and (saved["event"] != "stop" or run.checkpoints()[-1] != saved["step"]):
        raise Broken(f"{number.name}: the last event is {saved}, the checkpoints are {run.checkpoints()}")


def stop(number: signal.Signals, times: int = 1) -> Callable[[Run, random.Random], None]:
    """The fault of a signal that asks for a stop. A lost connection sends SIGHUP more than once."""

    def fault(run: Run, rng: random.Random) -> None:
        process = run.start()
        if wait_for_steps(run, process, rng.randint(1, CHECKPOINT_EVERY)):
            stop_now(run, process, number, times)

    return fault


def reader_goes_away(run: Run, rng: random.Random) -> None:
    """Closes the pipe that the training prints into after some of its first lines. It must go on."""
    process = run.start(piped=True)
    assert process.stderr is not None
    os.read(process.stderr.fileno(), rng.randint(1, 1000))
    process.stderr.close()
    if wait_for_steps(run, process, rng.randint(1, CHECKPOINT_EVERY)):
        stop_now(run, process, signal.SIGTERM)
    elif code := end(process):
        raise Broken(f"training ended with exit code {code} if nobody reads what it prints")


def disk_is_full_for_a_while(run: Run, rng: random.Random) -> None:
    """Lets every write to a file fail, as on a full disk, until a save has failed. Training must go on."""
    process = run.start(piped=True)
    assert process.stderr is not None
    failed, errors = threading.Event(), process.stderr

    def copy() -> None:
        with run.log.open("ab") as log:
            for line in errors:
                log.write(line)
                if b"could not be saved" in line:
                    failed.set()

    copying = threading.Thread(target=copy)
    copying.start()
    if wait_for_steps(run, process, rng.randint(1, CHECKPOINT_EVERY)):
        # A limit on the size of files needs no rights, and it can be lifted again while the process runs.
        before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
        if wait_until(process, "failed save", failed.is_set):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
            step = run.last_step()
            if wait_until(process, "row of metrics after the full disk", lambda: run.last_step() > step):
                stop_now(run, process, signal.SIGTERM)
    code = end(process)
    copying.join()
    if code not in (0, STOPPED) and not (code == 1 and failed.is_set()):  # 1: it came to its end before there was space
        raise Broken(f"training ended with exit code {code} on a full disk")
    if code == STOPPED and not any(row["event"] == "save_failed" for row in run.rows("events.jsonl")):
        raise Broken("the save that failed on the full disk has no event")


def damage(how: Callable[[pathlib.Path, random.Random], None]) -> Callable[[Run, random.Random], None]:
    """The fault of damaging the newest of several checkpoints while no process is running."""

    def fault(run: Run, rng: random.Random) -> None:
        process = run.start()
        lives = run.lives()
        wait_until(process, "second checkpoint", lambda: run.lives() > lives and len(run.checkpoints()) > 1)
        process.kill()
        end(process)
        how(run.workdir / "checkpoints" / str(run.checkpoints()[-1]), rng)

    return fault


def _data_file(step: pathlib.Path) -> pathlib.Path:
    return max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bytes(step: pathlib.Path, rng: random.Random) -> None:
    """Changes 64 bytes of the largest file."""
    file = _data_file(step)
    content = bytearray(file.read_bytes())
    at = rng.randrange(max(len(content) - 64, 1))
    content[at : at + 64] = bytes(byte ^ 0xFF for byte in content[at : at + 64])
    file.write_bytes(content)


def cut_short(step: pathlib.Path, rng: random.Random) -> None:
    """Cuts the end off the largest file."""
    file = _data_file(step)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def empty(step: pathlib.Path, _: random.Random) -> None:
    """Leaves the folder of the step, with nothing in it."""
    shutil.rmtree(step)
    step.mkdir()


FAULTS = {
    "SIGKILL in a step": kill_in_a_step,
    "SIGKILL in a save": kill_in_a_save,
    "SIGKILL in a restore": kill_in_a_restore,
    "SIGTERM": stop(signal.SIGTERM),
    "bytes flipped in the newest checkpoint": damage(flip_bytes),
    "reader of the log goes away": reader_goes_away,
    "SIGHUP, twice": stop(signal.SIGHUP, times=2),
    "disk full for a while": disk_is_full_for_a_while,
    "SIGINT": stop(signal.SIGINT),
    "newest checkpoint cut short": damage(cut_short),
    "newest checkpoint emptied": damage(empty),
}

"""Breaks a training run on purpose, again and again, and shows that nothing is lost.

A tiny ARMD is trained once without a break and once under faults: it is killed in a step, in a save and in a restore,
stopped by SIGTERM and SIGINT, and its newest checkpoint is damaged. The same command starts it again after each fault.
At the end its parameters, their average, its optimizer state and its metrics must equal those of the unbroken run, bit
for bit, and events.jsonl must show one start and otherwise resumptions. A third run meets a full disk and must end with
the same bits, too. The exit code is 0 only if all of this holds.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
STOPPED = 75  # exit code of a run that a signal stopped after saving
PATIENCE = 300.0  # seconds after which a process that makes no progress counts as hung
STEPS_PER_FAULT = 16
CHECKPOINT_EVERY = 4
TEXT = "text.md"
OWN = {"cache", "unbroken", "broken", "disk"}  # what the folder of an earlier run of this program contains


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

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the training, with the same command every time."""
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
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

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
    first = run.rows("events.jsonl")[-1]["step"]
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


def stop(number: signal.Signals) -> Callable[[Run, random.Random], None]:
    """The fault of a signal that asks for a stop: the step must be finished and saved, and the exit code say so."""

    def fault(run: Run, rng: random.Random) -> None:
        process = run.start()
        if not wait_for_steps(run, process, rng.randint(1, CHECKPOINT_EVERY)):
            return
        process.send_signal(number)
        code = end(process)
        if code not in (0, STOPPED):
            raise Broken(f"{number.name} ended training with exit code {code}, not {STOPPED}")
        saved = run.rows("events.jsonl")[-1]
        if code == STOPPED and (saved["event"] != "stop" or run.checkpoints()[-1] != saved["step"]):
            raise Broken(f"{number.name}: the last event is {saved}, the checkpoints are {run.checkpoints()}")

    return fault


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
    "SIGINT": stop(signal.SIGINT),
    "newest checkpoint cut short": damage(cut_short),
    "newest checkpoint emptied": damage(empty),
}


def full_disk(run: Run, unbroken: "Summary") -> str:
    """Trains on a small tmpfs that is full for a while, and compares the end with the unbroken run.

    Returns what was compared, or why that could not be tried here.
    """
    disk = run.workdir.parent
    disk.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        return f"SKIPPED: no tmpfs can be mounted here ({mounted.stderr.strip().splitlines()[-1]})"
    try:
        process = run.start()
        wait_until(process, "checkpoint", lambda: len(run.checkpoints()) > 1)
        process.kill()
        end(process)
        before = run.checkpoints()
        with open(disk / "ballast", "wb", buffering=0) as ballast:
            try:
                while ballast.write(b"\0" * 2**16):
                    pass
            except OSError:
                pass
        if end(run.start()) == 0:
            raise Broken("training on a full disk ended with exit code 0")
        if not set(before) & set(run.checkpoints()):
            raise Broken("a full disk cost the last good checkpoint")
        (disk / "ballast").unlink()
        if end(run.start()):
            raise Broken("training did not continue when there was space again")
        return compare(unbroken, Summary.of(run))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Summary:
    """The outcome of a complete run.

    state: the bytes of every array of the last checkpoint. rows: of metrics.jsonl, without the figures of speed.
    """

    state: dict[str, bytes]
    rows: list[dict[str, Any]]

    @staticmethod
    def of(run: Run) -> "Summary":
        """Reads the folder of a complete run."""
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax
        import numpy as np

        from armd_jax import config as configs
        from armd_jax.training import checkpoints

        state = checkpoints.restore_for_inference(run.workdir, configs.read(run.workdir))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        rows, rates = run.rows("metrics.jsonl"), ("train/tokens_per_second", "train/mfu")
        return Summary(
            {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves},
            [{name: value for name, value in row.items() if name not in rates} for row in rows],
        )


def compare(one: Summary, other: Summary) -> str:
    """Raises Broken if two runs differ in anything. Otherwise returns what was compared."""
    for name in one.state.keys() | other.state.keys():
        if one.state.get(name) != other.state.get(name):
            raise Broken(f"{name} differs from the unbroken run's")
    if one.rows != other.rows:
        at = next((a["step"] for a, b in zip(one.rows, other.rows, strict=False) if a != b), "the end")
        raise Broken(f"metrics.jsonl differs from the unbroken run's at step {at}")
    return f"{len(one.state)} arrays and {len(one.rows)} rows of metrics equal, bit for bit"


def main(argv: list[str] | None = None) -> int:
    """Runs the trainings and prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of faults; default 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places of the faults; default 0")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=ROOT / "runs" / "chaos", help="folder of the runs; it is emptied first"
    )
    args = parser.parse_args(argv)
    rng, folder = random.Random(args.seed), args.folder.absolute()
    if not folder.is_dir() and folder.exists():
        print(f"error: --folder={folder} is a file", file=sys.stderr)
        return 2
    if foreign := sorted({path.name for path in folder.glob("*")} - OWN):
        print(
            f"error: --folder={folder} would be emptied, but {foreign[0]} in it does not come from an earlier run of"
            " this program: name a new or empty folder",
            file=sys.stderr,
        )
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "cache").mkdir(parents=True)
    # A copy, because a run refuses to continue if its text has changed. It is short, so that a process soon trains.
    shutil.copyfile(ROOT / "README.md", folder / "cache" / TEXT)
    steps = STEPS_PER_FAULT * args.kills
    unbroken, broken = (Run(folder / name, folder / "cache", steps) for name in ("unbroken", "broken"))
    began = time.monotonic()
    try:
        print(f"training {steps} steps without a break", flush=True)
        if end(unbroken.start()):
            raise Broken(f"the unbroken run failed; see {unbroken.log}")

        print(f"training {steps} steps under {args.kills} faults, seed {args.seed}", flush=True)
        process = broken.start()  # until its first checkpoint is written, a run has nothing to come back to
        wait_until(process, "first checkpoint", lambda: bool(broken.checkpoints()))
        process.kill()
        end(process)
        survived: collections.Counter[str] = collections.Counter()
        names = list(FAULTS)
        for number in range(args.kills):
            name = names[number] if number < len(names) else rng.choice(names)
            if broken.last_step() >= steps:
                raise Broken(f"the run was already complete after {number} faults: it has too few steps")
            FAULTS[name](broken, rng)
            survived[name] += 1
            print(f"  {number + 1:>3} {name:<40} last step {broken.last_step()}", flush=True)
        if end(broken.start()):
            raise Broken(f"the last process failed; see {broken.log}")

        expected = Summary.of(unbroken)
        result = compare(expected, Summary.of(broken))
        events = collections.Counter(row["event"] for row in broken.rows("events.jsonl"))
        if events["start"] != 1:
            raise Broken(f"the run started from the beginning {events['start'] - 1} times more")
        # The same number of steps as the others, so that their compiled programs serve here too.
        disk = full_disk(Run(folder / "disk" / "run", folder / "cache", steps), expected)
    except Broken as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{'fault':<42} survived")
    for name in FAULTS:
        print(f"{name:<42} {survived[name]}")
    print(f"{'disk full':<42} {disk}")
    print(f"{sum(survived.values())} faults in {time.monotonic() - began:.0f} s; {result}")
    print(f"events: {', '.join(f'{count} {name}' for name, count in sorted(events.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

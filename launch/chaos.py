"""Breaks a training run on purpose, again and again, and shows that nothing was lost.

A tiny ARMD is trained once without a break and once under faults: killed in a step, in a save and in a restore, stopped
by SIGTERM and SIGINT, its newest checkpoint damaged, its disk full. Every life of the second run is the same
`armd train` command. At the end parameters, average, optimizer state and metrics must be those of the unbroken run, bit
for bit, and events.jsonl must show one start and otherwise resumptions. Exit code 0 only then.
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
STOPPED = 75  # exit code of a run that a signal stopped after saving
PATIENCE = 300.0  # seconds until a life that shows no progress counts as hung
STEPS_A_KILL = 16
CHECKPOINT_EVERY = 4
OWN = {"cache", "unbroken", "broken", "disk", "disk-unbroken"}  # what lies in the folder of an earlier run


class Broken(Exception):
    """A promise that did not hold."""


@dataclasses.dataclass
class Run:
    """One workdir and the command that trains in it."""

    workdir: pathlib.Path
    cache: pathlib.Path  # prepared data and compiled programs, for both runs
    steps: int

    def start(self) -> subprocess.Popen:
        """A new life: the same command every time."""
        command = [sys.executable, "-m", "armd_jax.cli", "train", f"--workdir={self.workdir}"]
        command += [f"--config={ROOT / 'experiments' / 'quickstart.py'}:smoke", "--config.model.dropout=0.1"]
        command += [f"--config.data.cache_dir={self.cache / 'data'}", f"--config.training.num_steps={self.steps}"]
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
        """What all lives printed."""
        return self.cache / f"{self.workdir.parent.name}-{self.workdir.name}.log"

    def rows(self, name: str) -> list[dict]:
        """The whole rows of metrics.jsonl or events.jsonl."""
        path = self.workdir / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_step(self) -> int:
        """The last step that metrics.jsonl shows."""
        return max((row["step"] for row in self.rows("metrics.jsonl")), default=0)

    def lives(self) -> int:
        """How many lives got as far as training."""
        return sum(row["event"] in ("start", "resume") for row in self.rows("events.jsonl"))

    def checkpoints(self) -> list[int]:
        """Finished checkpoints, whole or not, oldest first."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def wait_until(process: subprocess.Popen, what: str, condition: Callable[[], bool]) -> bool:
    """Waits for a condition; False where the process ended first. Broken where neither happens in time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise Broken(f"no {what} within {PATIENCE:.0f} s")
        time.sleep(0.002)
    return True


def end(process: subprocess.Popen) -> int:
    """The exit code, waited for."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Broken(f"a signalled process did not leave within {PATIENCE:.0f} s") from None


def wait_for_steps(run: Run, process: subprocess.Popen, count: int) -> bool:
    """Waits until this life has trained and written `count` steps more than it began with."""
    lives = run.lives()
    if not wait_until(process, "start of training", lambda: run.lives() > lives):
        return False
    first = run.rows("events.jsonl")[-1]["step"]
    return wait_until(process, f"step {first + count}", lambda: run.last_step() >= first + count)


# --- faults: each takes a run whose first checkpoint is on disk, starts a life and ends it ----------------------------


def kill_in_a_step(run: Run, rng: random.Random) -> None:
    """SIGKILL between two steps or in one."""
    process = run.start()
    if wait_for_steps(run, process, rng.randint(1, 2 * CHECKPOINT_EVERY)):
        time.sleep(rng.uniform(0, 0.05))
    process.kill()
    end(process)


def kill_in_a_save(run: Run, rng: random.Random) -> None:
    """SIGKILL while a checkpoint is being written."""
    process = run.start()
    lives = run.lives()

    def saving() -> bool:
        return run.lives() > lives and any(run.workdir.glob("checkpoints/*tmp*"))

    if wait_until(process, "save", saving):
        time.sleep(rng.uniform(0, 0.02))
    process.kill()
    end(process)


def kill_in_a_restore(run: Run, rng: random.Random) -> None:
    """SIGKILL between taking the workdir and the first step."""
    process = run.start()
    wait_until(process, "lock", (run.workdir / ".lock").exists)
    time.sleep(rng.uniform(0, 1.5))
    process.kill()
    end(process)


def stop(number: signal.Signals) -> Callable[[Run, random.Random], None]:
    """A polite signal: the step is finished and saved, the exit code says so."""

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
    """The newest of several checkpoints is damaged between two lives."""

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
    """64 bytes of the largest file change."""
    file = _data_file(step)
    content = bytearray(file.read_bytes())
    at = rng.randrange(max(len(content) - 64, 1))
    content[at : at + 64] = bytes(byte ^ 0xFF for byte in content[at : at + 64])
    file.write_bytes(content)


def cut_short(step: pathlib.Path, rng: random.Random) -> None:
    """The largest file loses its end."""
    file = _data_file(step)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def empty(step: pathlib.Path, _: random.Random) -> None:
    """The folder of the step is there, with nothing in it."""
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


def full_disk(run: Run, reference: Run) -> str:
    """Trains on a small tmpfs that is full for a while; `reference` never meets that. What came of it."""
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
            raise Broken("training did not go on when there was space again")
        if end(reference.start()):
            raise Broken(f"the unbroken run failed; see {reference.log}")
        return compare(Summary.of(reference), Summary.of(run))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Summary:
    """What a complete run came to: digests and bytes of its last state, and its metrics without the speed."""

    state: dict[str, bytes]
    rows: list[dict]

    @staticmethod
    def of(run: Run) -> "Summary":
        """Reads a complete run."""
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
    """Raises Broken where two runs differ in anything; otherwise says what was compared."""
    for name in one.state.keys() | other.state.keys():
        if one.state.get(name) != other.state.get(name):
            raise Broken(f"{name} differs from the unbroken run's")
    if one.rows != other.rows:
        at = next((a["step"] for a, b in zip(one.rows, other.rows, strict=False) if a != b), "the end")
        raise Broken(f"metrics.jsonl differs from the unbroken run's at step {at}")
    return f"{len(one.state)} arrays and {len(one.rows)} rows of metrics equal, bit for bit"


def main(argv: list[str] | None = None) -> int:
    """Runs both trainings and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="faults before the run may end; default 50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "chaos", help="where; emptied first")
    args = parser.parse_args(argv)
    rng, folder = random.Random(args.seed), args.folder.absolute()
    if not folder.is_dir() and folder.exists():
        print(f"error: --folder={folder} is a file", file=sys.stderr)
        return 2
    if foreign := sorted({path.name for path in folder.glob("*")} - OWN):
        print(
            f"error: --folder={folder} would be emptied, and {foreign[0]} in it is not of an earlier run of this "
            "program: name a new or empty folder",
            file=sys.stderr,
        )
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "cache").mkdir(parents=True)
    steps = STEPS_A_KILL * args.kills
    unbroken, broken = (Run(folder / name, folder / "cache", steps) for name in ("unbroken", "broken"))
    began = time.monotonic()
    try:
        print(f"training {steps} steps without a break", flush=True)
        if end(unbroken.start()):
            raise Broken(f"the unbroken run failed; see {unbroken.log}")

        print(f"training {steps} steps under {args.kills} faults, seed {args.seed}", flush=True)
        process = broken.start()  # the first life has nothing to come back to until its first checkpoint is whole
        wait_until(process, "first checkpoint", lambda: bool(broken.checkpoints()))
        process.kill()
        end(process)
        survived: collections.Counter[str] = collections.Counter()
        names = list(FAULTS)
        for number in range(args.kills):
            name = names[number] if number < len(names) else rng.choice(names)
            if broken.last_step() >= steps:
                raise Broken(f"the run was complete after {number} faults: too few steps for so many")
            FAULTS[name](broken, rng)
            survived[name] += 1
            print(f"  {number + 1:>3} {name:<40} last step {broken.last_step()}", flush=True)
        if end(broken.start()):
            raise Broken(f"the last life failed; see {broken.log}")

        result = compare(Summary.of(unbroken), Summary.of(broken))
        events = collections.Counter(row["event"] for row in broken.rows("events.jsonl"))
        if events["start"] != 1:
            raise Broken(f"the run started anew {events['start'] - 1} times")
        disk = full_disk(*(Run(folder / name, folder / "cache", 40) for name in ("disk/run", "disk-unbroken")))
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

"""Breaks a training run on purpose, again and again, and shows that nothing is lost.

A tiny ARMD is trained once without a break and once under faults: it is killed in a step, in a save and in a restore,
and stopped by SIGTERM, SIGINT and SIGHUP. Its newest checkpoint is damaged, the reader of its log goes away, and its
disk is full for a while. The same command starts it again after each fault. At the end its parameters, their average,
its optimizer state and its metrics must equal those of the unbroken run, bit for bit, and events.jsonl must show one
start and otherwise resumptions. A third run meets a full disk that nothing frees before its end, and must end with the
same bits, too. The exit code is 0 only if all of this holds.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from typing import Any

from chaos_faults import FAULTS, ROOT, TEXT, Broken, Run, end, wait_until

STEPS_PER_FAULT = 16
OWN = {"cache", "unbroken", "broken", "disk"}  # what the folder of an earlier run of this program contains


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
        from armd_jax.training import checkpoints, run_log

        state = checkpoints.restore_for_inference(run.workdir, configs.read(run.workdir))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        rows = run.rows("metrics.jsonl")
        return Summary(
            {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves},
            [{name: value for name, value in row.items() if name not in run_log.SPEED} for row in rows],
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


def time_spent(run: Run, wall_seconds: float) -> str:
    """What the events of a run say of its time, in words. Raises Broken if that is not its wall-clock within 1%.

    wall_seconds: from the start of its first process to the event `end` of its last one, as seen from outside.
    """
    from armd_jax.training import goodput

    spent = goodput.of(run.rows("events.jsonl"))
    if spent is None or abs(spent.wall_seconds - wall_seconds) > 0.01 * wall_seconds:
        raise Broken(f"the run took {wall_seconds:.1f} s, but its events tell of {spent}")
    shares = ", ".join(f"{name} {spent.share(name):.1%}" for name in spent.seconds if spent.seconds[name])
    return f"{spent.wall_seconds:.1f} s of {wall_seconds:.1f} s, {spent.lost_steps} steps lost: {shares}"


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
        started = time.time()
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
        spent = time_spent(broken, (broken.workdir / "events.jsonl").stat().st_mtime - started)

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
    print(f"{'disk full to the end':<42} {disk}")
    print(f"{sum(survived.values())} faults in {time.monotonic() - began:.0f} s; {result}")
    print(f"where the time went: {spent}")
    print(f"events: {', '.join(f'{count} {name}' for name, count in sorted(events.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

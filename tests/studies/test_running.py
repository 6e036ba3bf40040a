"""Sweeps that run: killed and started again, failed members, signals, and processes that do not outlive them.

`ARMD_KILLS=N` tries twelve members, broken N times at random moments in random ways (`ARMD_SEED` draws others).
"""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from armd_jax import files
from armd_jax.cli import main as cli
from armd_jax.studies import plan as plans
from armd_jax.studies import record, running
from armd_jax.studies.plan import Plan
from armd_jax.studies.record import Done
from armd_jax.training import run_log

pytestmark = pytest.mark.usefixtures("heeded", "quick_compilation")

EVAL = "eval --streams=2 --draws=1 --no-baselines"
PATIENCE = 120.0
SECONDS = 4.0  # about what an evaluation takes, or a training until its first step
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def _start(spec: str, out: pathlib.Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "armd_jax", "sweep", f"--config={spec}", f"--out={out}", *flags]
    return subprocess.Popen(
        command, env=os.environ | QUICK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def _plan(spec: str, out: pathlib.Path) -> Plan:
    return plans.make(plans.load(spec, []), spec, out, lambda words: None)


def _wait(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    """The processes that a process has started; none if it has ended."""
    try:
        return [int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _lives(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _rows(out: pathlib.Path) -> int:
    """How many rows of metrics all members of a sweep have."""
    return sum(len(files.read_json_lines(path)) for path in out.glob("members/*/metrics.jsonl"))


def _outcome(run: pathlib.Path) -> tuple[list[dict[str, object]], dict[str, int], bytes]:
    """What must be the same bits: rows of metrics but for speed, digests of the last checkpoint, and eval.json."""
    rows = [
        {name: value for name, value in row.items() if name not in run_log.SPEED}
        for row in files.read_json_lines(run / "metrics.jsonl")
    ]
    last = max((path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()), key=lambda p: int(p.name))
    digests = json.loads((last / "meta" / "metadata").read_text())["digests"]
    assert len(rows) == 10 and len(digests) > 20  # 8 steps and 2 evaluations; parameters, average and moments
    return rows, digests, (run / "eval.json").read_bytes()


# --- ways to break a sweep; each takes its process -------------------------------------------------------------------


def _kill_it_alone(sweep: "subprocess.Popen[str]") -> None:
    sweep.kill()


def _kill_all(sweep: "subprocess.Popen[str]") -> None:
    children = _children(sweep.pid)
    sweep.kill()
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _kill_a_child(sweep: "subprocess.Popen[str]") -> None:
    for pid in _children(sweep.pid):
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)  # the member has failed, and the next one begins
    sweep.terminate()


def _stop(sweep: "subprocess.Popen[str]") -> None:
    """As a manager of jobs does it, which signals every process. A training saves although the sweep tells it too."""
    for pid in _children(sweep.pid):
        os.kill(pid, signal.SIGTERM)
    sweep.terminate()


WAYS = (_kill_it_alone, _stop, _kill_all, _kill_a_child)


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_like_an_undisturbed_one(tmp_path, sweep_file):
    """Each member is trained once, and ends with the bits of a training and an evaluation that nobody disturbed; so do
    the tables of a report.

    After a SIGKILL of the sweep alone, or at a SIGTERM, the training saves and ends.
    """
    kills = int(os.environ.get("ARMD_KILLS", "0"))
    rng = random.Random(int(os.environ.get("ARMD_SEED", "0")))
    members = 'product(axis("optimizer.learning_rate", [1e-3, 2e-3, 3e-3, 4e-3]), seeds(3))' if kills else "seeds(2)"
    spec, out = sweep_file(members, f'("{EVAL}",)'), tmp_path / "out"
    jobs = _plan(spec, out).jobs
    broken: list[str] = []
    for number in range(kills or 2):
        sweep = _start(spec, out)
        if kills:  # after so many more rows of metrics, 10 of which a member has, and at any moment of what follows
            way, rows = rng.choice(WAYS), _rows(out) + rng.randint(0, 20 * len(jobs) // kills)
            _wait(lambda rows=rows, sweep=sweep: _rows(out) >= rows or sweep.poll() is not None)
            time.sleep(rng.uniform(0, SECONDS))
        else:  # in the middle of the first training, and of the second
            way, folder = WAYS[number], out / "members" / jobs[number].name
            _wait(lambda folder=folder: (folder / "checkpoints" / "2").exists())
        children = _children(sweep.pid)
        if sweep.poll() is None:
            way(sweep)
            broken.append(way.__name__.removeprefix("_"))
        printed, told = sweep.communicate(timeout=10 * PATIENCE)
        if not kills:
            _wait(lambda children=children: not any(map(_lives, children)))
            assert re.search("SIG(USR2|TERM): saving after this step", (folder / "log.txt").read_text())
            assert len(children) == 1
            assert _plan(spec, out).folder.events(jobs[number].name)[-1]["event"] == "stop"
    if not kills:
        assert sweep.returncode == 75 and "stopped by a signal; the same command continues" in printed
        assert "stopping: trainings save and end" in told
    done = _start(spec, out)
    printed, told = done.communicate(timeout=10 * PATIENCE)
    assert done.returncode == 0, told
    assert f"{len(jobs)} of {len(jobs)} members are finished" in printed

    plan = _plan(spec, out)
    starts = 0
    for job in plan.jobs:
        run = plan.folder.member(job.name)
        assert plan.folder.done(job.name) == Done("finished", ("train", EVAL))
        assert [row["event"] for row in plan.folder.events(job.name)].count("end") == 1
        log = (run / "log.txt").read_text()
        assert "a training is running in it" not in log
        starts += log.count("$ armd train ")
        alone = tmp_path / "alone" / "members" / job.name
        command = ["train", f"--config={plan.folder.config_file(job.name)}", f"--workdir={alone}"]
        assert cli.main(command) == 0 and cli.main([*EVAL.split(), f"--run={alone}"]) == 0
        assert _outcome(run) == _outcome(alone)
        shutil.copy(run / "member.json", alone)
    shutil.copy(out / "sweep.json", tmp_path / "alone")
    for folder in (out, tmp_path / "alone"):
        assert cli.main(["report", f"--sweep={folder}"]) == 0
    for name in ("sweep.md", "sweep.csv", "rows.csv", "steps.csv"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # None began again but those that were broken; after a child, the one that the sweep had begun then was stopped too.
    assert starts <= len(jobs) + len(broken) + broken.count("kill_a_child")
    print(f"{len(jobs)} members, {len(broken)} breaks ({', '.join(broken)}), {starts} processes trained them")


@pytest.mark.slow
def test_a_failed_member_stops_nobody(tmp_path, capsys, sweep_file):
    """It is listed with its reason and tried again by the next call; what waits for it says so; others are finished."""
    text = tmp_path / "late.txt"
    late = f'choices("m", {{"late": {{"data.path": {str(text)!r}}}}})'
    waits = 'then(choices("m", {"good": {}}), "eval --data={sweep}/members/m=late")'
    spec, out = sweep_file(f"chain({late}, {waits})"), tmp_path / "out"
    flags = ["--json", "--config.training.num_steps=2", "--config.training.eval_every=0"]
    sweep = _start(spec, out, *flags)
    result = json.loads(sweep.communicate(timeout=PATIENCE)[0])
    failed = dict(result["failed"])
    assert sweep.returncode == 1
    assert result["finished"] == [] and set(failed) == {"m=late", "m=good"}
    assert "late.txt" in failed["m=late"] and "\n" not in failed["m=late"]
    assert str(out) not in "".join(failed.values())
    assert failed["m=good"].endswith("waits for m=late, whose training is not finished")
    folder = record.Folder(out)
    assert folder.done("m=late") == Done("failed", (), failed["m=late"])
    assert folder.done("m=good") == Done("finished", ("train",))

    assert cli.main(["sweep", f"--config={spec}", f"--out={out}", "--only=m=good", *flags]) == 1
    assert "whose training is not finished, and which --only leaves out" in capsys.readouterr().out

    text.write_text("the old river moves under a stone\n" * 100)
    before = (folder.member("m=good") / "events.jsonl").read_bytes()
    sweep = _start(spec, out, "--only=m=late", *flags)
    assert json.loads(sweep.communicate(timeout=PATIENCE)[0])["finished"] == ["m=late"] and sweep.returncode == 0
    assert folder.done("m=late") == Done("finished", ("train",))
    assert (folder.member("m=good") / "events.jsonl").read_bytes() == before


@pytest.mark.slow
def test_members_at_the_same_time(tmp_path, sweep_file):
    """Two processes run at once, each with cores of its own if there are enough; all members are finished."""
    spec, out = sweep_file("seeds(3)", '("report",)'), tmp_path / "out"
    sweep = _start(spec, out, "--jobs=2", "--config.training.num_steps=2", "--config.training.eval_every=0")
    seen: set[tuple[frozenset[int], ...]] = set()
    while sweep.poll() is None:
        with contextlib.suppress(OSError):
            seen.add(tuple(sorted((frozenset(os.sched_getaffinity(pid)) for pid in _children(sweep.pid)), key=min)))
        time.sleep(0.02)
    printed, told = sweep.communicate()
    assert sweep.returncode == 0, told
    assert "3 of 3 members are finished" in printed
    assert {len(cores) for cores in seen} <= {0, 1, 2} and any(len(cores) == 2 for cores in seen)
    if len(os.sched_getaffinity(0)) > 1:
        assert any(len(cores) == 2 and not cores[0] & cores[1] for cores in seen)
    for number in range(3):
        assert record.Folder(out).done(f"seed={number}") == Done("finished", ("train", "report"))


def test_trainings_are_left_to_their_jobs(tmp_path, capsys, sweep_file):
    """With --no-train, what is not trained yet has not failed, and neither has what waits for it."""
    waits = 'then(choices("m", {"trained": {}}), "report --out={sweep}/members/m=other/page")'
    spec, out = sweep_file(f'chain({waits}, choices("m", {{"other": {{"model.width": 32}}}}))'), tmp_path / "out"
    plan = _plan(spec, out)
    out.mkdir()
    plan.write()
    plan.folder.member("m=trained").mkdir()
    plan.folder.note("m=trained", Done("finished", ("train",)))
    command = ["sweep", f"--config={spec}", f"--out={out}", "--no-train"]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] == result["left"] == result["finished"] == []
    assert result["untrained"] == ["m=trained", "m=other"]
    assert plan.folder.done("m=other") == record.NOTHING and not (plan.folder.member("m=other") / "log.txt").exists()
    assert cli.main(command) == 0
    assert "not trained yet, or waiting for one that is not: m=trained, m=other" in capsys.readouterr().out
    for flag in ("--list", "--launcher=slurm"):
        assert cli.main([*command, flag]) == 2
        assert "leave --list and --launcher out" in capsys.readouterr().err


def test_a_failed_command_that_is_taken_out_leaves_no_failure(tmp_path, sweep_file):
    """Then everything of the member is done, and nothing runs again."""
    out = tmp_path / "out"
    plan = _plan(sweep_file("seeds(1)"), out)
    (job,) = plan.jobs
    out.mkdir()
    plan.write()
    plan.folder.member(job.name).mkdir()
    plan.folder.note(job.name, Done("failed", ("train",), "eval: no such thing"))
    result = running.run(plan, plan.jobs, 1)
    assert result.finished == (job.name,) and not (plan.folder.member(job.name) / "log.txt").exists()
    assert plan.folder.done(job.name) == Done("finished", ("train",))


_BEGINS = """
import os, subprocess
from armd_jax.studies.running import _Child
child = _Child({min(os.sched_getaffinity(0))})
process = subprocess.Popen(["sleep", "600"], preexec_fn=child, stdout=subprocess.DEVNULL)
print(process.pid, *os.sched_getaffinity(process.pid), flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_process_does_not_outlive_the_sweep():
    """It is told as soon as the sweep dies, and it has the cores of its place alone."""
    done = subprocess.run([sys.executable, "-c", _BEGINS], stdout=subprocess.PIPE, text=True)
    pid, *cores = map(int, done.stdout.split())
    assert cores == [min(os.sched_getaffinity(0))]
    try:
        _wait(lambda: not _lives(pid), 10)
    finally:
        if _lives(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("at_once", "cores", "shares"),
    [
        (1, {0, 1, 2}, [set()]),
        (2, {0, 1}, [{0}, {1}]),
        (2, {3, 5, 8, 9, 10}, [{3, 5}, {8, 9}]),
        (3, {0, 4}, [{0}, {4}, {0}]),
    ],
)
def test_cores_are_shared_evenly(monkeypatch, at_once, cores, shares):
    """All have as many, on which the last bits depend; one alone may use all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    assert running._cores(at_once) == shares


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ("train --workdir=x", "only eval, .* can follow a training"),
        ("export --out=x", "only eval, .* can follow a training"),
        ("eval --data=--", "'--' is no value"),
        ("eval --stream=2", "unknown argument '--stream=2'"),
        ("eval --batch=x", "invalid int value"),
        ("eval --help", "can follow a training"),
        ("", "can follow a training"),
    ],
)
def test_a_mistake_in_a_command_is_found_before_anything_runs(tmp_path, capsys, sweep_file, after, reason):
    spec = sweep_file("seeds(2)", repr((after,)))
    command = ["sweep", f"--config={spec}", f"--out={tmp_path / 'out'}"]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(reason, line) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "--config=x.py", "--out=--"],
        ["sweep", "--config=--", "--out=x"],
        ["sweep", "--config=x.py", "--out=x", "--launcher-flag=--"],
        ["report", "--sweep=x", "--metric=--"],
        ["eval", "--run=--"],
        ["train", "--config=x.py", "--workdir=x", "--config.data.path=--"],
    ],
)
def test_two_dashes_are_no_value(capsys, words):
    """Argparse makes an empty list of them."""
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "=--: '--' is no value" in line

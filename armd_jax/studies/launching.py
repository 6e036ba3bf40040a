"""Trainings of a sweep as jobs of a cluster: one command of a launcher in launch/ for each."""

import hashlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import assert_never

from armd_jax.errors import UserError
from armd_jax.names import SweepLauncher
from armd_jax.studies import progress, record
from armd_jax.studies.plan import Job, Plan

_NAME = 40  # characters of a job's name that all launchers take


def commands(
    plan: Plan, jobs: Sequence[Job], launcher: SweepLauncher, flags: Sequence[str]
) -> tuple[list[list[str]], int]:
    """The words that submit each training that is left, from the root of the repository; writes the configs for them.

    flags: of the launcher. Also returns how many trainings are left out because they wait for others.
    """
    if named := [flag for flag in flags if flag.partition("=")[0] == "--name"]:
        raise UserError(f"--launcher-flag={named[0]}: every job has a name of its own")
    with record.held(plan.folder, progress.tell):
        plan.write()
    trained = {job.name for job in plan.jobs if plan.folder.trained(job.name, job.config)}
    left = [job for job in jobs if job.name not in trained]
    ready = [job for job in left if trained.issuperset(job.needs)]
    words = [
        [*_program(launcher), f"--name={job_name(plan, job)}", *flags, "--", "armd", *plan.command(job)]
        for job in ready
    ]
    return words, len(left) - len(ready)


def _program(launcher: SweepLauncher) -> list[str]:
    match launcher:
        case "slurm" | "xpk":
            return ["bash", f"launch/{launcher}.sh"]
        case "gke":
            return ["python", "launch/gke_jobset.py"]
        case _:
            assert_never(launcher)


def job_name(plan: Plan, job: Job) -> str:
    """A name for the job of a member, which no other member of any sweep has: a DNS label."""
    labels = [plan.folder.path.name, *(label for _, label in job.member.labels)]
    readable = re.sub("[^a-z0-9]+", "-", "-".join(labels).lower()).strip("-")
    digest = hashlib.sha256(str(plan.folder.member(job.name)).encode()).hexdigest()[:8]
    return f"s-{readable}"[: _NAME - 9].rstrip("-") + f"-{digest}"


def submit(several: Sequence[Sequence[str]]) -> str:
    """Runs the commands, one after the other. Returns in one line what went wrong; empty if nothing did."""
    places = (pathlib.Path.cwd(), pathlib.Path(__file__).resolve().parents[2])
    for number, (program, script, *words) in enumerate(several):
        root = next((place for place in places if (place / script).is_file()), None)
        if root is None:
            raise UserError(f"--submit: there is no {script} here: call it from the root of the repository")
        command = [sys.executable if program == "python" else program, script, *words]
        done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
        sys.stderr.write(done.stdout)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            return f"{said[-1].removeprefix('error: ')}; {number} of {len(several)} jobs are submitted"
    return ""

"""Trainings of a sweep as jobs of a cluster: the launchers take what is printed, and what is done is left out."""

import json
import pathlib
import re
import shlex
import subprocess

import pytest

from armd_jax.cli import main as cli
from armd_jax.errors import UserError
from armd_jax.studies import launching
from armd_jax.studies.record import Done

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEMBERS = 'product(choices("model", {"AR": {}, "WIDE": {"model.width": 32}}), seeds(2))'
PLACE = ["--cluster=tpus", "--project=lab", "--zone=z", "--tpu-type=v5litepod-16", "--image=registry/armd:1"]
FLAGS = {
    "slurm": ["--nodes=1", "--gpus-per-node=1", "--time=1:00:00", "--setup=source 'my venv/bin/activate'"],
    "xpk": PLACE,
    "gke": ["--image=registry/armd:1", "--topology=v5e:4x4", "--claim=runs"],
}


@pytest.mark.parametrize("launcher", FLAGS)
def test_printed_commands_run(tmp_path, capsys, sweep_file, launcher):
    """Each line is a command of the repository's root that asks the launcher for one training, whatever is quoted."""
    out = tmp_path / "a sweep" / "it's one"
    flags = [*FLAGS[launcher], "--dry-run", *([f"--mount-path={tmp_path}"] * (launcher == "gke"))]
    command = ["sweep", f"--config={sweep_file(MEMBERS)}", f"--out={out}", f"--launcher={launcher}"]
    command += [f"--launcher-flag={flag}" for flag in flags]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "trainings that can begin: 4" in printed.err and len(lines) == 4
    done = subprocess.run(["bash", "-c", lines[2]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in (out / "configs" / "model=WIDE,seed=0.json", out / "members" / "model=WIDE,seed=0"):
        assert str(path).replace("'", "") in re.sub(r"[\\']+", "", done.stdout)
    assert "--distributed=on" in done.stdout
    assert cli.main([*command, "--submit", "--json"]) == 0
    submitted = json.loads(capsys.readouterr().out)["submitted"]
    assert [shlex.join(words) for words in submitted] == lines


def test_what_is_trained_is_left_out(make_plan):
    """So are trainings that wait for another one; commands after a training are left to `armd sweep`."""
    tuned = 'choices("tuned", {"yes": {"training.init_from": "{sweep}/members/model=AR,seed=0"}})'
    plan = make_plan(f"chain({MEMBERS}, {tuned})", '("eval",)')

    def names() -> list[str]:
        lines, waiting[0] = launching.commands(plan, plan.jobs, "slurm", [])
        return [words[-1].rpartition("/")[2] for words in lines]

    waiting = [0]
    assert names() == [job.name for job in plan.jobs[:4]] and waiting == [1]
    plan.folder.member("model=AR,seed=0").mkdir(parents=True)
    plan.folder.note("model=AR,seed=0", Done("finished", ("train",)))
    assert names() == [job.name for job in plan.jobs[1:]] and waiting == [0]


def test_names_of_jobs(make_plan):
    """Each is a label that DNS takes, different from all others, also if sweeps have the same members."""
    plan = make_plan(
        f'product({MEMBERS}, choices("LONG.label", {{"x" * 60: {{}}, "x" * 61: {{"model.dropout": 0.1}}}}))'
    )
    names = [launching.job_name(plan, job) for job in plan.jobs]
    assert len(set(names)) == 8 and all(re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])", name) for name in names)
    with pytest.raises(UserError, match="--launcher-flag=--name=x: every job has a name of its own"):
        launching.commands(plan, plan.jobs, "slurm", ["--name=x"])


def test_a_launcher_that_fails_is_one_line(tmp_path, capsys, sweep_file):
    """Its own reason, and how many jobs are submitted."""
    command = ["sweep", f"--config={sweep_file(MEMBERS)}", f"--out={tmp_path / 'out'}", "--launcher=slurm", "--submit"]
    assert cli.main(command) == 1
    assert "error: --nodes is missing" in (error := capsys.readouterr().err) and "; 0 of 4 jobs are submitted" in error

"""The launchers for other machines: help, printed commands, mistakes, and what really runs.

The printed commands are compared with stored text. Recorders take the place of the cloud's programs, and show that
exactly the printed commands run.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "launch" / "golden"
TRAIN = ["--", "armd", "train", "--config=experiments/owt_small.py:a b", "--workdir=/mnt/runs/owt"]
PLACE = ["--name=pod", "--project=lab", "--zone=us-west4-a"]
XPK = [*PLACE, "--cluster=tpus", "--tpu-type=v5litepod-16", "--image=registry/armd:1"]
SLURM = ["--nodes=2", "--gpus-per-node=8", "--time=24:00:00"]
SCRIPTS = ["keep_running.sh", "queued_resources.sh", "slurm.sh", "tpu_vm.sh", "xpk.sh"]

# The stored text of each case is golden/NAME.txt. If a change is intended, write all of them again with
#   python tests/launch/test_launchers.py
CASES = {
    "local_processes": [
        "local_processes.py", "--processes=2", "--devices-per-process=4", "--port=12345", "--",
        "armd", "train", "--config=experiments/quickstart.py:smoke", "--workdir=runs/two processes",
    ],
    "prove": ["prove.sh"],
    "prove_scaling": ["prove.sh", "--scaling"],
    "keep_running": ["keep_running.sh", "--max-restarts=3", *TRAIN],
    "tpu_vm_install": [
        "tpu_vm.sh", "install", *PLACE, "--extras=tpu,tfds", "--setup=sudo mount -t nfs 10.0.0.2:/runs /mnt/runs",
    ],
    "tpu_vm_train": ["tpu_vm.sh", "train", *PLACE, "--gcloud-flag=--internal-ip", *TRAIN],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *PLACE, "--worker=3"],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *PLACE],
    "queued_resources_create": [
        "queued_resources.sh", "create", *PLACE, "--topology=v5p:8x8x8", "--create-flag=--reserved",
    ],
    "queued_resources_status": ["queued_resources.sh", "status", *PLACE],
    "queued_resources_install": ["queued_resources.sh", "install", *PLACE],
    "queued_resources_train": ["queued_resources.sh", "train", *PLACE, *TRAIN],
    "queued_resources_logs": ["queued_resources.sh", "logs", *PLACE],
    "queued_resources_stop": ["queued_resources.sh", "stop", *PLACE],
    "queued_resources_delete": ["queued_resources.sh", "delete", *PLACE],
    "queued_resources_keep": [
        "queued_resources.sh", "keep", *PLACE, "--topology=v5e:16x16", "--slices=2", "--spot", *TRAIN,
    ],
    "xpk": ["xpk.sh", *XPK, "--slices=2", "--xpk-flag=--priority=high", *TRAIN],
    "slurm": ["slurm.sh", *SLURM, "--partition=gpu", "--setup=source .venv/cuda/bin/activate", *TRAIN],
    "gke_jobset": [
        "gke_jobset.py", "--name=owt", "--image=registry/armd:1", "--topology=v5e:16x16", "--slices=2", "--claim=runs",
        "--queue=tpus", "--", "armd", "train", "--config=experiments/owt_small.py", "--workdir=/runs/owt",
    ],
}  # fmt: skip


def start(script: str, *arguments: str, **settings) -> subprocess.CompletedProcess[str]:
    """Runs a launcher from the repository's root, without this machine's values of the variables that it reads."""
    taken = ("NAME", "PROJECT", "ZONE", "CLUSTER", "IMAGE", "SETUP", "JAX_PLATFORMS")
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment |= settings.pop("env", {})
    program = sys.executable if script.endswith(".py") else "bash"
    command = [program, f"launch/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, **settings)


def dry_run(case: str) -> str:
    """The output of a case's launcher with --dry-run."""
    script, *arguments = CASES[case]
    before = len(arguments) if "--" not in arguments else arguments.index("--")
    result = start(script, *arguments[:before], "--dry-run", *arguments[before:])
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("script", ["common.sh", "tpu_workers.sh", *SCRIPTS])
def test_shell_syntax(script):
    """bash parses the script."""
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


@pytest.mark.parametrize("script", [*SCRIPTS, "local_processes.py", "gke_jobset.py"])
def test_help(script):
    """--help says what the script does and how it is used, and names every option of the script."""
    result = start(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    elsewhere = [sys.executable if script.endswith(".py") else "bash", script, "--help"]
    assert subprocess.run(elsewhere, cwd=ROOT / "launch", capture_output=True, text=True).stdout == result.stdout
    program = "python" if script.endswith(".py") else "bash"
    assert f"usage: {program} launch/{script}" in result.stdout
    source = (ROOT / "launch" / script).read_text()
    accepted = set(re.findall(r"^ +(--[a-z-]+)(?:=\*)?\)", source, re.M)) or {"--dry-run"}
    for option in accepted - {"--help", "--"}:
        assert f"{option}=" in result.stdout or f"{option} " in result.stdout, option


@pytest.mark.parametrize("case", CASES)
def test_dry_run(case):
    """The printed commands are the stored ones."""
    assert dry_run(case) == (GOLDEN / f"{case}.txt").read_text()


def test_every_stored_text_is_compared():
    """There is no stored text without a case."""
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if re.match("tpu_vm|queued|xpk", case)])
def test_nobodys_cloud(case):
    """The commands name no project, zone, cluster or registry but the given ones, and all workers of a slice."""
    text = dry_run(case)
    assert set(re.findall(r"--project=(\S+)", text)) == {"lab"}
    assert set(re.findall(r"--zone=(\S+)", text)) == {"us-west4-a"}
    assert not re.search(r"gs://|gcr\.io|pkg\.dev|@", text.replace("TERM@", ""))
    if re.search("install|train|stop", case):
        assert text.count("--worker=all") == text.count(" ssh ") + text.count(" scp ")


RECORDER = """#!/bin/bash
printf '%s\\0' "$#" "${0##*/}" "$@" >>"$RECORDED"
if [ "${0##*/}" = sbatch ]; then cat >"$RECORDED.stdin"; fi
"""


def recorders(folder: pathlib.Path, *programs: str, text: str = RECORDER) -> dict[str, str]:
    """Makes programs that record how they are called. Returns the environment in which they are found first."""
    folder.mkdir()
    for name in programs:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "RECORDED": str(folder / "calls")}


def recorded(environment: dict[str, str]) -> list[list[str]]:
    """The recorded calls, each as a list of words."""
    words = pathlib.Path(environment["RECORDED"]).read_text().split("\0")[:-1]
    calls = []
    while words:
        count = int(words[0])
        calls.append(words[1 : count + 2])
        words = words[count + 2 :]
    return calls


@pytest.mark.parametrize(
    "case", [case for case in CASES if re.match("tpu_vm|queued|xpk", case) and not case.endswith("keep")]
)
def test_runs_what_the_dry_run_prints(tmp_path, case):
    """The commands that run are the printed ones, word by word."""
    environment = recorders(tmp_path / "bin", "gcloud", "xpk", "git", "mkdir")
    script, *arguments = CASES[case]
    result = start(script, *arguments, env=environment)
    assert result.returncode == 0, result.stderr
    assert recorded(environment) == [shlex.split(line) for line in dry_run(case).splitlines()]


def test_slurm_submits_what_the_dry_run_prints(tmp_path):
    """sbatch receives the printed script on its standard input."""
    environment = recorders(tmp_path / "bin", "sbatch")
    assert start(*CASES["slurm"], env=environment).returncode == 0
    assert pathlib.Path(environment["RECORDED"] + ".stdin").read_text() == dry_run("slurm")


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (75, 999, True), (1, 0, True), (134, 19, True), (1, 20, False)],
)
def test_slurm_job_queues_itself_again(tmp_path, code, restarts, requeued):
    """The script ends with the exit code of srun, and queues the job again if that helps."""
    text = RECORDER + f'if [ "${{0##*/}}" = srun ]; then exit {code}; fi\n'
    environment = recorders(tmp_path / "bin", "srun", "scontrol", text=text)
    environment |= {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    script = start("slurm.sh", *SLURM, "--dry-run", *TRAIN).stdout
    result = subprocess.run(["bash", "-s"], input=script, text=True, env=os.environ | environment)
    assert result.returncode == code
    srun, *others = recorded(environment)
    assert srun[srun.index("armd") :] == ["armd", "train", "--distributed=on", *TRAIN[3:]]
    assert others == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_slurm_resources():
    """There is one process per GPU, each sees all GPUs of its node, and SIGTERM comes before the time limit."""
    lines = dry_run("slurm").splitlines()
    settings = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert settings["ntasks-per-node"] == settings["gpus-per-node"] == "8"
    assert (settings["nodes"], settings["signal"], settings["requeue"]) == ("2", "TERM@120", "")


# A program that takes the place of gcloud and runs the remote command here, in a folder of its own as the home.
REMOTE = """#!/bin/bash
for word in "$@"; do case $word in --command=*) cd "$REMOTE_HOME" && exec bash -c "${word#--command=}";; esac; done
"""


@pytest.mark.slow
def test_remote_commands_start_and_stop_a_run(tmp_path):
    """A start returns at once, and the run continues until a stop, which waits until the run has saved."""
    home = tmp_path / "home"
    (home / "armd-jax" / "launch").mkdir(parents=True)
    for script in ("common.sh", "keep_running.sh"):
        (home / "armd-jax" / "launch" / script).write_text((ROOT / "launch" / script).read_text())
    environment = recorders(tmp_path / "bin", "gcloud", text=REMOTE) | {"REMOTE_HOME": str(home)}
    program = "trap 'sleep 0.5; echo it is saved; exit 75' TERM; echo step 1; while :; do sleep 0.1; done"
    started = start("tpu_vm.sh", "train", *PLACE, "--", "bash", "-c", program, env=environment)
    try:
        assert (started.returncode, started.stdout) == (0, "step 1\n"), started.stderr
        assert (home / "armd-jax" / "train.status").read_text().startswith("running ")
    finally:
        stopped = start("tpu_vm.sh", "stop", *PLACE, env=environment)
    assert (stopped.returncode, stopped.stdout) == (0, "step 1\nit is saved\nended 75\n"), stopped.stderr
    again = start("tpu_vm.sh", "stop", *PLACE, env=environment)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "ended 75")


# Takes the place of gcloud. The state of the request, the status of the run on two workers, and whether a copy arrives
# are the next lines of three files.
CLOUD = """#!/bin/bash
next() { line=$(head -n 1 "$ANSWERS/$1"); sed -i 1d "$ANSWERS/$1"; [ "$line" != none ] && tr , "\\n" <<<"$line"; }
case "${0##*/} $*" in
    *" describe "*) next states; exit ;;
    *"echo new"*) next runs; exit ;;
    gcloud*keep_running*) echo start >>"$RECORDED" ;;
    gcloud*scp*) echo copy >>"$RECORDED"; next copies >&2; exit ;;
    gcloud*pip*) echo install >>"$RECORDED" ;;
    gcloud*mounted*) echo setup >>"$RECORDED" ;;
    gcloud*create*) echo create >>"$RECORDED" ;;
    gcloud*delete*) echo delete >>"$RECORDED" ;;
esac
"""
INSTALL = ["copy", "install", "setup"]


@pytest.mark.parametrize(
    ("states", "runs", "copies", "code", "done"),
    [
        pytest.param(
            "none WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED none ACTIVE ACTIVE",
            "new,new|running,running|new,new|ended 0,ended 0",
            "x x",
            0,
            ["create", *INSTALL, "start", "delete", "create", *INSTALL, "start"],
            id="slices that are taken away are asked for again",
        ),
        pytest.param(
            "ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE",
            "running,running|running,lost|running,running|ended 1,running|ended 1,ended 75",
            "",
            75,
            ["setup", "start"],
            id="after a reboot of one worker the run is set up and started on all; it ends when all have ended",
        ),
        pytest.param(
            "ACTIVE ACTIVE ACTIVE",
            "new,new|running,new|ended 0,ended 0",
            "x",
            0,
            [*INSTALL, "start", "setup", "start"],
            id="if one worker was not reached the run is started again",
        ),
        pytest.param(
            "ACTIVE ACTIVE ACTIVE ACTIVE",
            "new,new|new,new|running,running|ended 2,ended 2",
            "none x",
            2,
            ["copy", *INSTALL, "start"],
            id="nothing starts if the installation failed",
        ),
        pytest.param(
            "ACTIVE ACTIVE ACTIVE",
            "ended 75,ended 75|running,running|ended 0,ended 0",
            "x",
            0,
            [*INSTALL, "start"],
            id="the same command continues a stopped run",
        ),
        pytest.param(
            "ACTIVE ACTIVE ACTIVE ACTIVE",
            "ended 75,ended 75|ended 75,ended 75|running,running|ended 0,ended 0",
            "none x",
            0,
            ["copy", *INSTALL, "start"],
            id="the same command continues a stopped run after a failed installation",
        ),
        pytest.param(
            "ACTIVE ACTIVE",
            "ended 0,ended 0|ended 0,ended 0",
            "x",
            0,
            [*INSTALL, "start"],
            id="a run that is done is started once more and ends at once",
        ),
    ],
)
def test_keep_looks_after_a_run(tmp_path, states, runs, copies, code, done):
    """`keep` does what each state of the request and of the run needs, until the run has ended on every worker."""
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "states").write_text(states.replace(" ", "\n") + "\n")
    (answers / "runs").write_text(runs.replace("|", "\n") + "\n")
    (answers / "copies").write_text(copies.replace(" ", "\n") + "\n")
    environment = recorders(tmp_path / "bin", "gcloud", "git", "mkdir", "sleep", text=CLOUD)
    options = ["--topology=v5e:4x4", "--spot", "--setup=echo mounted"]
    result = start("queued_resources.sh", "keep", *PLACE, *options, *TRAIN, env=environment | {"ANSWERS": str(answers)})
    assert result.returncode == code, result.stderr
    recorded = pathlib.Path(environment["RECORDED"])
    assert (recorded.read_text().split() if recorded.exists() else []) == done


@pytest.mark.parametrize(
    ("state", "answer"),
    [(None, "new"), ("ended 75", "ended 75"), ("running {here}", "running"), ("running {gone}", "lost")],
)
def test_keep_asks_for_the_runs_status(tmp_path, state, answer):
    """The remote command that asks for the status of the run gives the right answer in every case."""
    (tmp_path / "armd-jax").mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    if state:
        text = state.format(here=os.getpid(), gone=ended.pid)
        (tmp_path / "armd-jax" / "train.status").write_text(text + "\n")
    [question] = [line for line in dry_run("queued_resources_keep").splitlines() if "echo new" in line]
    command = shlex.split(question)[-1].removeprefix("--command=")
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout == answer + "\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["tpu_vm.sh"], "the first word must be install, train, logs or stop"),
        (["tpu_vm.sh", "train", *PLACE[1:], *TRAIN], "--name is missing"),
        (["tpu_vm.sh", "train", PLACE[0], PLACE[2], *TRAIN], "--project is missing"),
        (["tpu_vm.sh", "train", *PLACE[:2], *TRAIN], "--zone is missing"),
        (["tpu_vm.sh", "train", *PLACE], "the command is missing"),
        (["tpu_vm.sh", "train", *PLACE, "--config=a.py"], "unknown option --config=a.py"),
        (["queued_resources.sh", "start"], "the first word must be create,"),
        (["queued_resources.sh", "create", *PLACE], "--topology is missing"),
        (["queued_resources.sh", "create", *PLACE, "--topology=v5e:4xa"], "must give its chips as in v5e:4x4"),
        (["queued_resources.sh", "create", *PLACE, "--topology=4x4"], "must begin with v4:, v5e:, v5p: or v6e:"),
        (
            ["queued_resources.sh", "create", *PLACE, "--topology=v5e:4x4", "--slices=two"],
            "--slices=two must be a whole",
        ),
        (["queued_resources.sh", "status", *PLACE[:2]], "--zone is missing"),
        (["queued_resources.sh", "keep", *PLACE, "--topology=v5e:4x4"], "the command is missing"),
        *[
            (["xpk.sh", *XPK[:i], *XPK[i + 1 :], *TRAIN], f"{XPK[i].partition('=')[0]} is missing")
            for i in range(len(XPK))
        ],
        (["xpk.sh", *XPK, "--grace-seconds=0", *TRAIN], "--grace-seconds=0 must be a whole number"),
        *[
            (["slurm.sh", *SLURM[:i], *SLURM[i + 1 :], *TRAIN], f"{SLURM[i].partition('=')[0]} is missing")
            for i in range(len(SLURM))
        ],
        (["slurm.sh", *SLURM], "the command is missing"),
        (["keep_running.sh"], "the command is missing"),
        (
            ["keep_running.sh", "--max-restarts=x", "--", "true"],
            "--max-restarts=x must be a whole number of at least 0",
        ),
        (["tpu_vm.sh", "train", *PLACE, "--max-restarts=-1", *TRAIN], "--max-restarts=-1 must be a whole number"),
        (["queued_resources.sh", "status", *PLACE, "--max-restarts=x"], "--max-restarts=x must be a whole number"),
        (["queued_resources.sh", "status", *PLACE, "--every=010"], "--every=010 must be a whole number of at least 1"),
        (["queued_resources.sh", "status", *PLACE, "--extras="], "--extras is missing"),
    ],
)
def test_mistakes_are_one_line(command, message):
    """A mistake has exit code 2 and one line that says what is missing or wrong, and nothing runs."""
    result = start(*command)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("topology", "accelerator"),
    [
        ("v4:2x2x2", "v4-16"),
        ("v5e:4x4", "v5litepod-16"),
        ("v5e:16x16", "v5litepod-256"),
        ("v5p:8x8x8", "v5p-1024"),
        ("v6e:16x16", "v6e-256"),
    ],
)
def test_accelerator_types(topology, accelerator):
    """The numbers in gcloud's names count cores for v4 and v5p and chips for others, as in the table of the page."""
    printed = start("queued_resources.sh", "create", "--dry-run", *PLACE, f"--topology={topology}").stdout
    assert f" --accelerator-type={accelerator} " in printed
    row = re.search(rf"^\| `{topology}` \|.*", (ROOT / "launch" / "README.md").read_text(), re.M)
    assert row is None or f"`{accelerator}`" in row[0]


def test_settings_from_the_environment():
    """Environment variables do the same as the options of their names."""
    environment = {"NAME": "pod", "PROJECT": "lab", "ZONE": "us-west4-a"}
    given = start("tpu_vm.sh", "train", "--dry-run", "--gcloud-flag=--internal-ip", *TRAIN, env=environment)
    assert given.stdout == (GOLDEN / "tpu_vm_train.txt").read_text()


def test_a_missing_program_is_one_line(tmp_path):
    """If the cloud's program is not installed, the launcher says so."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "sed", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for command, program in ((["xpk.sh", *XPK, *TRAIN], "xpk"), (["slurm.sh", *SLURM, *TRAIN], "sbatch")):
        result = start(*command, env={"PATH": str(tmp_path / "bin")})
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {program} is not installed on this machine")


def test_dockerfile_layers():
    """The dependencies are a layer before that of the code, which is the last, and only named files are sent."""
    steps = [
        line.split(maxsplit=1)
        for line in (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]
    order = [f"{name} {rest.split()[0]}" for name, rest in steps]
    assert order.index("ARG EXTRA=cpu") < order.index("COPY requirements.txt") < order.index("COPY .")
    dependencies = steps[order.index("COPY requirements.txt")][1].split()[:-1]
    assert dependencies == ["requirements.txt", "setup.py", "pyproject.toml"]
    assert all((ROOT / name).exists() for name in dependencies)
    [code] = [rest for name, rest in steps[order.index("COPY .") :] if name == "RUN"]
    assert "--no-deps" in code
    first, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert first == "*"
    sent = {line[1:] for line in kept if line.startswith("!")}
    assert sent >= {"armd_jax", "experiments", "README.md", *dependencies}
    assert all((ROOT / name).exists() for name in sent)


def test_dockerfile_extras_exist():
    """The values of EXTRA are extras of setup.py."""
    setup = (ROOT / "setup.py").read_text()
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text()
    [names] = re.findall(
        r"^ +([a-z |]+)\) pip install --no-cache-dir \"\.\[\$EXTRA\$\{EXTRAS:\+,\$EXTRAS\}\]\"", dockerfile, re.M
    )
    assert all(f'"{name}": [' in setup for name in names.split(" | "))


@pytest.mark.parametrize(
    ("extra", "extras", "installed"),
    [
        ("cpu", "", "."),
        ("cpu", "wandb", ".[wandb]"),
        ("tpu", "", ".[tpu]"),
        ("cuda", "tfds,wandb", ".[cuda,tfds,wandb]"),
    ],
)
def test_dockerfile_installs_the_extras(tmp_path, extra, extras, installed):
    """The layer's shell command asks pip for the right extras, in a form that pip understands."""
    environment = recorders(tmp_path / "bin", "pip", text='#!/bin/bash\necho "${@: -1}" >>"$RECORDED"\n')
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    [command] = [line.removeprefix("RUN ") for line in dockerfile.splitlines() if "case" in line]
    settings = os.environ | environment | {"EXTRA": extra, "EXTRAS": extras}
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=settings, check=True)
    assert pathlib.Path(environment["RECORDED"]).read_text().split() == [installed, "armd-jax"]


def test_page_names_every_launcher():
    """launch/README.md names every launcher, and no file that does not exist."""
    page = (ROOT / "launch" / "README.md").read_text()
    for script in [*SCRIPTS, "local_processes.py", "gke_jobset.py", "Dockerfile", "quickstart.sh", "test.sh"]:
        assert f"`{script}`" in page, script
    for name in re.findall(r"launch/([\w.]+)", page):
        assert (ROOT / "launch" / name).exists(), name


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(dry_run(name))

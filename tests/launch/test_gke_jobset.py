"""launch/gke_jobset.py: the manifests for several topologies, parsed, and the mistakes that it refuses."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "gke_jobset.py"
SPEC = importlib.util.spec_from_file_location("gke_jobset", SCRIPT)
gke_jobset = importlib.util.module_from_spec(SPEC)
sys.modules["gke_jobset"] = gke_jobset
SPEC.loader.exec_module(gke_jobset)

TRAIN = ["--", "armd", "train", "--config=experiments/owt_small.py", "--workdir=/runs/owt"]


def options(topology: str = "v5e:4x4", *more: str) -> list[str]:
    """A complete command line."""
    return ["--name=owt", "--image=registry/armd:1", f"--topology={topology}", "--claim=runs", *more, *TRAIN]


def manifest(capsys, topology: str = "v5e:4x4", *more: str) -> dict:
    """The parsed manifest."""
    assert gke_jobset.main(["--dry-run", *options(topology, *more)]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def job_of(jobset: dict) -> dict:
    """The spec of the jobs of the slices."""
    [replicated] = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


# The machines of a slice according to Google's tables (Cloud TPU configurations, and GKE's planning page).
@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips_per_host"),
    [
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 2, 4),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:8x16", "tpu-v5-lite-podslice", 32, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v6e:8x8", "tpu-v6e-slice", 16, 4),
        ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
        ("v4:4x4x8", "tpu-v4-podslice", 32, 4),
        ("v5p:2x2x2", "tpu-v5p-slice", 2, 4),
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
        ("v5p:8x8x8", "tpu-v5p-slice", 128, 4),
        ("v5p:16x16x24", "tpu-v5p-slice", 1536, 4),
    ],
)
def test_one_pod_for_each_host(capsys, topology, accelerator, hosts, chips_per_host):
    """There is one pod per host, which asks for the host's chips on nodes of this topology; one service names them."""
    jobset = manifest(capsys, topology)
    job = job_of(jobset)
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert container["resources"]["limits"] == {"google.com/tpu": chips_per_host}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    network = jobset["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "subdomain": "owt", "publishNotReadyAddresses": True}


def test_larger_machines(capsys):
    """If the machines of the node pool have eight chips, 2x4 needs one host."""
    job = job_of(manifest(capsys, "v5e:2x4", "--chips-per-host=8"))
    [container] = job["template"]["spec"]["containers"]
    assert (job["completions"], container["resources"]["limits"]["google.com/tpu"]) == (1, 8)


def test_slices(capsys):
    """There is one replica per slice, each in a node pool of its own."""
    jobset = manifest(capsys, "v5e:16x16", "--slices=2", "--host-network")
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    annotation = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert annotation == "cloud.google.com/gke-nodepool"
    pod = job_of(jobset)["template"]["spec"]
    assert job_of(jobset)["completions"] == 64
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


@pytest.mark.parametrize(("code", "again"), [(2, False), (75, True), (1, True), (134, True), (137, True)])
def test_what_starts_again(capsys, code, again):
    """A mistake fails the JobSet at once. After a stop that saved, a crash or a kill, all of it starts again."""
    jobset = manifest(capsys)
    job = job_of(jobset)
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["onExitCodes"]["operator"] == "In"
        if code in rule["onExitCodes"]["values"]:
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
    action = "RestartJobSet"  # the controller's default
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            action = rule["action"]
    assert action == ("RestartJobSet" if again else "FailJobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize(("given", "checkpoint", "grace"), [([], 300, 600), (["--grace-seconds=301"], 300, 301)])
def test_grace_is_longer_than_a_checkpoint(capsys, given, checkpoint, grace):
    """The time from SIGTERM to SIGKILL is longer than a checkpoint takes."""
    seconds = job_of(manifest(capsys, "v5e:4x4", *given))["template"]["spec"]["terminationGracePeriodSeconds"]
    assert seconds == grace > checkpoint


def test_the_training_itself_gets_the_signal(capsys):
    """The command is the training without a shell around it, and is told that it is one of several processes."""
    [container] = job_of(manifest(capsys))["template"]["spec"]["containers"]
    assert container["command"] == ["armd", "train", "--distributed=on", *TRAIN[3:]]


def test_options_reach_the_manifest(capsys):
    """Options reach the manifest unchanged, even those that YAML would read as something else."""
    more = ["--namespace=team", "--queue=yes", "--service-account=runner", "--mount-path=/runs", "--max-restarts=7"]
    more += ["--node-selector=cloud.google.com/gke-spot=true", "--env=TEXT=a: 'b' \"c\" #d é", "--env=NUMBER=1"]
    jobset = manifest(capsys, "v6e:4x4", *more)
    pod = job_of(jobset)["template"]["spec"]
    [container] = pod["containers"]
    assert jobset["metadata"]["namespace"] == "team"
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "yes"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["serviceAccountName"] == "runner"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert container["env"] == [{"name": "TEXT", "value": "a: 'b' \"c\" #d é"}, {"name": "NUMBER", "value": "1"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/runs"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TRAIN, "required: --name, --image, --topology, --claim"),
        (options()[:4], "the command is missing"),
        (options("v5e:4x5"), "the shape of a v5e slice is 1x1, 2x2"),
        (options("v5p:8x4x4"), "A <= B <= C"),
        (options("v5p:4x4"), "the shape of a v5p slice is"),
        (options("v3:4x4"), "must be one of v4, v5e, v5p, v6e"),
        (options("v5e"), "the shape of a v5e slice is"),
        (options("v5e:4x4", "--chips-per-host=3"), "does not divide the 16 chips"),
        (options("v5e:4x4", "--chips-per-host=0"), "--chips-per-host must be at least 1"),
        (options("v5e:2x2", "--slices=2"), "each slice must have several hosts"),
        (options("v5e:4x4", "--slices=0"), "--slices must be at least 1"),
        (options("v5e:4x4", "--grace-seconds=300"), "longer than --checkpoint-seconds=300"),
        (options("v5e:4x4", "--mount-path=/data"), "give --workdir=/data/NAME"),
        (options("v5e:4x4", "--env=A"), "'A' must have the form KEY=VALUE"),
        (options("v5e:4x4", "--name=Big_Name"), "must be a DNS label"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    """A mistake has exit code 2 and one line that says what is wrong, and no manifest is printed."""
    assert gke_jobset.main(["--dry-run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_applies_what_the_dry_run_prints(tmp_path, monkeypatch):
    """kubectl reads the printed manifest on its standard input, and its exit code is that of the script."""
    program = tmp_path / "kubectl"
    program.write_text('#!/bin/sh\necho "$@" >"$OUT/arguments"; cat >"$OUT/manifest"; exit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("OUT", str(tmp_path))
    command = [sys.executable, SCRIPT, "--context=there", *options()]
    assert subprocess.run(command).returncode == 3
    printed = subprocess.run(
        [*command[:2], "--dry-run", *command[2:]], check=True, capture_output=True, text=True
    ).stdout
    first, rest = printed.split("\n", 1)
    assert first == "# kubectl " + (tmp_path / "arguments").read_text().strip()
    assert rest == (tmp_path / "manifest").read_text()
    assert re.search("^kind: JobSet$", rest, re.M)

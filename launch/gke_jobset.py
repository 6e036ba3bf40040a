"""Trains on TPU slices of a GKE cluster: writes a JobSet manifest for a named topology and applies it.

There is one replicated job, with one replica per slice and one pod per host. The cluster needs the JobSet controller,
and a node pool of the topology for each slice. --claim names a persistent volume claim that all pods may write to
(ReadWriteMany, such as Filestore, or a bucket through Cloud Storage FUSE). --workdir and the data must be in it, under
--mount-path.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn


@dataclasses.dataclass(frozen=True)
class Generation:
    """How GKE names a TPU generation, and the shape of its slices."""

    accelerator: str  # label cloud.google.com/gke-tpu-accelerator of its nodes
    dimensions: int
    chips_per_host: int  # of slices with several hosts


# From https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. Slices with several hosts consist of machine
# types with four chips.
GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", 3, 4),
    "v5e": Generation("tpu-v5-lite-podslice", 2, 4),
    "v5p": Generation("tpu-v5p-slice", 3, 4),
    "v6e": Generation("tpu-v6e-slice", 2, 4),
}
SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # larger ones are made of 4x4x4 cubes


class UserError(Exception):
    """A mistake in the user's input; its text is one line."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, such as v5e:4x4."""

    generation: str
    shape: str
    chips: int
    hosts: int

    @property
    def chips_per_host(self) -> int:
        """The number of chips that one pod asks for."""
        return self.chips // self.hosts

    @classmethod
    def parse(cls, text: str, chips_per_host: int | None = None) -> "Topology":
        """Reads a name. Raises UserError if GKE has no such slice, or its chips do not divide into such hosts."""
        name, _, shape = text.partition(":")
        if name not in GENERATIONS:
            raise UserError(f"--topology={text}: the generation must be one of {', '.join(GENERATIONS)}, as in v5e:4x4")
        generation = GENERATIONS[name]
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape) or not _exists(shape, generation.dimensions):
            known = (
                ", ".join(SHAPES_2D)
                if generation.dimensions == 2
                else ", ".join(SMALL_SHAPES_3D) + " or AxBxC of multiples of 4 with A <= B <= C"
            )
            raise UserError(f"--topology={text}: the shape of a {name} slice is {known}")
        chips = math.prod(int(size) for size in shape.split("x"))
        each = min(chips_per_host or generation.chips_per_host, chips)
        if chips % each:
            raise UserError(f"--chips-per-host={each} does not divide the {chips} chips of {text}")
        return cls(name, shape, chips, chips // each)


def _exists(shape: str, dimensions: int) -> bool:
    if dimensions == 2:
        return shape in SHAPES_2D
    sizes = [int(size) for size in shape.split("x")]
    cubes = len(sizes) == 3 and all(size % 4 == 0 for size in sizes) and sizes == sorted(sizes)
    return shape in SMALL_SHAPES_3D or cubes


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options and, as `command`, the words after `--`. Raises UserError if they are wrong."""
    parser = Parser(
        prog="launch/gke_jobset.py",
        description=__doc__,
        usage="python %(prog)s --name=NAME --image=IMAGE --topology=v5e:4x4 --claim=CLAIM [options] -- armd train ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="name of the JobSet and its headless service")
    parser.add_argument("--image", required=True, help="container image made with launch/Dockerfile")
    parser.add_argument("--topology", required=True, help="generation and chips of one slice, such as v5p:8x8x8")
    parser.add_argument("--claim", required=True, help="persistent volume claim that all pods may write to")
    parser.add_argument("--mount-path", default="/runs", help="where the claim is mounted; default /runs")
    parser.add_argument("--slices", type=int, default=1, help="number of slices; default 1")
    parser.add_argument(
        "--chips-per-host",
        type=int,
        help="chips of each machine of the node pool; default: 4, or all of a smaller slice",
    )
    parser.add_argument("--max-restarts", type=int, default=100, help="after stops and after crashes; default 100")
    parser.add_argument(
        "--checkpoint-seconds", type=int, default=300, help="bound on the time that a checkpoint takes; default 300"
    )
    parser.add_argument("--grace-seconds", type=int, default=600, help="seconds from SIGTERM to SIGKILL; default 600")
    parser.add_argument("--namespace", help="Kubernetes namespace; default: that of kubectl's context")
    parser.add_argument("--context", help="kubectl's context; default: its current one")
    parser.add_argument("--service-account", help="Kubernetes service account of the pods")
    parser.add_argument("--queue", help="Kueue's local queue")
    parser.add_argument(
        "--node-selector", action="append", default=[], metavar="KEY=VALUE", help="label of the nodes; may be repeated"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="variable of the pods; may be repeated"
    )
    parser.add_argument("--host-network", action="store_true", help="use the nodes' own network, faster between slices")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest instead of applying it")
    parser.add_argument("command", nargs="*", help="after --: the command of every pod")
    args = parser.parse_args(argv)
    if not args.command:
        raise UserError("the command is missing: end with -- armd train --config=FILE --workdir=/runs/NAME")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
        raise UserError(f"--name={args.name} must be a DNS label of at most 40 of a-z, 0-9 and -")
    for option in ("slices", "chips_per_host", "max_restarts", "checkpoint_seconds"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1")
    if args.grace_seconds <= args.checkpoint_seconds:
        raise UserError(
            f"--grace-seconds={args.grace_seconds} must be longer than --checkpoint-seconds={args.checkpoint_seconds}"
        )
    if args.command[:2] == ["armd", "train"]:
        folders = [word.removeprefix("--workdir=") for word in args.command if word.startswith("--workdir=")]
        if not folders or not pathlib.PurePosixPath(folders[-1]).is_relative_to(args.mount_path):
            raise UserError(f"give --workdir={args.mount_path}/NAME, in the claim: a new pod finds no other folder")
    for pair in (*args.node_selector, *args.env):
        if "=" not in pair:
            raise UserError(f"{pair!r} must have the form KEY=VALUE")
    return args


def manifest(args: argparse.Namespace, topology: Topology) -> str:
    """The JobSet as YAML text."""
    quoted = functools.partial(json.dumps, ensure_ascii=False)  # a JSON string is a YAML string
    command = list(args.command)
    if command[:2] == ["armd", "train"]:
        command.insert(2, "--distributed=on")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": GENERATIONS[topology.generation].accelerator,
        "cloud.google.com/gke-tpu-topology": topology.shape,
        **dict(pair.split("=", 1) for pair in args.node_selector),
    }
    environment = dict(pair.split("=", 1) for pair in args.env)
    lines = [
        "apiVersion: jobset.x-k8s.io/v1alpha2",
        "kind: JobSet",
        "metadata:",
        f"  name: {quoted(args.name)}",
        *([f"  namespace: {quoted(args.namespace)}"] if args.namespace else []),
        *(["  labels:", f"    kueue.x-k8s.io/queue-name: {quoted(args.queue)}"] if args.queue else []),
        "  annotations:",
        "    # The pods of one slice share a node pool, and each slice has one of its own.",
        "    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool",
        "spec:",
        "  network:",
        "    # A headless service of this name gives every pod a host name.",
        "    enableDNSHostnames: true",
        f"    subdomain: {quoted(args.name)}",
        "    publishNotReadyAddresses: true",
        "  failurePolicy:",
        "    # If a run was stopped and saved (75), or crashed, all its pods start again together, and it continues.",
        f"    maxRestarts: {args.max_restarts}",
        "    rules:",
        "      - name: userMistake",
        "        action: FailJobSet",
        "        onJobFailureReasons: [PodFailurePolicy]",
        "  replicatedJobs:",
        "    - name: slice",
        f"      replicas: {args.slices}  # slices",
        "      template:",
        "        spec:",
        "          completionMode: Indexed",
        f"          completions: {topology.hosts}  # hosts of a slice",
        f"          parallelism: {topology.hosts}",
        "          backoffLimit: 0",
        "          podFailurePolicy:",
        "            rules:",
        "              - action: FailJob  # a mistake in the command or its config: a restart would not help",
        "                onExitCodes:",
        "                  containerName: train",
        "                  operator: In",
        "                  values: [2]",
        "          template:",
        "            spec:",
        "              restartPolicy: Never",
        f"              terminationGracePeriodSeconds: {args.grace_seconds}"
        f"  # a checkpoint takes at most {args.checkpoint_seconds}",
        *(["              hostNetwork: true", "              dnsPolicy: ClusterFirstWithHostNet"] * args.host_network),
        *([f"              serviceAccountName: {quoted(args.service_account)}"] if args.service_account else []),
        "              nodeSelector:",
        *[f"                {quoted(key)}: {quoted(value)}" for key, value in selector.items()],
        "              containers:",
        "                - name: train",
        f"                  image: {quoted(args.image)}",
        "                  command:  # without a shell, so that SIGTERM reaches the training itself",
        *[f"                    - {quoted(word)}" for word in command],
        *(["                  env:"] if environment else []),
        *[
            line
            for key, value in environment.items()
            for line in (f"                    - name: {quoted(key)}", f"                      value: {quoted(value)}")
        ],
        "                  ports:",
        "                    - containerPort: 8471  # between the TPU runtimes of a slice",
        "                    - containerPort: 8482  # JAX's coordinator",
        "                  resources:",
        "                    limits:",
        f"                      google.com/tpu: {topology.chips_per_host}",
        "                  volumeMounts:",
        "                    - name: runs",
        f"                      mountPath: {quoted(args.mount_path)}",
        "              volumes:",
        "                - name: runs",
        "                  persistentVolumeClaim:",
        f"                    claimName: {quoted(args.claim)}",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints or applies the manifest. Returns the exit code."""
    try:
        args = parse(argv)
        topology = Topology.parse(args.topology, args.chips_per_host)
        if args.slices > 1 and topology.hosts == 1:
            raise UserError(f"--slices={args.slices}: each slice must have several hosts, and {args.topology} has one")
        kubectl = ["kubectl", *([f"--context={args.context}"] if args.context else []), "apply", "--filename=-"]
        if not args.dry_run and shutil.which("kubectl") is None:
            raise UserError("kubectl is not installed on this machine; --dry-run prints the manifest without it")
    except UserError as error:
        print(f"error: {error} (see python launch/gke_jobset.py --help)", file=sys.stderr)
        return 2
    text = manifest(args, topology)
    if args.dry_run:
        print(f"# {shlex.join(kubectl)}")
        print(text, end="")
        return 0
    return subprocess.run(kubectl, input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())

"""`armd sweep`: train every member of a sweep, each in a process of its own, or go on where an earlier call stopped."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence

from armd_jax import typed
from armd_jax.cli.arguments import add_config, failed, local_folder, show
from armd_jax.errors import STOPPED, UserError
from armd_jax.names import SweepLauncher

HELP = "Train every member of a sweep, each in a process of its own, or go on where an earlier call stopped."
IF_MEMORY_RUNS_OUT = "lower --jobs"
# Verbs that take a run and may be run again. `export` may not: it refuses a folder that exists.
_AFTER = ("eval", "sample", "report", "checkpoints", "profile")


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_config(parser)
    parser.add_argument("--out", required=True, type=local_folder, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--list", action="store_true", help="count and show the members and their cost; run nothing")
    parser.add_argument("--only", default=None, metavar="GLOB", help="only members whose name or row fits")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="members at a time, which share the cores")
    parser.add_argument(
        "--no-train",
        action="store_true",
        help="run only the commands after trainings that are finished, as after those of a launcher",
    )
    parser.add_argument(
        "--rate", type=float, default=None, metavar="FLOPS", help="list: FLOPs per second; default: as measured"
    )
    parser.add_argument(
        "--launcher",
        default=None,
        choices=typed.choices(SweepLauncher),
        help="print the command that submits each training that is left, by a launcher of launch/",
    )
    parser.add_argument(
        "--launcher-flag", action="append", default=[], metavar="FLAG", help="a flag of the launcher; may be repeated"
    )
    parser.add_argument("--submit", action="store_true", help="launcher: run the commands instead of printing them")
    parser.epilog = "The same command goes on with what is left. " + (parser.epilog or "")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Lists, launches or runs the members. Exit code 1 if one of them failed, 75 if a signal stopped the sweep."""
    args.result_is_printed = args.list or args.launcher is not None  # else it is a folder, whoever reads the last line
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: must be at least 1")
    if args.launcher is None and (args.submit or args.launcher_flag):
        raise UserError("--submit and --launcher-flag belong to --launcher")
    if args.no_train and (args.list or args.launcher is not None):
        raise UserError("--no-train runs what follows the trainings; leave --list and --launcher out")
    if args.list and args.launcher is not None:
        raise UserError("--list runs nothing; leave --launcher out")
    if args.rate is not None and not args.list:
        raise UserError("--rate belongs to --list, which estimates times from it")
    if args.launcher is not None and args.jobs != 1:
        raise UserError("--jobs: a launcher submits every training that can begin; leave one of the two out")
    if args.rate is not None and not (math.isfinite(args.rate) and args.rate > 0):
        raise UserError(f"--rate={args.rate}: must be a number of FLOPs per second, above 0")

    from armd_jax.studies import plan as plans

    def check(words: Sequence[str]) -> None:
        if words[0] not in _AFTER or {"-h", "--help"} & set(words):
            raise UserError(f"only {', '.join(_AFTER)} can follow a training")
        _, rest = args.parser.parse_known_args(words)
        if rest:
            raise UserError(f"unknown argument {rest[0]!r} (see armd {words[0]} --help)")

    plan = plans.make(plans.load(args.config, overrides), args.config, args.out, check)
    jobs = plan.chosen(args.only)
    if args.list:
        from armd_jax.studies import costs

        listed, rate = costs.of(plan, jobs, args.rate)
        return show(args, {"members": listed, "rate": rate}, costs.as_text(listed, rate, args.jobs))
    if args.launcher is not None:
        from armd_jax.studies import launching

        commands, waiting = launching.commands(plan, jobs, args.launcher, args.launcher_flag)
        later = f"; {waiting} more wait for others that are not trained yet" if waiting else ""
        if args.submit:
            if reason := launching.submit(commands):
                return failed(reason, 1)
            return show(args, {"submitted": commands}, f"{args.out}: {len(commands)} jobs are submitted{later}")
        where = ". Run these lines from the root of the repository" if commands else ""
        print(f"trainings that can begin: {len(commands)}{later}{where}", file=sys.stderr)
        return show(args, {"commands": commands}, "\n".join(map(shlex.join, commands)))

    from armd_jax.studies import running

    result = running.run(plan, jobs, args.jobs, train=not args.no_train)
    show(args, {"out": str(args.out), **typed.as_plain(result)}, running.as_text(plan, result))
    return STOPPED if result.stopped else int(bool(result.failed))

"""`armd profile`: where a training step's time goes, by kind of operation."""

import argparse
from collections.abc import Sequence

from armd_jax import config as configs
from armd_jax.cli.arguments import folder, show
from armd_jax.errors import UserError

HELP = "Print where a training step's time goes, by kind of operation."
IF_MEMORY_RUNS_OUT = "trace fewer steps, or use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--run", required=True, type=folder, help="a training run")
    parser.add_argument("--rows", type=int, default=20, help="how many kinds to print; default: 20")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prints the table of the newest trace, or if there is none, the cost of the compiled step."""
    del overrides
    if args.rows < 1:
        raise UserError(f"--rows={args.rows}: must be at least 1")
    config = configs.read(args.run)

    from armd_jax.compilation import operations
    from armd_jax.training import profiling

    trace = profiling.newest(args.run)
    if trace is not None:
        times = operations.traced(trace)
        lines = [f"from the trace {trace}", f"{'kind of operation':<40} {'share':>7} {'count':>9} {'seconds':>10}"]
        for one in times[: args.rows]:
            lines.append(f"{one.kind[:40]:<40} {one.share:>7.1%} {one.count:>9,} {one.seconds:>10.4f}")
        if rest := times[args.rows :]:
            count, seconds = sum(one.count for one in rest), sum(one.seconds for one in rest)
            share = sum(one.share for one in rest)
            lines.append(f"{f'{len(rest)} others':<40} {share:>7.1%} {count:>9,} {seconds:>10.4f}")
        return show(args, {"trace": str(trace), "operations": times}, "\n".join(lines))
    work = operations.of_step(config)
    flops, moved = sum(one.flops for one in work) or 1.0, sum(one.bytes for one in work) or 1.0
    lines = [
        f"{args.run} has no trace (training.profile or SIGUSR1 writes one): the cost of a step as compiled for this"
        " machine, on one device, which is no time",
        f"{'kind of instruction':<40} {'of bytes':>8} {'of FLOPs':>8} {'count':>9}",
    ]
    for each in work[: args.rows]:
        lines.append(f"{each.kind:<40} {each.bytes / moved:>8.1%} {each.flops / flops:>8.1%} {each.count:>9,}")
    return show(args, {"trace": None, "operations": work}, "\n".join(lines))

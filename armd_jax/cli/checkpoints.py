"""`armd checkpoints`: list a run's checkpoints, each read whole and verified."""

import argparse
import dataclasses
from collections.abc import Sequence

from armd_jax.cli.arguments import folder, show

HELP = "List a run's checkpoints, each read whole and verified."
IF_MEMORY_RUNS_OUT = "a whole checkpoint has to fit; use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--run", required=True, type=folder, help="a training run")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Lists them. The exit code is 1 if there are none or one of them is damaged."""
    del overrides
    from armd_jax.training import checkpoint_listing

    found = checkpoint_listing.inspect(args.run)
    lines = [f"{'step':>10} {'bytes':>15} {'parameters':>15}  holds"]
    for one in found:
        holds = f"DAMAGED: {one.fault}" if one.fault else "whole: parameters, optimizer" + ", average" * one.average
        lines.append(f"{one.step:>10,} {one.bytes:>15,} {one.parameters:>15,}  {holds}")
    listed = [{**dataclasses.asdict(one), "whole": not one.fault} for one in found]
    show(args, {"run": str(args.run), "checkpoints": listed}, "\n".join(lines))
    return 0 if found and not any(one.fault for one in found) else 1

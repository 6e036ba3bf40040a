"""`armd report`: write report.html and its pictures into the run."""

import argparse
from collections.abc import Sequence

from armd_jax import files
from armd_jax.cli.arguments import add_out, check_out, folder, show

HELP = "Write report.html and its pictures into the run."
IF_MEMORY_RUNS_OUT = "use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--run", required=True, type=folder, help="a training run or an export")
    add_out(parser, "the page and its pictures")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Writes the page and prints its path; with `--json` also where the time went, null if the run does not say."""
    del overrides
    check_out(args)
    from armd_jax.report import page
    from armd_jax.training import goodput

    path = page.write(args.run, args.out)
    spent = goodput.of(files.read_json_lines(args.run / "events.jsonl"))
    return show(args, {"report": str(path), "goodput": spent}, f"{path}")

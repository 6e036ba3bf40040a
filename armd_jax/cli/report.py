"""`armd report`: write report.html and its pictures into the run, or the tables and pictures of a sweep."""

import argparse
import sys
from collections.abc import Sequence

from armd_jax import files, remote
from armd_jax.cli.arguments import add_out, check_out, folder, local_folder, show
from armd_jax.errors import UserError

HELP = "Write report.html and its pictures into the run, or sweep.html and tables into the folder of a sweep."
IF_MEMORY_RUNS_OUT = "use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", default=None, type=folder, help="a training run or an export")
    what.add_argument("--sweep", default=None, type=local_folder, help="the folder of a sweep")
    add_out(parser, "the page and its pictures", " or the sweep")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="PATH",
        help="a column of the sweep's table, such as eval.strided.4.bits_per_byte or metrics.eval/nll; may be repeated",
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="GLOB",
        help="only rows of a sweep that fit, such as 'model=*', and those that they are compared with; may be repeated",
    )
    parser.add_argument(
        "--baseline", default=None, metavar="ROW", help="the row of a sweep that ratios are to; default: the first"
    )
    parser.add_argument(
        "--reach",
        default=None,
        metavar="ROW",
        help="the row of a sweep whose final held-out loss others have to reach; default: the baseline",
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Writes the page and prints its path; with `--json` also where the time went, null if the run does not say.

    Of a sweep it prints the tables, with `--json` as one object, and on stderr the path.
    """
    del overrides
    check_out(args)
    if args.sweep is not None:
        return _run_sweep(args)
    for flag in ("metric", "rows", "baseline", "reach"):
        if getattr(args, flag):
            raise UserError(f"--{flag} is for the report of a sweep, and needs --sweep=DIR")
    from armd_jax.report import page
    from armd_jax.training import goodput

    path = page.write(args.run, args.out)
    spent = goodput.of(files.read_json_lines(args.run / "events.jsonl"))
    return show(args, {"report": str(path), "goodput": spent}, f"{path}")


def _run_sweep(args: argparse.Namespace) -> int:
    from armd_jax.report import sweep_page

    report = sweep_page.write(args.sweep, args.out, args.metric, args.baseline, args.reach, args.rows)
    show(args, {"report": str(report.page), **report.tables}, report.markdown.rstrip())
    print(remote.spelled(str(report.page)), file=sys.stderr)
    return 0

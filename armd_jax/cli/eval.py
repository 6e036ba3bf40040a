"""`armd eval`: likelihoods of held-out text, tasks of lm-evaluation-harness, suites, or texts that a judge scores."""

import argparse
import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Sequence

from armd_jax import config as configs
from armd_jax import files, typed
from armd_jax.cli import eval_generation, eval_suites
from armd_jax.cli.arguments import (
    add_out,
    add_run,
    check_out,
    check_seed,
    folder,
    show_and_keep,
    source,
    whole_numbers,
)
from armd_jax.errors import UserError
from armd_jax.names import Split

HELP = (
    "Exact left-to-right likelihood, expected likelihood over random orders, likelihood under strided orders;"
    " for a model without orders, the bound of its masked diffusion (ELBO). Or, with --tasks, lm-evaluation-harness,"
    " with --suite, zero-shot perplexities of other texts, or, with --judge, generative perplexity and variety of texts"
    " that the model writes."
)
IF_MEMORY_RUNS_OUT = "lower --batch"
# What is evaluated in place of held-out text, by the argument that asks for it, and the arguments that it takes.
_OTHERS = {
    "tasks": ("include_path", "limit", "streams"),
    "suite": (*eval_suites.OWN, "draws"),
    "judge": (*eval_generation.OWN, "streams"),
}
_HELD_OUT = ("split", "data", "streams", "draws", "orders", "rows", "shuffled", "price", "no_baselines")


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_run(parser)
    parser.add_argument(
        "--split", default=None, choices=typed.choices(Split), help="default: test, or valid if the text has no test"
    )
    parser.add_argument(
        "--data",
        default=None,
        type=source,
        help="other text: file, folder, glob, tfds:NAME or prepared folder. Text without splits is divided as for"
        " training, and only its test part is scored; baselines are of its own training part",
    )
    parser.add_argument(
        "--streams", default=None, help="numbers of streams of the strided orders; default: of 2,4,8 those that fit"
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=None,
        help="random orders per row, 0: none; likewise masks per row for a bound. Default: 1, for a denoiser 4",
    )
    parser.add_argument(
        "--orders",
        type=int,
        default=None,
        metavar="K",
        help="also bound the likelihood of the mixture over all orders, from both sides, by 1, 2, 4, … K random orders",
    )
    parser.add_argument(
        "--rows", type=int, default=None, metavar="R", help="rows that --orders scores, evenly spaced; default: 64"
    )
    parser.add_argument(
        "--shuffled",
        type=int,
        default=None,
        metavar="N",
        help="--orders bounds the mixture over orders in which N random tokens are shuffled; default: over all orders",
    )
    parser.add_argument(
        "--price",
        action="store_true",
        help="also take apart what streams cost: factorised blocks, and cold starts by place in the stream",
    )
    parser.add_argument("--batch", type=int, default=16, help="rows per network call")
    parser.add_argument("--seed", type=int, default=0, help="of the random orders and masks; draw d has seed + d")
    parser.add_argument(
        "--no-baselines",
        action="store_true",
        help="leave out the unigram model and the compressor, which read all training rows the first time",
    )
    parser.add_argument(
        "--tasks",
        default=None,
        metavar="NAME,NAME",
        help="instead of held-out text: tasks of lm-evaluation-harness, left to right or in one number of --streams",
    )
    parser.add_argument(
        "--include-path",
        default=None,
        type=folder,
        metavar="DIR",
        help="a folder of your own tasks, whose Python the harness runs",
    )
    parser.add_argument("--limit", type=int, default=None, help="documents of each task; default: all")
    eval_generation.add(parser)
    eval_suites.add(parser)
    add_out(parser, "eval.json (or lm_eval.json, suites.json, generation.json), and rows that have to be prepared,")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Scores the text, prints the figures, and keeps them in the run if the text is the run's own."""
    del overrides
    check_out(args)
    match _asked(args):
        case "tasks":
            return _tasks(args)
        case "suite":
            return eval_suites.run(args)
        case "judge":
            return eval_generation.run(args)
        case _:
            return _held_out(args)


def _asked(args: argparse.Namespace) -> str | None:
    """Which of `_OTHERS` is asked for; None: held-out text.

    Raises UserError if it is more than one, or if an argument is given that means nothing to it.
    """
    asked = [name for name in _OTHERS if getattr(args, name) is not None]
    if len(asked) > 1:
        raise UserError(f"{_flag(asked[0])} and {_flag(asked[1])} are two evaluations; ask for one at a time")
    chosen = asked[0] if asked else None
    own = _HELD_OUT if chosen is None else _OTHERS[chosen]
    for name in dict.fromkeys((*_HELD_OUT, *itertools.chain(*_OTHERS.values()))):
        value = getattr(args, name)
        if name not in own and value is not None and value is not False:  # 0 is a value: `in` would take it for False
            if chosen is not None:
                raise UserError(f"{_flag(name)} does not go together with {_flag(chosen)}")
            others = " or ".join(_flag(other) for other, names in _OTHERS.items() if name in names)
            raise UserError(f"{_flag(name)} belongs to {others}")
    return chosen


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _held_out(args: argparse.Namespace) -> int:
    """Scores held-out text."""
    streams = whole_numbers(args.streams or "2,4,8", "--streams")
    if (args.draws is not None and args.draws < 0) or args.batch < 1:
        raise UserError("--draws must be at least 0, --batch at least 1")
    for flag, number in (("--orders", args.orders), ("--rows", args.rows), ("--shuffled", args.shuffled)):
        if number is not None and number < 1:
            raise UserError(f"{flag}={number}: must be at least 1")
        if number is not None and args.orders is None:
            raise UserError(f"{flag} belongs to --orders=K, the number of random orders that every row is scored in")
    check_seed(args.seed)
    if args.data == "":
        raise UserError("--data is empty; name a file, a folder, a glob or tfds:NAME")
    config = configs.read(args.run)
    if not config.model.has_orders and args.streams is not None:
        raise UserError(f"--streams={args.streams}: a denoiser has no strided orders to score; leave it out")
    for flag, given in (("--orders", args.orders is not None), ("--price", args.price)):
        if given and not config.model.has_orders:
            raise UserError(
                f"{flag}: --run={args.run} is a denoiser (model.kind), which has no orders but a bound (ELBO)"
            )
    if args.shuffled is not None and args.shuffled > config.model.max_length:
        raise UserError(f"--shuffled={args.shuffled}: a row has model.max_length={config.model.max_length} tokens")
    # A denoiser has nothing but its bound, and from several draws that has a standard error.
    draws = args.draws if args.draws is not None else 1 if config.model.has_orders else 4

    from armd_jax.training import host_memory

    host_memory.settle()  # before JAX is imported

    from armd_jax.data import mixture
    from armd_jax.evaluation import baselines, held_out, perplexity, results, tables
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    mesh = args.mesh and sharding.make_mesh(args.mesh)
    if mesh is not None and args.batch % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"--batch={args.batch}: is not divisible by the {parts} devices of the axes data and fsdp")
    lm = load(args.run, not args.no_ema, mesh)
    with contextlib.ExitStack() as stack:
        rows = args.out or args.run
        if files.unwritable(rows):  # a run on a read-only file system: rows that nobody prepared live for this call
            rows = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="armd-eval-")))
        data = held_out.find(args.run, config, args.split, args.data, rows)
        # Rows that were prepared ahead may be shorter than the model's.
        wrong = [count for count in streams if data.length % count]
        if wrong and args.streams is not None:
            raise UserError(
                f"--streams={args.streams}: {wrong[0]} does not divide the {data.length} tokens of a row"
                f" ({mixture.place_of(data)})"
            )
        # Beside the rows, unless it is only the run that says where they are: that must not choose where to write. Of a
        # mixture, which has no folder of its own, in the run.
        folders = [source.folder for source in mixture.sources_of(data)]
        beside = [folder / baselines.FILE for folder in folders if len(folders) == 1]
        chosen = args.data is not None or all(f.absolute().is_relative_to(args.run.absolute()) for f in folders)
        found = perplexity.evaluate(
            lm,
            data,
            held_out.chosen_split(args.split, data.splits),
            streams,
            draws,
            config.order,
            args.batch,
            args.seed,
            mesh=mesh,
            reset=config.data.reset,
            with_baselines=not args.no_baselines,
            kept_in=beside if chosen and beside else [args.run / baselines.FILE, *beside],
            num_orders=args.orders or 0,
            num_rows=args.rows or 64,
            shuffled=args.shuffled,
            with_price=args.price,
        )
    found = dataclasses.replace(found, ema=not args.no_ema, other_text=args.data is not None)
    keep = args.run if args.data is None else None
    return show_and_keep(args, found.as_dict(), tables.as_text(found), keep, results.EVALUATION_FILE)


def _tasks(args: argparse.Namespace) -> int:
    """Runs tasks of lm-evaluation-harness."""
    streams = whole_numbers(args.streams or "1", "--streams")
    if len(streams) > 1:
        raise UserError(f"--streams={args.streams}: with --tasks, give one number of streams")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks={args.tasks!r}: name at least one task")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit={args.limit}: must be at least 1")
    if args.batch < 1:
        raise UserError(f"--batch={args.batch}: must be at least 1")
    check_seed(args.seed)
    if not configs.read(args.run).model.has_orders:
        raise UserError(f"--run={args.run}: a denoiser (model.kind) has a bound only; --tasks need a likelihood")

    from armd_jax.evaluation import lm_eval
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    tasks, found = lm_eval.find_tasks(names, args.include_path)
    lm = load(args.run, not args.no_ema, args.mesh and sharding.make_mesh(args.mesh))
    model = lm_eval.Armd(lm, streams[0], seed=args.seed, batch_size=args.batch)
    result = lm_eval.evaluate(model, tasks, found, args.limit)
    return show_and_keep(args, result, lm_eval.as_text(result), args.run, lm_eval.FILE)

"""`armd eval --suite`: zero-shot perplexities by published protocols, and LAMBADA's last words."""

import argparse
import contextlib
import functools
import pathlib
import typing

from armd_jax import config as configs
from armd_jax import files, typed
from armd_jax.cli.arguments import check_seed, folder, show_and_keep
from armd_jax.errors import UserError, nearest
from armd_jax.names import SuiteProtocol, SuiteSet

_PROTOCOLS: tuple[SuiteProtocol, ...] = typing.get_args(SuiteProtocol)
_SETS: tuple[SuiteSet, ...] = typing.get_args(SuiteSet)
OWN = ("suite_data", "suite_tfds", "suite_sets", "limit_rows")  # arguments that belong to `--suite`


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--suite",
        default=None,
        choices=(*_PROTOCOLS, "all"),
        help="instead of held-out text: zero-shot perplexities by this published protocol, and LAMBADA's last words."
        " A call replaces suites.json, also the figures of sets that it does not measure",
    )
    parser.add_argument(
        "--suite-data", default=None, type=folder, metavar="DIR", help="the folder with the texts of the suites"
    )
    parser.add_argument(
        "--suite-tfds", default=None, type=folder, metavar="DIR", help="a folder of TFDS datasets, looked into as well"
    )
    parser.add_argument(
        "--suite-sets", default=None, metavar="NAME,NAME", help=f"of {', '.join(_SETS)}; default: those that are there"
    )
    parser.add_argument("--limit-rows", type=int, default=None, help="chunks (or passages) of each set; default: all")


def run(args: argparse.Namespace) -> int:
    """Scores the sets that are there, prints the figures, and keeps them in the run."""
    if args.suite_data is None and args.suite_tfds is None:
        raise UserError("--suite needs its texts: --suite-data=FOLDER, or --suite-tfds=FOLDER of TFDS datasets")
    for flag, place in (("--suite-data", args.suite_data), ("--suite-tfds", args.suite_tfds)):
        if place is not None and not place.is_dir():
            raise UserError(f"{flag}={place}: is not a folder")
    for flag, number in (("--limit-rows", args.limit_rows), ("--batch", args.batch), ("--draws", args.draws)):
        if number is not None and number < 1:
            raise UserError(f"{flag}={number}: must be at least 1")
    check_seed(args.seed)
    named = _names(args.suite_sets)
    config = configs.read(args.run)
    if config.model.has_orders and args.draws is not None:
        raise UserError("--draws: left to right, the likelihood is exact; only the bound of a denoiser is drawn")

    from armd_jax.training import host_memory

    host_memory.settle()  # before JAX is imported

    from armd_jax.core.context import PLAIN, Context
    from armd_jax.evaluation import suites, suites_results
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    protocols = [protocol for protocol in _PROTOCOLS if args.suite in (protocol, "all")]
    found, missing = suites.find(protocols, named or _SETS, args.suite_data, args.suite_tfds, needed=bool(named))
    mesh = args.mesh and sharding.make_mesh(args.mesh)
    if mesh is not None and args.batch % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"--batch={args.batch}: is not divisible by the {parts} devices of the axes data and fsdp")
    lm = load(args.run, not args.no_ema, mesh)
    if lm.tokenizer is None:
        raise UserError(f"--run={args.run}: has no tokenizer, and suites are texts")
    scorer = suites.Scorer(
        lm,
        lm.tokenizer,
        draws=1 if config.model.has_orders else args.draws or 4,
        batch_size=args.batch,
        seed=args.seed,
        limit=args.limit_rows,
        reset=config.data.reset,
        ema=not args.no_ema,
        context=PLAIN if mesh is None else Context(sharding.constrain(mesh)),
    )
    result = suites.evaluate(
        scorer, found, missing, functools.partial(_keep, (args.out or args.run) / suites_results.FILE)
    )
    return show_and_keep(args, result, suites_results.as_text(result), args.run, suites_results.FILE)


def _keep(file: pathlib.Path, result: object) -> None:
    """Writes what is known so far. If that is impossible, `show_and_keep` says so at the end."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, typed.to_json(result, indent=2) + "\n")


def _names(text: str | None) -> list[SuiteSet]:
    """The sets that `--suite-sets` names, each once; none if it is not given."""
    if text is None:
        return []
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"--suite-sets={text!r}: name at least one of {', '.join(_SETS)}")
    for word in words:
        if word not in _SETS:
            raise UserError(f"--suite-sets={text!r}: there is no set {word!r}{nearest(word, _SETS)}")
    return [name for name in _SETS if name in words]

"""`armd <verb>`: finds the verb, and turns what goes wrong into one line and an exit code.

Every verb is a module of this folder with `HELP` (one sentence), `IF_MEMORY_RUNS_OUT` (what to do then, for a message),
`add(parser)`, which declares its arguments, and `run(args, overrides)`, which does the work and returns the exit code.
Verbs print progress on stderr and results on stdout, with `--json` as one JSON object.

Exit codes: 0 if the verb did its job, which includes printing its result, except for training; 2, with one line
`error: …` on stderr, for a mistake in what the user gave; 75 if a signal stopped training and everything was saved, so
that the same command continues; 1 if something else failed.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from armd_jax import files, remote, streams
from armd_jax.cli import (
    checkpoints,
    compilation_cache,
    export,
    importing,
    prepare,
    profile,
    report,
    sample,
    serve,
    sweep,
    train,
)
from armd_jax.cli import compile as compile_verb
from armd_jax.cli import eval as eval_verb
from armd_jax.cli.arguments import failed
from armd_jax.errors import UserError, out_of_memory

VERBS = {
    "prepare": prepare,
    "train": train,
    "sweep": sweep,
    "eval": eval_verb,
    "sample": sample,
    "export": export,
    "import": importing,
    "checkpoints": checkpoints,
    "report": report,
    "profile": profile,
    "serve": serve,
    "compile": compile_verb,
}


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses `--flag=--`, of which argparse makes an empty list."""
        words = sys.argv[1:] if args is None else list(args)
        if wrong := [word for word in words if word.startswith("-") and word.endswith("=--")]:
            raise UserError(f"{wrong[0]}: '--' is no value (see {self.prog} --help)")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. What it does depends on nobody who reads what it prints."""
    _escape_what_cannot_be_shown()
    if not isinstance(sys.unraisablehook, _QuietClosedLoops):
        sys.unraisablehook = _QuietClosedLoops(sys.unraisablehook)
    with streams.forgiving() as both:
        try:
            return _run(argv, output=both[0])
        finally:
            remote.forget_all()
            for stream in both:
                stream.let_go()


def _run(argv: Sequence[str] | None, output: streams.Forgiving) -> int:
    try:
        args, rest = _parser().parse_known_args(argv)
        if rest and not (args.takes_overrides and rest[0].startswith("--config.")):
            raise UserError(f"unknown argument {rest[0]!r} (see armd {args.verb} --help)")
        code = _run_verb(args, rest)
        output.flush()
        if code or not args.result_is_printed or output.fault is None:
            return code
        # `| head` has read what it wanted, and needs no word about it.
        return 1 if isinstance(output.fault, BrokenPipeError) else failed(f"standard output: {output.fault}", 1)
    except UserError as error:
        return failed(str(error))
    except OSError as error:  # a name that no file system takes, a folder that may not be written, a full disk
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        full = error.errno in files.FULL
        return failed(f"{reason}; free some space and run it again", 1) if full else failed(reason)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _run_verb(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs the verb. If memory runs out, says how many bytes were asked for and what to lower."""
    verb = VERBS[args.verb]
    compilation_cache.settle()  # before a verb imports JAX
    try:
        remote.fetch_all()
        code = verb.run(args, rest)
        remote.store_all()
        return code
    except Exception as error:
        asked = out_of_memory(error)
        if asked is None:
            raise
        return failed(f"out of memory{asked}; {verb.IF_MEMORY_RUNS_OUT}", 1)


class _QuietClosedLoops:
    """A hook for what goes wrong where nobody can catch it, which says nothing of "Event loop is closed".

    If a save or a restore fails, Orbax closes its event loop, and TensorStore's threads then fail to report to it, some
    fifty times, also while the process ends. The failure itself is told by who asked for the save.
    """

    def __init__(self, shows: Callable[[Any], object]) -> None:
        self._shows = shows

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._shows(unraisable)


def _escape_what_cannot_be_shown() -> None:
    """Lets characters that the terminal's encoding lacks appear as escapes: output is no reason to fail.

    Among them is what stands for bytes in the name of a file that is not text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if it is closed, or replaced by a program that runs this one
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="armd", description="Auto-Regressive Masked Diffusion language models.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        verb.set_defaults(takes_overrides=False, result_is_printed=True, parser=parser)
        verb.add_argument("--json", action="store_true", help="print results as one JSON object")
        module.add(verb)
    return parser

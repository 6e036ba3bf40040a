"""`armd <verb>`: prepare, train, eval, sample, export, report, checkpoints, compile.

Every verb prints progress on stderr and results on stdout (`--json`: one JSON object). Exit codes: 0 only where it did
its job; 2 with one line `error: …` on stderr for a mistake in what the user gave; 75 where a signal stopped training
and everything was saved (the same command continues); 1 where something else failed.
"""

import argparse
import errno
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from armd_jax.config import from_config_dict
from armd_jax.errors import UserError
from armd_jax.experiment_file import apply_overrides, load_config_file

if TYPE_CHECKING:
    from armd_jax.config import Config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        args, rest = _parser().parse_known_args(argv)
        if rest and not (args.verb in ("train", "compile") and rest[0].startswith("--config.")):
            raise UserError(f"unknown argument {rest[0]!r} (see armd {args.verb} --help)")
        return args.run_verb(args, rest)
    except UserError as error:
        return _failed(str(error))
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 1
    except OSError as error:  # a name that no file system takes, a folder that may not be written, a full disk
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _failed(f"{reason}; free some space and run it again", 1) if full else _failed(reason)
    except MemoryError as error:
        return _failed(f"not enough memory: {error}; use a smaller batch, length or model")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _failed(reason: str, code: int = 2) -> int:
    line = " ".join(reason.split()).encode(errors="backslashreplace").decode()  # of a command line that is not UTF-8
    print(f"error: {line}", file=sys.stderr)
    return code


def _folder(text: str) -> pathlib.Path:
    """A folder argument. An empty one, as an unset shell variable gives, would silently be the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("expected the name of a folder")
    return pathlib.Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="armd", description="Auto-Regressive Masked Diffusion language models.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run_verb=run)
        sub.add_argument("--json", action="store_true", help="print results as one JSON object")
        return sub

    sub = verb("prepare", _prepare, "Tokenize a corpus and pack it into rows, ahead of training.")
    sub.add_argument("--source", default="", help="file, folder, glob or tfds:NAME; empty: the embedded corpus")
    sub.add_argument("--out", required=True, type=_folder, help="folder to write")
    sub.add_argument("--tokenizer", default="sentencepiece", help="sentencepiece, bytes or a vocabulary folder")
    sub.add_argument("--vocab-size", type=int, default=2048, help="of a trained tokenizer")
    sub.add_argument("--length", type=int, default=1024, help="tokens a row")
    sub.add_argument("--text-field", default="text", help="of .jsonl objects and TFDS examples")
    sub.add_argument("--skip-damaged", action="store_true", help="leave out documents that are not text, counted")

    sub = verb("train", _train, "Train a model, or continue the run that is in the workdir.")
    sub.add_argument("--config", required=True, help="experiment file, file.py or file.py:arg")
    sub.add_argument("--workdir", required=True, type=_folder, help="folder of the run")
    sub.epilog = "Fields of the config are set with --config.section.field=value."
    sub.add_argument("--debug-nans", action="store_true", help="stop at the operation that first gives NaN; slow")
    sub.add_argument("--distributed", default="auto", choices=("auto", "on", "off"), help="join other processes")
    sub.add_argument("--coordinator", default=None, metavar="HOST:PORT", help="of process 0, where nothing tells it")
    sub.add_argument("--num-processes", type=int, default=None)
    sub.add_argument("--process-id", type=int, default=None)

    def run_argument(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--run", required=True, type=_folder, help="a training run or an export")
        sub.add_argument("--no-ema", action="store_true", help="take the raw weights, not their average")

    sub = verb("eval", _eval, "Exact left-to-right likelihood, expected likelihood over random orders, strided orders.")
    run_argument(sub)
    sub.add_argument("--split", default="test", choices=("train", "valid", "test"))
    sub.add_argument("--data", default=None, help="other text: file, folder, glob or tfds:NAME")
    sub.add_argument("--streams", default=None, help="strided orders to score; default: of 2,4,8 those that fit")
    sub.add_argument("--draws", type=int, default=1, help="random orders a row; 0: none")
    sub.add_argument("--batch", type=int, default=16)
    sub.add_argument("--seed", type=int, default=0)

    sub = verb("sample", _sample, "Draw samples in one or several parallel streams, and time it.")
    run_argument(sub)
    sub.add_argument("--streams", default="1", help="one or more numbers of streams, such as 1,2,4,8")
    sub.add_argument("--batch", type=int, default=1)
    sub.add_argument("--length", type=int, default=None, help="tokens; default: the model's max_length")
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--top-k", type=int, default=None)
    sub.add_argument("--top-p", type=float, default=None)
    sub.add_argument("--prompt", default="", help="text to continue")
    sub.add_argument("--suffix", default="", help="text to end with: what lies between is filled in")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb("export", _export, "Write safetensors, config.json and tokenizer files.")
    run_argument(sub)
    sub.add_argument("--out", required=True, type=_folder, help="folder to write; must not exist")

    sub = verb("checkpoints", _checkpoints, "List a run's checkpoints, each read whole and verified.")
    sub.add_argument("--run", required=True, type=_folder, help="a training run")

    sub = verb("report", _report, "Write report.html and its pictures into the run.")
    sub.add_argument("--run", required=True, type=_folder, help="a training run or an export")

    sub = verb("compile", _compile, "Compile a training step or the sampler for a TPU slice, on a machine without one.")
    sub.add_argument("--config", required=True, help="experiment file, file.py or file.py:arg")
    sub.add_argument("--topology", required=True, help="chip and slice, such as v5e:4x4, v5p:8x8x8")
    sub.add_argument("--slices", type=int, default=1, help="so many slices, joined by the data centre's network")
    sub.add_argument("--what", default="train", choices=("train", "sample"))
    sub.add_argument("--batch", type=int, default=0, help="sample: rows; default: one a device of data x fsdp")
    sub.add_argument("--streams", type=int, default=1, help="sample: parallel streams")
    sub.add_argument("--dump-hlo", type=pathlib.Path, default=None, metavar="FILE", help="write the compiled program")
    sub.epilog = "Exit code 0 where it fits the chip's memory, 1 where not. --config.section.field=value sets a field."
    return parser


def _print(args: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    from armd_jax import typed

    print(typed.to_json(result) if args.json else text)
    return 0


def _prepare(args: argparse.Namespace, _: Sequence[str]) -> int:
    import dataclasses

    from armd_jax.data import packing

    data = {"path": args.source, "tokenizer": args.tokenizer, "vocab_size": args.vocab_size}
    data |= {"text_field": args.text_field, "damaged": "skip" if args.skip_damaged else "error"}
    # The other sections only have to be valid with this row length.
    config = from_config_dict({"data": data, "model": {"max_length": args.length}, "order": {"max_permuted": 1}})
    prepared = packing.prepare_into(config.data, args.length, args.out)
    splits = {name: dataclasses.asdict(prepared.counts(name)) for name in prepared.splits}
    lines = [f"{args.out}: rows of {args.length} tokens, vocabulary {prepared.tokenizer.vocab_size}"]
    lines += [
        f"  {name:<6} {c['documents']:>9,} documents {c['bytes']:>13,} bytes {c['tokens']:>12,} tokens"
        f" {c['rows']:>9,} rows"
        for name, c in splits.items()
    ]
    left_out = {name: dataclasses.asdict(counts) for name, counts in prepared.left_out.items()}
    for name, c in left_out.items():
        if c["empty"] or c["damaged"]:
            lines.append(f"  left out of {name}: {c['empty']:,} documents without text, {c['damaged']:,} damaged")
            lines[-1] += f" (the first: {c['first_damaged']})" if c["damaged"] else ""
    return _print(args, {"out": str(args.out), "splits": splits, "left_out": left_out}, "\n".join(lines))


def _train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    values = load_config_file(args.config)
    apply_overrides(values, rest)
    config = from_config_dict(values)

    _settle_host_memory()

    from armd_jax.training import distributed

    several = distributed.initialize(args.distributed, args.coordinator, args.num_processes, args.process_id)
    run = lambda: _train_here(args, config)  # noqa: E731
    return distributed.run_together(run) if several else run()


def _settle_host_memory() -> None:
    """To be called before JAX is imported."""
    from armd_jax.training import host_memory

    if host_memory.trains_on_cpu():
        host_memory.keep_freed_memory()


def _train_here(args: argparse.Namespace, config: "Config") -> int:
    import jax

    from armd_jax.training import train
    from armd_jax.training.faults import RunFailed
    from armd_jax.training.preemption import STOPPED

    primary = jax.process_index() == 0
    try:
        start = _initial_params if config.training.init_from else None
        if start and not (args.workdir / "config.json").exists():
            _check_initial(config)
        result = train.train(config, args.workdir, start, debug_nans=args.debug_nans)
    except RunFailed as error:
        return _failed(str(error), 1)
    last = config.training.num_steps
    at = int(result.state.step)
    done = {"workdir": str(args.workdir), "step": at, "steps_done": result.steps_done, "stopped": result.stopped}
    if result.stopped:
        text = f"stopped by a signal after step {at}, which is saved; the same command continues"
    elif not result.steps_done:
        text = f"all {last} steps are done, nothing left to do"
    else:
        text = f"trained {result.steps_done} steps, now at {at}"
    if primary:
        _print(args, done, f"{args.workdir}: {text}")
    return STOPPED if result.stopped else 0


def _check_initial(config: "Config") -> None:
    """UserError where the model of `training.init_from` is not the new run's: before any text is prepared."""
    import dataclasses

    from armd_jax import config as configs
    from armd_jax.config import read as read_config

    source = pathlib.Path(config.training.init_from)
    theirs, ours = dataclasses.asdict(read_config(source).model), dataclasses.asdict(config.model)
    for name in configs.weight_fields():
        if theirs[name] != ours[name]:
            raise UserError(f"training.init_from={source}: model.{name} is {theirs[name]!r} there, {ours[name]!r} here")


def _initial_params(config: "Config", data: Any, mesh: Any) -> Any:
    """The weights of `training.init_from` on the mesh; UserError where their tokenizer is not the data's."""
    from armd_jax.data import tokenizers
    from armd_jax.interop.load import load

    source = pathlib.Path(config.training.init_from)
    if tokenizers.load(source / "tokenizer").hash != data.tokenizer.hash:
        raise UserError(
            f"training.init_from={source}: another vocabulary than the data's; set"
            f" data.tokenizer={source / 'tokenizer'}"
        )
    return load(source, mesh=mesh).params


def _whole_numbers(text: str, flag: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",") if word]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{flag}={text!r}: expected whole numbers from 1 such as 1,2,4")
    return numbers


def _eval(args: argparse.Namespace, _: Sequence[str]) -> int:
    streams = _whole_numbers(args.streams or "2,4,8", "--streams")
    if args.draws < 0 or args.batch < 1:
        raise UserError("--draws must be at least 0, --batch at least 1")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed={args.seed}: must be in [0, 2**31)")
    if args.data == "":
        raise UserError("--data is empty; name a file, a folder, a glob or tfds:NAME")

    _settle_host_memory()

    from armd_jax import files, typed
    from armd_jax.config import read as read_config
    from armd_jax.evaluation import held_out, perplexity, results
    from armd_jax.interop.load import load

    config = read_config(args.run)
    wrong = [count for count in streams if config.model.max_length % count]
    if wrong and args.streams is not None:
        raise UserError(
            f"--streams={args.streams}: {wrong[0]} does not divide model.max_length={config.model.max_length}"
        )
    lm = load(args.run, ema=not args.no_ema)
    data = held_out.find(args.run, config, args.split, args.data)
    found = perplexity.evaluate(lm, data, args.split, streams, args.draws, config.order, args.batch, args.seed)
    if args.data is None:
        files.write(args.run / results.EVALUATION_FILE, typed.to_json(found.as_dict(), indent=2) + "\n")
    return _print(args, found.as_dict(), perplexity.as_text(found))


def _sample(args: argparse.Namespace, _: Sequence[str]) -> int:
    streams = _whole_numbers(args.streams, "--streams")
    for flag, text in (("--prompt", args.prompt), ("--suffix", args.suffix)):
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise UserError(f"{flag}={text!r}: is not UTF-8 text")

    import dataclasses

    from armd_jax import files, typed
    from armd_jax.evaluation import results, samples
    from armd_jax.interop.load import load

    lm = load(args.run, ema=not args.no_ema)
    drawn = samples.draw(
        lm,
        streams,
        batch=args.batch,
        length=lm.config.max_length if args.length is None else args.length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        prompt=args.prompt,
        suffix=args.suffix,
        seed=args.seed,
    )
    files.write(args.run / results.SAMPLES_FILE, typed.to_json(drawn, indent=2) + "\n")
    return _print(args, dataclasses.asdict(drawn), samples.as_text(drawn))


def _export(args: argparse.Namespace, _: Sequence[str]) -> int:
    from armd_jax.config import read as read_config
    from armd_jax.interop import safetensors_format
    from armd_jax.interop.load import load

    config = read_config(args.run)
    safetensors_format.write(load(args.run, ema=not args.no_ema), config, args.out)
    return _print(args, {"out": str(args.out)}, f"{args.out}: {safetensors_format.WEIGHTS}, config.json, tokenizer/")


def _checkpoints(args: argparse.Namespace, _: Sequence[str]) -> int:
    import dataclasses

    from armd_jax.training import checkpoints

    found = checkpoints.inspect(args.run)
    lines = [f"{'step':>10} {'bytes':>15} {'parameters':>15}  holds"]
    for one in found:
        holds = f"DAMAGED: {one.fault}" if one.fault else "whole: parameters, optimizer" + ", average" * one.average
        lines.append(f"{one.step:>10,} {one.bytes:>15,} {one.parameters:>15,}  {holds}")
    result = {
        "run": str(args.run),
        "checkpoints": [{**dataclasses.asdict(one), "whole": not one.fault} for one in found],
    }
    _print(args, result, "\n".join(lines))
    return 0 if found and not any(one.fault for one in found) else 1


def _report(args: argparse.Namespace, _: Sequence[str]) -> int:
    from armd_jax.report import page

    written = page.write(args.run)
    return _print(args, {"report": str(written)}, f"{written}")


def _compile(args: argparse.Namespace, rest: Sequence[str]) -> int:
    values = load_config_file(args.config)
    apply_overrides(values, rest)
    config = from_config_dict(values)
    if args.batch < 0 or args.streams < 1:
        raise UserError("--batch must be at least 0 and --streams at least 1")

    from armd_jax.compilation import topology

    where = topology.parse(args.topology, args.slices)
    topology.prepare_environment()  # before JAX is imported

    from armd_jax.compilation import compile as compilation

    try:
        result = compilation.report(config, args.config, where, args.what, args.batch, args.streams, args.dump_hlo)
    except compilation.CompilerFailed as error:
        return _failed(f"--topology={args.topology}: {error}", 1)
    _print(args, result, compilation.table(result))
    return 0 if result["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())

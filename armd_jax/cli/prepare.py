"""`armd prepare`: tokenize a corpus and pack it into rows, ahead of training."""

import argparse
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Sequence

from armd_jax import remote
from armd_jax.cli.arguments import local, out_folder, show, source
from armd_jax.config import from_config_dict
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError, shown

HELP = "Tokenize a corpus and pack it into rows, ahead of training."
IF_MEMORY_RUNS_OUT = "cut very long documents into shorter ones, or lower --vocab-size"

_MOST_PARTS = 99_999  # as many as their names have digits for


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--source", default="", type=source, help="file, folder, glob or tfds:NAME; empty: the embedded corpus"
    )
    parser.add_argument("--out", required=True, type=out_folder, help="folder to write")
    parser.add_argument(
        "--tokenizer", default="sentencepiece", type=local, help="sentencepiece, bytes or a vocabulary folder"
    )
    parser.add_argument("--vocab-size", type=int, default=2048, help="vocabulary size of a tokenizer that is trained")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--text-field", default="text", help="field of .jsonl objects and TFDS examples with the text")
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="processes that tokenize; what is written is the same for any number; default: as many as there are cores",
    )
    parser.add_argument("--skip-damaged", action="store_true", help="leave out and count documents that are not text")
    parser.add_argument(
        "--no-split-by-name",
        action="store_true",
        help="let words such as train and test in the names of files mean nothing: documents are divided by their text",
    )
    parser.add_argument(
        "--shard",
        default=None,
        type=_shard,
        metavar="i/n",
        help="make only part i of n, from 0 to n - 1, beside --out; each part on any machine that has these folders",
    )
    parser.add_argument(
        "--merge", default=None, type=int, metavar="n", help="make --out of the n parts, the same as without parts"
    )
    parser.add_argument(
        "--beam", default=None, type=int, metavar="n", help="make n parts with Apache Beam (extra beam), and then --out"
    )
    parser.add_argument(
        "--beam-flag",
        default=[],
        action="append",
        metavar="FLAG",
        help="an option of Beam, such as --beam-flag=--runner=FlinkRunner; may be repeated; default: this machine",
    )


def _shard(text: str) -> tuple[int, int]:
    """The type of `--shard`."""
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if number >= count:
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected i/n with i from 0 to n - 1, such as 0/16 … 15/16")
    return number, count


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prepares the data, or a part of them, and prints what they hold."""
    del overrides
    from armd_jax.data import beam, encoding, merging, packing, parts, prepared
    from armd_jax.data.corpora import open_corpus
    from armd_jax.data.manifest import MANIFEST_FILE, TOKENIZER_FOLDER, known_files

    workers = encoding.cores() if args.workers is None else args.workers
    if workers < 1:
        raise UserError(f"--workers={workers}: must be at least 1")
    if prepared.folder_of(args.source) is not None:
        raise UserError(
            f"--source={args.source}: holds rows that were prepared already; train on them with"
            f" --config.data.path={shlex.quote(args.source)}"
        )
    data = {"path": args.source, "tokenizer": args.tokenizer, "vocab_size": args.vocab_size}
    data |= {"text_field": args.text_field, "damaged": "skip" if args.skip_damaged else "error"}
    data["split_by_name"] = not args.no_split_by_name
    # The other sections only have to be valid with this row length.
    config = from_config_dict({"data": data, "model": {"max_length": args.length}, "order": {"max_permuted": 1}})
    count = _count(args)
    if args.shard:
        return _make_part(args, config.data, workers)
    work = parts.Work(config.data, args.out, count or 1, _address(args.out))
    merges = bool(count) and not (args.out / MANIFEST_FILE).is_file()  # if it is whole, its parts may be gone
    if args.beam and merges:
        packing.check_out(args.out)
        beam.make_parts(work, workers, args.beam_flag)
    if count:
        rows = merging.merge(work, args.length)
        corpus = open_corpus(config.data, known_files(args.out))
    else:
        corpus = open_corpus(config.data, known_files(args.out))
        rows = packing.prepare_into(config.data, args.length, args.out, corpus=corpus, workers=workers)
    splits = {name: dataclasses.asdict(rows.counts(name)) for name in rows.splits}
    left_out = {name: dataclasses.asdict(counts) for name, counts in rows.left_out.items()}
    lines = [f"{args.out}: rows of {args.length} tokens, vocabulary {rows.tokenizer.vocab_size}"]
    for name, counts in splits.items():
        lines.append(
            f"  {name:<6} {counts['documents']:>9,} documents {counts['bytes']:>13,} bytes"
            f" {counts['tokens']:>12,} tokens {counts['rows']:>9,} rows"
        )
    for name, counts in left_out.items():
        if counts["empty"] or counts["damaged"]:
            lines.append(
                f"  left out of {name}: {counts['empty']:,} documents without text, {counts['damaged']:,} damaged"
            )
            lines[-1] += f" (the first: {counts['first_damaged']})" if counts["damaged"] else ""
    # The tokenizer is named too, because experiment files name one of their own.
    words = [f"--config.data.path={args.out}", f"--config.data.tokenizer={args.out / TOKENIZER_FOLDER}"]
    words += [f"--config.model.max_length={args.length}"]
    train = f"armd train --config=FILE.py --workdir=RUN {shlex.join(words)}"
    lines.append(f"to train on them, here or on another machine: {train}")
    lines += [f"{work.folder} can be removed now"] if merges else []
    result = {"out": str(args.out), "selection": dataclasses.asdict(corpus.selection)}
    result |= {"splits": splits, "left_out": left_out, "train": train}
    return show(args, result, "\n".join(lines))


def _count(args: argparse.Namespace) -> int | None:
    """How many parts there are; None: no parts. Raises UserError if the arguments about them contradict one another."""
    counts = {"--shard": args.shard and args.shard[1], "--merge": args.merge, "--beam": args.beam}
    given = {flag: count for flag, count in counts.items() if count is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: only one of them can be given")
    if args.beam_flag and args.beam is None:
        raise UserError("--beam-flag: needs --beam=n")
    for flag, count in given.items():
        if not 1 <= count <= _MOST_PARTS:
            raise UserError(f"{flag}: {count} parts; there may be 1 to {_MOST_PARTS:,}")
    return next(iter(given.values()), None)


def _address(out: pathlib.Path) -> str:
    copy = remote.copy_of(out)
    return "" if copy is None else copy.address


def _make_part(args: argparse.Namespace, data: DataConfig, workers: int) -> int:
    from armd_jax.data import packing, parts

    packing.check_out(args.out)  # what cannot be merged there later need not be made
    number, count = args.shard
    work = parts.Work(data, args.out, count, _address(args.out))
    note = parts.prepare_part(work, number, workers)
    counts = {name: getattr(note, name) for name in ("documents", "bytes", "tokens")}
    text = f"{work.place(number)}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items())
    text += f"\nwhen all {count} parts are there: the same command with --merge={count} in the place of --shard"
    return show(args, {"part": work.place(number), **counts}, text)

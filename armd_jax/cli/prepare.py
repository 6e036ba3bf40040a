"""`armd prepare`: tokenize a corpus and pack it into rows, ahead of training."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence

from armd_jax.cli.arguments import folder, local, show, source
from armd_jax.config import from_config_dict
from armd_jax.errors import UserError

HELP = "Tokenize a corpus and pack it into rows, ahead of training."
IF_MEMORY_RUNS_OUT = "cut very long documents into shorter ones, or lower --vocab-size"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--source", default="", type=source, help="file, folder, glob or tfds:NAME; empty: the embedded corpus"
    )
    parser.add_argument("--out", required=True, type=folder, help="folder to write")
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


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prepares the data and prints what they hold."""
    del overrides
    from armd_jax.data import encoding, packing, prepared
    from armd_jax.data.corpora import open_corpus
    from armd_jax.data.manifest import known_files

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
    words = [f"--config.data.path={args.out}", f"--config.data.tokenizer={args.out / packing.TOKENIZER_FOLDER}"]
    words += [f"--config.model.max_length={args.length}"]
    train = f"armd train --config=FILE.py --workdir=RUN {shlex.join(words)}"
    lines.append(f"to train on them, here or on another machine: {train}")
    result = {"out": str(args.out), "selection": dataclasses.asdict(corpus.selection)}
    result |= {"splits": splits, "left_out": left_out, "train": train}
    return show(args, result, "\n".join(lines))

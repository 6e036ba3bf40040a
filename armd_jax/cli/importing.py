"""`armd import`: a pretrained autoregressive model, made into an export that every other verb takes."""

import argparse
from collections.abc import Sequence
from typing import get_args

from armd_jax.cli.arguments import folder, new_folder, on_cpu, show
from armd_jax.names import ImportAggregator

HELP = "Make an ARMD of a pretrained autoregressive model: a Hugging Face folder, a GGUF file, or a run."
IF_MEMORY_RUNS_OUT = "the largest array of the weights has to fit twice; use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        type=folder,
        help="a Hugging Face folder, a .gguf file, or a run",
    )
    parser.add_argument("--out", required=True, type=new_folder, help="folder to write; must not exist")
    parser.add_argument(
        "--two-stream",
        type=int,
        default=None,
        help="M, how many of the layers are two-stream layers; the left-to-right likelihood is the same for any;"
        " default: half of them",
    )
    parser.add_argument(
        "--max-length", type=int, default=None, help="N, tokens of a row; default: the source's, at most 1024"
    )
    parser.add_argument(
        "--aggregator",
        choices=get_args(ImportAggregator),
        default=None,
        help="neighbours (default): any order can be trained from here; shift: stays an autoregressive model",
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Reads the source and writes the export."""
    del overrides
    on_cpu()

    from armd_jax.interop import continuing, importing, readable, safetensors_format

    safetensors_format.check_new(args.out)
    how = args.two_stream, args.max_length, args.aggregator
    if continuing.is_run(args.source):
        with continuing.open_model(args.source, *how) as (source, config):
            readable.write(source, config, args.out)
    else:
        source, config = importing.open_model(importing.open_source(args.source), *how)
        readable.write(source, config, args.out)
    model = config.model
    text = (
        f"{args.out}: {model.num_layers} layers ({model.two_stream_layers} two-stream) of width {model.width},"
        f" {model.vocab_size:,} tokens, rows of {model.max_length}"
    )
    return show(args, {"out": str(args.out)}, text)

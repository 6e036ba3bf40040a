"""`armd export`: write a model for others to read, in one of several formats."""

import argparse
from collections.abc import Sequence
from typing import assert_never

from armd_jax import config as configs
from armd_jax import typed
from armd_jax.cli.arguments import add_run, folder, show
from armd_jax.errors import UserError
from armd_jax.names import ExportFormat

HELP = "Write safetensors, config.json and tokenizer files, or programs that run with JAX alone."
IF_MEMORY_RUNS_OUT = "the weights have to fit; use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_run(parser)
    parser.add_argument("--out", required=True, type=folder, help="folder to write; must not exist")
    parser.add_argument(
        "--format",
        default="armd",
        choices=typed.choices(ExportFormat),
        help="armd (default): safetensors, which every verb reads; stablehlo: programs that score and sample with JAX"
        " alone (extra stablehlo)",
    )
    parser.add_argument("--streams", type=int, default=None, help="stablehlo: streams of its sampler; default: 1")
    parser.add_argument(
        "--length",
        type=int,
        default=None,
        help="stablehlo: tokens that its sampler draws behind a prompt; default: half of the model's max_length",
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Writes the export."""
    del overrides
    config = configs.read(args.run)
    wanted: ExportFormat = args.format

    from armd_jax.interop import safetensors_format
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    safetensors_format.check_new(args.out)
    mesh = args.mesh and sharding.make_mesh(args.mesh)
    match wanted:
        case "armd":
            for flag, value in (("--streams", args.streams), ("--length", args.length)):
                if value is not None:
                    raise UserError(f"{flag}={value}: belongs to --format=stablehlo")
            safetensors_format.write(load(args.run, not args.no_ema, mesh), config, args.out)
            files = f"{safetensors_format.WEIGHTS}, config.json, tokenizer/"
        case "stablehlo":
            from armd_jax.interop import stablehlo

            streams = 1 if args.streams is None else args.streams
            length = stablehlo.check(config.model, streams, args.length)
            stablehlo.write(load(args.run, not args.no_ema, mesh), streams, length, args.out)
            files = f"{stablehlo.WEIGHTS}, three programs, run.py, README.md"
        case _:
            assert_never(wanted)
    return show(args, {"out": str(args.out)}, f"{args.out}: {files}")

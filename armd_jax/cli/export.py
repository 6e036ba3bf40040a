"""`armd export`: write safetensors, config.json and tokenizer files."""

import argparse
from collections.abc import Sequence

from armd_jax import config as configs
from armd_jax.cli.arguments import add_run, folder, show

HELP = "Write safetensors, config.json and tokenizer files."
IF_MEMORY_RUNS_OUT = "the weights have to fit; use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_run(parser)
    parser.add_argument("--out", required=True, type=folder, help="folder to write; must not exist")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Writes the export."""
    del overrides
    config = configs.read(args.run)

    from armd_jax.interop import safetensors_format
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    safetensors_format.check_new(args.out)
    lm = load(args.run, not args.no_ema, args.mesh and sharding.make_mesh(args.mesh))
    safetensors_format.write(lm, config, args.out)
    return show(args, {"out": str(args.out)}, f"{args.out}: {safetensors_format.WEIGHTS}, config.json, tokenizer/")

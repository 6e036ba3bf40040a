"""`armd compile`: compile a training step or the sampler for a TPU slice, on a machine without one."""

import argparse
import math
from collections.abc import Sequence

from armd_jax import files, typed
from armd_jax.cli.arguments import add_config, failed, file, read_config, show
from armd_jax.errors import UserError
from armd_jax.names import CompiledProgram

HELP = "Compile a training step or the sampler for a TPU slice, on a machine without one."
IF_MEMORY_RUNS_OUT = "compiling needs more memory than this machine has; use a larger machine or a smaller model"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_config(parser)
    parser.add_argument("--topology", required=True, help="chip and slice, such as v5e:4x4 or v5p:8x8x8")
    parser.add_argument("--slices", type=int, default=1, help="number of slices, joined by the data centre's network")
    parser.add_argument(
        "--what", default="train", choices=typed.choices(CompiledProgram), help="the training step or the sampler"
    )
    parser.add_argument("--batch", type=int, default=0, help="sample: rows; default: one per device of data x fsdp")
    parser.add_argument("--streams", type=int, default=1, help="sample: parallel streams")
    parser.add_argument(
        "--price-per-chip-hour", type=float, default=None, metavar="USD", help="train: price the whole schedule"
    )
    parser.add_argument("--dump-hlo", type=file, default=None, metavar="FILE", help="write the compiled program")
    parser.epilog = "The exit code is 0 if it fits into the chip's memory, 1 if not. " + (parser.epilog or "")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Compiles and reports."""
    config = read_config(args, overrides)
    if args.batch < 0 or args.streams < 1:
        raise UserError("--batch must be at least 0 and --streams at least 1")
    price = args.price_per_chip_hour
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UserError(f"--price-per-chip-hour={price}: must be a number of dollars, at least 0")
    if args.dump_hlo and not args.dump_hlo.exists():  # better said now than after minutes of compiling
        folder = args.dump_hlo.parent
        if reason := files.unwritable(folder) if folder.is_dir() else "does not exist":
            raise UserError(f"--dump-hlo={args.dump_hlo}: the folder {folder} {reason}")

    from armd_jax.compilation import topology

    where = topology.parse(args.topology, args.slices)
    topology.prepare_environment()  # before JAX is imported

    from armd_jax.compilation import compile as compilation
    from armd_jax.compilation.result import as_text

    try:
        result = compilation.run(config, args.config, where, args.what, args.batch, args.streams, args.dump_hlo, price)
    except compilation.CompilerFailed as error:
        return failed(f"--topology={args.topology}: {error}", 1)
    show(args, result.as_dict(), as_text(result))
    return 0 if result.fits else 1

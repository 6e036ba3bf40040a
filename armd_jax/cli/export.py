"""`armd export`: write a model for others to read, in one of several formats."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any, assert_never

from armd_jax import config as configs
from armd_jax import data_config, typed
from armd_jax.cli.arguments import add_run, new_folder, on_cpu, show
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.names import ExportCode, ExportDtype, ExportFormat

HELP = "Write safetensors, config.json and tokenizer files, programs that run with JAX alone, or a transformers folder."
IF_MEMORY_RUNS_OUT = "the largest array of the weights has to fit twice; use a machine with more memory"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_run(parser, mesh=False)
    parser.add_argument("--out", required=True, type=new_folder, help="folder to write; must not exist")
    parser.add_argument(
        "--format",
        default="armd",
        choices=typed.choices(ExportFormat),
        help="armd (default): safetensors, which every verb reads; stablehlo: programs that score and sample with JAX"
        " alone (extra stablehlo); huggingface: a folder for transformers and PyTorch",
    )
    parser.add_argument("--streams", type=int, default=None, help="stablehlo: streams of its sampler; default: 1")
    parser.add_argument(
        "--length",
        type=int,
        default=None,
        help="stablehlo: tokens that its sampler draws behind a prompt; default: half of the model's max_length",
    )
    parser.add_argument(
        "--code",
        default=None,
        choices=typed.choices(ExportCode),
        help="huggingface: native: a network of transformers itself, such as Llama; remote: any ARMD, with its code in"
        " the folder; auto (default): native if the model is exactly such a network in the natural order",
    )
    parser.add_argument(
        "--dtype",
        default=None,
        choices=typed.choices(ExportDtype),
        help="huggingface: of the weights; default: float32",
    )
    parser.add_argument(
        "--shard-size", type=float, default=None, metavar="GB", help="huggingface: most weights of a file; default: 5"
    )


# The flags that belong to one format.
_FLAGS: dict[ExportFormat, tuple[str, ...]] = {
    "armd": (),
    "stablehlo": ("--streams", "--length"),
    "huggingface": ("--code", "--dtype", "--shard-size"),
}


def _check_flags(args: argparse.Namespace, wanted: ExportFormat) -> None:
    for owner, flags in _FLAGS.items():
        for flag in flags:
            value = getattr(args, flag.removeprefix("--").replace("-", "_"))
            if owner != wanted and value is not None:
                raise UserError(f"{flag}={value}: belongs to --format={owner}")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Writes the export."""
    del overrides
    config = configs.read(args.run)
    wanted: ExportFormat = args.format
    _check_flags(args, wanted)

    on_cpu()

    from armd_jax.interop import readable, safetensors_format
    from armd_jax.interop.load import open_model

    safetensors_format.check_new(args.out)
    match wanted:
        case "armd":
            with open_model(args.run, not args.no_ema) as (model, _):
                readable.write(model, config, args.out)
            files = f"{safetensors_format.WEIGHTS}, config.json, tokenizer/"
        case "stablehlo":
            from armd_jax.interop import stablehlo

            streams = 1 if args.streams is None else args.streams
            length = stablehlo.check(config.model, streams, args.length)
            with open_model(args.run, not args.no_ema) as (model, _):
                stablehlo.write(model, streams, length, args.out)
            files = f"{stablehlo.WEIGHTS}, three programs, run.py, README.md"
        case "huggingface":
            from armd_jax.interop.huggingface import card, exporting

            shard_gb = exporting.SHARD_GB if args.shard_size is None else args.shard_size
            exporting.check(config.model, shard_gb)
            with open_model(args.run, not args.no_ema) as (model, step):
                facts = card.Facts(**_facts(args.run, config, step, average=not args.no_ema))
                how: tuple[ExportCode, ExportDtype, float] = args.code or "auto", args.dtype or "float32", shard_gb
                written = exporting.write(model, args.out, facts, *how)
            files = ", ".join(name for name in written.files if "/" not in name)
            if written.native:
                files += "; loads without code from the folder"
            elif written.why:
                files += f"; needs trust_remote_code, because {written.why}"
        case _:
            assert_never(wanted)
    return show(args, {"out": str(args.out)}, f"{args.out}: {files}")


def _facts(run: pathlib.Path, config: Config, step: int | None, average: bool) -> dict[str, Any]:
    """What the model card says of a run (`card.Facts`); of an export, whose training left no files, less.

    step: of the checkpoint; None for an export.
    """
    from armd_jax.core import curriculum
    from armd_jax.evaluation import results
    from armd_jax.training import run_data

    facts: dict[str, Any] = {}
    if evaluation := results.read_evaluation(run):
        facts["split"] = evaluation.split
        facts["figures"] = tuple(
            (
                row.name,
                results.formatted(row.score.nats_per_token, 4),
                results.formatted_bits(row.score, evaluation.lossless, 4),
            )
            for row in results.rows(evaluation)
        )
    if step is not None:
        facts["data"] = data_config.described(config.data, _without_folders)
        if rows := run_data.own_rows(run, config):
            counts = rows.counts("train")
            facts["data"] += f": {counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens"
        facts["start"] = pathlib.PurePath(config.training.init_from).name
        facts["orders"] = curriculum.describe(config.order)
        facts["step"] = step
        facts["average"] = average and config.optimizer.ema_decay > 0
    return facts


def _without_folders(path: str) -> str:
    """The text of a run, without the folders of this machine."""
    name = path if path.startswith("tfds:") else pathlib.PurePath(path).name
    return f"`{name}`" if name else "the documentation that is embedded in Python"

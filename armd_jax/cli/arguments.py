"""Arguments that several verbs take, and how all of them print."""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from armd_jax import files, remote, typed
from armd_jax.config import Config, MeshConfig, from_config_dict
from armd_jax.errors import UserError, shown
from armd_jax.experiment_file import apply_overrides, load_config_file


def local(text: str) -> str:
    """The type of an argument that names files, in whatever form. An address of something elsewhere is refused."""
    if reason := files.not_local(text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: {reason}")
    return text


def source(text: str) -> str:
    """The type of an argument that names text, in whatever form, on this machine or in object storage."""
    return text if remote.is_address(text) else local(text)


def folder(text: str) -> pathlib.Path:
    """The type of an argument that names a folder to read.

    An empty one, as from an unset shell variable, would be the current folder. For an address in object storage it
    gives the folder of its copy.
    """
    return _folder(text, "read")


def out_folder(text: str) -> pathlib.Path:
    """The type of an argument that names a folder to write into."""
    return _folder(text, "write")


def new_folder(text: str) -> pathlib.Path:
    """The type of an argument that names a folder to make."""
    return _folder(text, "new")


def workdir(text: str) -> pathlib.Path:
    """The type of the argument that names the folder of a training."""
    return _folder(text, "run")


def _folder(text: str, use: remote.Use) -> pathlib.Path:
    return remote.copy_for(text, use) if remote.is_address(text) else _path(text, "folder")


def local_folder(text: str) -> pathlib.Path:
    """The type of an argument that names a folder on this machine, and none in object storage."""
    return _path(text, "folder")


def file(text: str) -> pathlib.Path:
    """The type of an argument that names a file."""
    return _path(text, "file")


def _path(text: str, what: str) -> pathlib.Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected the name of a {what}")
    return pathlib.Path(local(text))


def mesh_axes(text: str) -> MeshConfig:
    """The type of `--mesh`: sizes of axes such as `data=2,fsdp=4`. An axis that is not named has size 1."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for word in text.split(","):
        axis, _, size = word.partition("=")
        if axis not in sizes or not re.fullmatch("-1|[1-9][0-9]{0,5}", size):
            raise argparse.ArgumentTypeError(
                f"{shown(text)}: expected sizes of {', '.join(sizes)}, such as fsdp=8 or data=2,fsdp=-1"
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise argparse.ArgumentTypeError(f"{shown(text)}: only one axis may be -1 (all devices that are left)")
    return MeshConfig(**sizes)


def add_run(parser: argparse.ArgumentParser, mesh: bool = True) -> None:
    """`--run` and which of its weights to take. mesh: also over which devices to spread them."""
    parser.add_argument("--run", required=True, type=folder, help="a training run or an export")
    parser.add_argument("--no-ema", action="store_true", help="take the raw weights instead of their moving average")
    if not mesh:
        return
    parser.add_argument(
        "--mesh",
        default=None,
        type=mesh_axes,
        metavar="AXIS=DEVICES",
        help="spread the weights over all devices, as in training: sizes of data, fsdp and tensor, such as fsdp=8 or"
        " data=2,fsdp=-1 (-1: all devices that are left); default: one device",
    )


def on_cpu() -> None:
    """Lets a verb that copies weights start no accelerator, whose memory another program may be using."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config`, and `--config.section.field=value` for its fields."""
    parser.add_argument("--config", required=True, type=local, help="experiment file, file.py or file.py:arg")
    parser.set_defaults(takes_overrides=True)
    parser.epilog = "Fields of the config are set with --config.section.field=value."


def read_config(args: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The config of `--config` with the overrides of the command line."""
    values = load_config_file(args.config)
    apply_overrides(values, overrides)
    return from_config_dict(values)


def add_out(parser: argparse.ArgumentParser, what: str, more: str = "") -> None:
    """`--out`, for whoever wants what is kept of the results in another place than the run. more: for its help."""
    parser.add_argument(
        "--out", default=None, type=out_folder, help=f"folder to write {what} into; default: the run{more}"
    )


def check_out(args: argparse.Namespace) -> None:
    """Raises UserError if `--out` is given and cannot be written. Called before the work begins."""
    if args.out is not None and (reason := files.unwritable(args.out)):
        raise UserError(f"--out={args.out}: {reason}")


def whole_numbers(text: str, flag: str) -> list[int]:
    """The numbers of a list such as `1,2,4`. Raises UserError if it is not one."""
    try:
        numbers = [int(word) for word in text.split(",") if word]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{flag}={text!r}: expected whole numbers from 1 such as 1,2,4")
    return numbers


def check_seed(seed: int) -> None:
    """Raises UserError if `--seed` is no seed."""
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed={seed}: must be in [0, 2**31)")


def show(args: argparse.Namespace, result: Any, text: str) -> int:
    """Prints the result as text, or with `--json` as one JSON object. Returns exit code 0."""
    print(remote.spelled(typed.to_json(result) if args.json else text), flush=True)
    return 0


def show_and_keep(args: argparse.Namespace, result: Any, text: str, keep: pathlib.Path | None, name: str) -> int:
    """Prints the result, and then writes it as the file `name` into `--out`, by default into the folder `keep`.

    keep: None if there is no such folder. If it cannot be written, as on a read-only file system, a line on stderr says
        so: the result is printed by then, and only a folder that was asked for is a promise. Returns exit code 0.
    """
    try:
        return show(args, result, text)
    finally:  # even if the reader of the output went away
        content = typed.to_json(result, indent=2) + "\n"
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            files.write(args.out / name, content)
        elif keep is not None:
            try:
                files.write(keep / name, content)
            except OSError as error:
                reason = error.strerror or error
                print(f"{keep / name} was not written ({reason}); --out=FOLDER keeps it elsewhere", file=sys.stderr)


def failed(reason: str, code: int = 2) -> int:
    """Prints one line `error: …` on stderr and returns the exit code."""
    # The text of a command line may not be UTF-8, and what cannot be encoded must not become a traceback.
    line = " ".join(remote.spelled(reason).split()).encode(errors="backslashreplace").decode()
    print(f"error: {line}", file=sys.stderr)
    return code

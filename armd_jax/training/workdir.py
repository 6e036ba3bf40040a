"""The folder of a run: it can be written, one training at a time writes it, and it holds one run."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Iterator

from armd_jax.config import Config, UserError
from armd_jax.data import tokenizers
from armd_jax.data.packing import PreparedData
from armd_jax.training.metrics import read_rows

# What may differ between a run and its continuation; anything else would make it another run.
MAY_CHANGE = {
    "training": {
        "num_steps",
        "log_every",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "max_skipped",
        "after_skipped",
        "tensorboard",
        "wandb_project",
    },
    "data": {"cache_dir", "tfds_data_dir"},
    "model": {"scan_layers", "remat", "attention", "attention_chunk", "loss_chunk"},
    "mesh": {"data", "fsdp", "tensor"},
}


def check_continuation(old: Config, new: Config, workdir: pathlib.Path) -> None:
    """Raises UserError where `new` cannot continue the run of `old`, naming every field that differs."""
    if not new.model.vocab_size:  # not resolved yet: it follows from the data, which are compared here
        new = dataclasses.replace(new, model=dataclasses.replace(new.model, vocab_size=old.model.vocab_size))
    wrong = []
    for section in dataclasses.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before):
            was, now = getattr(before, field.name), getattr(after, field.name)
            if was != now and field.name not in MAY_CHANGE.get(section.name, ()):
                wrong.append(f"{section.name}.{field.name} was {was!r}, now {now!r}")
    if wrong:
        raise UserError(f"{workdir} holds a run of another config ({'; '.join(wrong)}): use another --workdir")


def check_same_data(workdir: pathlib.Path, data: PreparedData) -> None:
    """Raises UserError where the run in `workdir` was trained on other rows, or with another tokenizer, than `data`.

    The config names a source, not its content: files may have changed, and the embedded corpus is another's in another
    Python.
    """
    begun = [row.get("data") for row in read_rows(workdir / "events.jsonl") if row["event"] == "start"]
    tokenizer = workdir / "tokenizer"
    other_tokenizer = tokenizer.is_dir() and tokenizers.load(tokenizer).hash != data.tokenizer.hash
    if other_tokenizer or (begun and begun[-1] not in (None, data.digest)):
        what = "with another tokenizer" if other_tokenizer else "on other text"
        raise UserError(
            f"{workdir} holds a run {what} than data.path and data.tokenizer give now: what they name has changed"
            " since; bring it back, or use another --workdir"
        )


def check_writable(workdir: pathlib.Path) -> None:
    """Raises UserError where the workdir could not be written, without creating anything."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file, not a folder")
    existing = next(parent for parent in (workdir, *workdir.parents) if parent.exists())
    probe = existing / f".armd-probe-{time.time_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir, made where it is missing, against other trainings; UserError where one holds it already.

    The kernel drops the lock of a process that dies, however it dies: no stale lock is ever in the way.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / ".lock"
    while True:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise UserError(f"--workdir={workdir}: a training is running in it ({owner})") from error
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)  # its last holder removed this file between our open and our lock
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing came to lie in it


@contextlib.contextmanager
def left_as_found(workdir: pathlib.Path) -> Iterator[None]:
    """Where a UserError keeps a run from beginning, removes what came into the workdir; to be used under its lock."""
    before = {path.name for path in workdir.iterdir()}
    try:
        yield
    except UserError:
        if not (workdir / "config.json").exists():
            for path in workdir.iterdir():
                if path.name not in before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise

"""The folder of a run: it can be written, one training at a time writes it, and it holds one run."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import socket
from collections.abc import Generator

from armd_jax import config as configs
from armd_jax import files
from armd_jax.config import Config
from armd_jax.data import tokenizers
from armd_jax.data.packing import PreparedData
from armd_jax.errors import UserError


def check_continuation(old: Config, new: Config, workdir: pathlib.Path) -> None:
    """Raises UserError, naming every field that differs, if `new` cannot continue the run of `old`."""
    if not new.model.vocab_size:  # not resolved yet: it follows from the data, which are compared on their own
        new = dataclasses.replace(new, model=dataclasses.replace(new.model, vocab_size=old.model.vocab_size))
    wrong = [f"{name} was {was!r}, now {now!r}" for name, was, now, may in configs.differences(old, new) if not may]
    if wrong:
        raise UserError(f"{workdir} holds a run of another config ({'; '.join(wrong)}): use another --workdir")


def check_same_data(workdir: pathlib.Path, data: PreparedData) -> None:
    """Raises UserError if the run in `workdir` was trained on other rows, or with another tokenizer, than `data`.

    The config names a source, not its content: files may have changed since, and every Python version carries an
    embedded corpus of its own.
    """
    begun = [row.get("data") for row in files.read_json_lines(workdir / "events.jsonl") if row["event"] == "start"]
    tokenizer = workdir / "tokenizer"
    other_tokenizer = tokenizer.is_dir() and tokenizers.load(tokenizer).hash != data.tokenizer.hash
    if other_tokenizer or (begun and begun[-1] not in (None, data.digest)):
        what = "with another tokenizer" if other_tokenizer else "on other text"
        raise UserError(
            f"{workdir} holds a run {what} than data.path and data.tokenizer give now: what they name has changed"
            " since; bring it back, or use another --workdir"
        )


def check_writable(workdir: pathlib.Path) -> None:
    """Raises UserError if the workdir cannot be written. Creates nothing."""
    if reason := files.unwritable(workdir):
        raise UserError(f"--workdir={workdir}: {reason}")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Generator[None]:
    """Holds the workdir against other trainings, and creates it if it is missing.

    The kernel drops the lock of a process that dies, however it dies, so a stale lock is never in the way.
    Raises UserError if another training holds it already.
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
        with contextlib.suppress(OSError):  # for people only, and the disk may be full
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails, as it should, if something is in it


@contextlib.contextmanager
def left_as_found(workdir: pathlib.Path) -> Generator[None]:
    """If a UserError keeps a run from beginning, removes what it put into the workdir. Use it under the lock."""
    before = {path.name for path in workdir.iterdir()}
    try:
        yield
    except UserError:
        if not (workdir / "config.json").exists():
            for path in workdir.iterdir():
                if path.name not in before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise

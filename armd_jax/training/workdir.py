"""The folder of a run: it can be written, one training at a time writes it, and it holds one run."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import socket
from collections.abc import Generator

import jax

from armd_jax import config as configs
from armd_jax import files, remote
from armd_jax.config import Config
from armd_jax.data import tokenizers
from armd_jax.data.mixture import Data
from armd_jax.data.packing import PreparedData
from armd_jax.errors import UserError
from armd_jax.training import lease

_NOT_CONTENT = ("data.reset",)  # fields of the section `data` that say how rows are used, and not what they hold


@dataclasses.dataclass(frozen=True)
class Trained:
    """What events.jsonl says of the rows that a run is trained on.

    digest: that of the data. folders: the prepared folders at the last start; none if an earlier version wrote the row.
    """

    digest: str
    folders: tuple[pathlib.Path, ...]


def begun(workdir: pathlib.Path) -> Config | None:
    """The config of the run in the workdir. None if there is no run, or one that has no checkpoint yet.

    Where nothing was saved there is nothing to go on with, and any config may begin.
    Raises UserError if the workdir holds a config.json that is not a run's.
    """
    if not (workdir / "config.json").exists():
        return None
    old = configs.read(workdir)
    if any(workdir.glob("*.safetensors")):
        raise UserError(
            f"--workdir={workdir}: holds an export, not a run; to start from its weights, use another folder and"
            f" training.init_from={str(workdir)!r}"
        )
    return old if remote.saved_steps(workdir) else None


def begin(workdir: pathlib.Path, config: Config, data: Data, resumed: bool) -> None:
    """Writes the files that make the workdir the folder of this run: the tokenizer, then config.json."""
    if not resumed:  # an attempt that saved nothing may have left the files of another tokenizer
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    data.tokenizer.save(workdir / "tokenizer")
    files.write(workdir / "config.json", configs.to_json(config))


def trained_on(workdir: pathlib.Path) -> Trained | None:
    """The rows that the run in the workdir is trained on; None if it does not say."""
    found = None
    for row in files.read_json_lines(workdir / "events.jsonl"):
        digest, rows = row.get("data"), row.get("rows")
        if row.get("event") in ("start", "resume") and isinstance(digest, str):
            folders = rows if isinstance(rows, list) else [rows]  # a mixture has several
            found = Trained(digest, tuple(pathlib.Path(name) for name in folders if name and isinstance(name, str)))
    return found


def check_continuation(old: Config, new: Config, workdir: pathlib.Path) -> None:
    """Raises UserError, naming every field that differs, if `new` cannot continue the run of `old`.

    The section `data` is left out but for `data.reset`: what its other fields name may have moved, so its content is
    compared (`check_same_data`).
    """
    if not new.model.vocab_size:  # not resolved yet: it follows from the data
        new = dataclasses.replace(new, model=dataclasses.replace(new.model, vocab_size=old.model.vocab_size))
    before, now = old.training.init_from, new.training.init_from
    if before and now and _same_folder(before, now):
        new = dataclasses.replace(new, training=dataclasses.replace(new.training, init_from=before))
    wrong = [text for name, text in _changes(old, new) if not name.startswith("data.") or name in _NOT_CONTENT]
    if wrong:
        raise UserError(f"{workdir} holds a run of another config ({'; '.join(wrong)}): use another --workdir")


def _same_folder(before: str, now: str) -> bool:
    """Whether both are one folder, in another spelling, or moved: of a run that goes on, nothing is read from there."""
    if os.path.realpath(before) == os.path.realpath(now):
        return True
    if remote.is_address(before) or remote.is_address(now):
        return False
    return not os.path.exists(before) and pathlib.PurePath(before).name == pathlib.PurePath(now).name


def _changes(old: Config, new: Config) -> list[tuple[str, str]]:
    """(dotted name, what changed, for people) of the fields that are part of what a run is."""
    found = configs.differences(old, new)
    return [(name, f"{name} was {was!r}, now {now!r}") for name, was, now, may in found if not may]


def data_changes(old: Config, new: Config) -> str:
    """How the data are named in another way than at the last start, for people; empty if they are not."""
    return "; ".join(text for name, text in _changes(old, new) if name.startswith("data."))


def check_same_data(workdir: pathlib.Path, data: Data, changes: str, own: PreparedData | None = None) -> None:
    """Raises UserError if the run in `workdir` was trained on other rows, or with another tokenizer, than `data`.

    The config names a source, not its content: files may have changed since, and every Python version carries an
    embedded corpus of its own. And the same content may have another name.

    changes: see `data_changes`. own: the rows of the run, if they are still there.
    """
    begun_on = trained_on(workdir)
    tokenizer = workdir / "tokenizer"
    if tokenizer.is_dir() and tokenizers.load(tokenizer).hash != data.tokenizer.hash:
        raise other_data(workdir, "with another tokenizer", changes, own)
    if begun_on is None and changes:  # an early version did not note the digest, so that only names can be compared
        raise other_data(workdir, "of other data", changes, own)
    if begun_on is not None and begun_on.digest != data.digest:
        raise other_data(workdir, "on other rows", changes, own)


def other_data(workdir: pathlib.Path, what: str, changes: str, own: PreparedData | None) -> UserError:
    """The error that the run in `workdir` was trained on other data; `what` says in a few words what is other.

    changes, own: as in `check_same_data`.
    """
    ways = ["use another --workdir"]
    if own is not None:
        ways.append(f"go on with the run's own rows, data.path={str(own.folder)!r}")
    if changes:
        return UserError(f"{workdir} holds a run {what} ({changes}): {', or '.join(ways)}")
    return UserError(
        f"{workdir} holds a run {what} than data.path, data.mixture and data.tokenizer give now: what they name has"
        f" changed since; bring it back, or {', or '.join(ways)}"
    )


def check_writable(workdir: pathlib.Path) -> None:
    """Raises UserError if the workdir cannot be written. Creates nothing."""
    copy = remote.copy_of(workdir)
    if copy is not None and copy.scheme == "s3" and jax.process_count() > 1:
        # Orbax writes to gs:// itself. To s3:// it does not, and one machine has no whole checkpoint to store there.
        raise UserError(f"--workdir={copy.address}: in s3:// a run has one process; use a gs:// or a shared folder")
    if reason := files.unwritable(workdir):
        raise UserError(f"--workdir={workdir}: {reason}")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Generator[None]:
    """Holds the workdir against other trainings, and creates it if it is missing.

    The kernel drops the lock of a process that dies, however it dies, so a stale lock is never in the way.
    Raises UserError if another training holds it already.
    """
    if (copy := remote.copy_of(workdir)) is not None:
        workdir.mkdir(exist_ok=True)
        with lease.held(copy):
            yield
        return
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

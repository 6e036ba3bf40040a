"""Folders that take hours to write: whole or not at all, whoever is killed and however many write the same one."""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from armd_jax import files, remote
from armd_jax.errors import UserError

JUST_MADE = 60  # seconds in which another process may have made a folder but not locked it yet


@contextlib.contextmanager
def large_folder(folder: Path, last_file: str, goes_on: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary neighbour of `folder` to write into, which takes its name at the end of the block.

    `files.new_folder` does that for folders that take a moment to write. One that takes hours and many gigabytes needs
    more. Its neighbour is locked and has the host and the process in its name, so that whoever builds `folder` next can
    tell what a killed process left from what a running one is writing, and go on with it or remove it. If another
    process completes `folder` first, its result stands. If the block raises, parent folders that were made here are
    removed as well.

    last_file: the file that the block writes last. A folder that has it is complete.
    goes_on: whether the block can go on with what a killed process left in a folder.
    Raises UserError if the folder cannot be written, and OSError with its name if the disk is full.
    """
    made = [parent for parent in folder.parents if not os.path.exists(parent)]
    partial = folder.with_name(f".{folder.name}.partial-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with contextlib.ExitStack() as stack:
            left = _left_of(folder, goes_on, stack)
            if left is None:
                partial.mkdir(parents=True)
                stack.enter_context(locked(partial))
            else:
                partial = left
            _remove_abandoned(folder)
            yield partial
            try:
                partial.rename(folder)
            except OSError:
                if not (folder / last_file).is_file():
                    raise
                shutil.rmtree(partial)  # another process was faster; what it made is the same
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in files.FULL:
            raise OSError(error.errno, f"{error.strerror}, while data were prepared", str(folder)) from error
        if isinstance(error, OSError):
            raise UserError(f"cannot write prepared data to {folder}: {error.strerror or error}") from error
        raise


def remove_torn(folder: Path, last_file: str, is_its_own: Callable[[str], bool] = lambda name: True) -> None:
    """Removes, from the copy of a folder in object storage, what a process stored there that was killed meanwhile.

    A folder on a disk never looks like this, because it takes its name when it is whole.

    last_file: the file that is stored last. is_its_own: whether such a folder may have a file of this name in it; if
        there is any other, all stays as it is.
    """
    if remote.copy_of(folder) is None or not folder.is_dir() or (folder / last_file).is_file():
        return
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if all(map(is_its_own, names)):
        shutil.rmtree(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder. The kernel drops the lock if the process dies. Raises BlockingIOError if it is locked already."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _left_of(folder: Path, goes_on: Callable[[Path], bool], stack: contextlib.ExitStack) -> Path | None:
    """What a killed process on this machine left of `folder` and can be gone on with, locked; None if there is none."""
    for left in sorted(folder.parent.glob(_partial_names(folder))):
        with contextlib.suppress(OSError), contextlib.ExitStack() as own:  # it is locked, or another user's
            own.enter_context(locked(left))
            if goes_on(left):
                stack.push(own.pop_all())
                return left
    return None


def _partial_names(folder: Path) -> str:
    return f".{glob.escape(folder.name)}.partial-{glob.escape(socket.gethostname())}-*"


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes on this machine left of `folder`.

    What other machines left stays: on a shared file system their locks may not be seen here.
    """
    for left in folder.parent.glob(_partial_names(folder)):
        with contextlib.suppress(OSError):  # it is locked, already gone, or another user's
            if time.time() - left.stat().st_mtime > JUST_MADE:
                with locked(left):
                    shutil.rmtree(left, ignore_errors=True)

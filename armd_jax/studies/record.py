"""What a sweep leaves in its folder, beside the runs of its members.

sweep.json                 the members, as of the last call
configs/NAME.json          the config that a member is trained with
members/NAME/              the run of a member
members/NAME/member.json   what has been done of it: absent if nothing is
members/NAME/log.txt       what its processes printed
data/                      rows of tokens, which members share, unless `data.cache_dir` says something else
.lock                      held while a sweep runs, by it and by the processes that it started
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Generator
from typing import Literal

from armd_jax import files, typed
from armd_jax.config import Config, from_config_dict
from armd_jax.errors import UserError

TRAIN = "train"  # what `Done.done` calls the training
_POLL = 0.2  # seconds between two looks at a lock


@dataclasses.dataclass(frozen=True)
class Done:
    """The content of a member.json.

    status: finished if the last thing that ended did so well. done: the training ("train") and the commands after it
    that are done. error: the reason of a failure in one line.
    """

    status: Literal["finished", "failed"]
    done: tuple[str, ...] = ()
    error: str = ""


NOTHING = Done("finished")


@dataclasses.dataclass(frozen=True)
class Folder:
    """The folder of a sweep."""

    path: pathlib.Path

    def member(self, name: str) -> pathlib.Path:
        """The folder of a member's run."""
        return self.path / "members" / name

    def config_file(self, name: str) -> pathlib.Path:
        """The file with the config that a member is trained with."""
        return self.path / "configs" / f"{name}.json"

    def config(self, name: str) -> Config | None:
        """The config that a member was begun with, or that an earlier call gave it; None if there was none.

        A run says itself what it was begun with: a job of a launcher may have read the config before another call wrote
        a new one. What training fills in by itself is as the call has it.
        """
        given, begun = _config(self.config_file(name)), _config(self.member(name) / "config.json")
        if given is None or begun is None:
            return given
        return dataclasses.replace(
            begun,
            model=dataclasses.replace(begun.model, vocab_size=given.model.vocab_size),
            data=dataclasses.replace(begun.data, end_of_text=given.data.end_of_text),
        )

    def done(self, name: str) -> Done:
        """What has been done of a member."""
        file = self.member(name) / "member.json"
        return typed.build(Done, files.read_json(file), str(file)) if file.is_file() else NOTHING

    def note(self, name: str, done: Done) -> None:
        """Writes what has been done of a member; if that is nothing, there is no file."""
        file = self.member(name) / "member.json"
        if done == NOTHING:
            file.unlink(missing_ok=True)
        else:
            files.write(file, typed.to_json(done) + "\n")

    def names(self) -> list[str]:
        """The names of the members as of the last call, none if there was none."""
        file = self.path / "sweep.json"
        if not file.is_file():
            return []
        try:
            return [str(member["name"]) for member in files.read_json(file)["members"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: is not the file of a sweep") from error

    def begun(self, name: str) -> bool:
        """Whether the training of a member is finished, or has saved something that it can go on from."""
        if TRAIN in self.done(name).done:
            return True
        saved = self.member(name) / "checkpoints"
        return saved.is_dir() and any(step.name.isdecimal() for step in saved.iterdir())

    def trained(self, name: str, config: Config) -> bool:
        """Whether the training of a member is finished, whoever ran it."""
        if TRAIN in self.done(name).done:
            return True
        last = [row for row in self.events(name) if row.get("event") in ("start", "resume", "stop", "end")][-1:]
        return bool(last) and last[0]["event"] == "end" and last[0].get("step") == config.training.num_steps

    def events(self, name: str) -> list[dict[str, object]]:
        """The rows of events.jsonl of a member's run."""
        return files.read_json_lines(self.member(name) / "events.jsonl")

    def step(self, name: str) -> int:
        """The last step that metrics.jsonl of a member's run shows; 0 if there is none."""
        step = (files.last_json_line(self.member(name) / "metrics.jsonl") or {}).get("step")
        return step if isinstance(step, int) else 0


def _config(file: pathlib.Path) -> Config | None:
    """The config in a file; None if there is no such file."""
    if not file.is_file():
        return None
    try:
        return from_config_dict(files.read_json(file))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


@contextlib.contextmanager
def held(folder: Folder, tell: Callable[[str], None]) -> Generator[int]:
    """Holds the folder against other sweeps, and yields the descriptor of the lock.

    Processes that are given the descriptor hold the lock too, so that those of a sweep that was killed have ended
    before the next one begins: this waits for them. Raises UserError if a sweep is running.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                if not _has_died(owner):
                    raise UserError(f"--out={folder.path}: a sweep is running in it ({owner})") from error
            if not told:
                tell("waiting for the processes of a sweep that was killed: they save and end")
            told = True
            time.sleep(_POLL)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _has_died(owner: str) -> bool:
    """Whether the process that wrote this into a lock was one of this machine that is no more."""
    found = re.fullmatch(r"process (\d+) on (.+)", owner)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

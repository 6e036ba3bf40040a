"""What a sweep has to do: its members with their checked configs and commands, and what has been done of each."""

import dataclasses
import fnmatch
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence

from armd_jax import config as configs
from armd_jax import experiment_file, files, sweeps, typed
from armd_jax.config import Config
from armd_jax.errors import UserError, nearest
from armd_jax.studies.record import Folder
from armd_jax.sweeps import Member, Sweep

_NAMED = re.compile(re.escape(sweeps.SWEEP) + r"/members/([^/\s]*)")
# Raises UserError if the words are no command that can follow a training.
CheckCommand = Callable[[Sequence[str]], None]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that follows the training of a member.

    text: as the sweep file has it. words: those after `armd`. needs: members whose training must be finished.
    """

    text: str
    words: tuple[str, ...]
    needs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """A member that is checked and ready. needs: members whose training must be finished before its own begins."""

    member: Member
    config: Config
    needs: tuple[str, ...]
    after: tuple[Command, ...]

    @property
    def name(self) -> str:
        """The name of the member."""
        return self.member.name

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.training.batch_size * self.config.model.max_length


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole sweep. spec: what names its file."""

    spec: str
    folder: Folder
    jobs: tuple[Job, ...]

    def chosen(self, pattern: str | None) -> tuple[Job, ...]:
        """The members whose name or row fits a pattern, such as `model=AR*`. Raises UserError if none does."""
        if pattern is None:
            return self.jobs
        fits = [job for job in self.jobs if any(fnmatch.fnmatchcase(x, pattern) for x in (job.name, job.member.row))]
        if not fits:
            raise UserError(f"--only={pattern}: no member{nearest(pattern, [job.name for job in self.jobs])}")
        return tuple(fits)

    def command(self, job: Job) -> list[str]:
        """The words after `armd` that train a member, or go on with its training."""
        return ["train", f"--config={self.folder.config_file(job.name)}", f"--workdir={self.folder.member(job.name)}"]

    def write(self) -> None:
        """Writes sweep.json and the configs of all members. The lock must be held.

        Raises UserError if the folder no longer fits: another sweep may have run in it since the plan was made.
        """
        _check_folder(self)
        members = [
            {
                "name": job.name,
                "row": job.member.row,
                "values": {name: value for name, value in job.member.values.items() if name != sweeps.SEED},
                "seed": job.member.seed,
                "overrides": dict(job.member.overrides),
                "after": [command.text for command in job.after],
            }
            for job in self.jobs
        ]
        axes = sweeps.axes_of(tuple(job.member for job in self.jobs))
        record = {"config": self.spec, "axes": axes, "members": members}
        files.write(
            self.folder.path / "sweep.json", typed.to_json(record, indent=2) + "\n"
        )  # makes it a sweep's folder
        for folder in ("configs", "members"):
            (self.folder.path / folder).mkdir(exist_ok=True)
        for job in self.jobs:
            files.write(self.folder.config_file(job.name), configs.to_json(job.config))


def load(spec: str, overrides: Sequence[str]) -> Sweep:
    """The sweep of a file, with `--config.section.field=value` words applied to its base."""
    sweep: Sweep = experiment_file.load(spec, "get_sweep", Sweep, "armd_jax.sweeps.Sweep")
    set_by_members = {field for member in sweep.members for field in member.overrides}
    for word in overrides:
        if (field := word.removeprefix("--config.").partition("=")[0]) in set_by_members:
            raise UserError(f"{word}: the members of the sweep set {field} themselves")
    experiment_file.apply_overrides(sweep.base, overrides)
    return sweep


def make(sweep: Sweep, spec: str, out: pathlib.Path, check_command: CheckCommand) -> Plan:
    """The plan of a sweep in the folder `out`, which is only read.

    Raises UserError if a member, a config or a command cannot work, or if the folder holds something else.
    """
    folder = Folder(pathlib.Path(os.path.abspath(out)))
    names = [member.name for member in sweep.members]
    needs: dict[str, list[str]] = {name: [] for name in names}

    def filled(member: Member, text: str) -> str:
        needs[member.name] += _named(text, f"member {member.name}", names[: names.index(member.name)], names)
        return _in(folder, text)

    found = sweeps.configs_of(sweep, filled)
    jobs = []
    for member in sweep.members:
        texts = (*sweep.after, *member.after)
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise UserError(f"member {member.name}: the command {twice[0]!r} is named twice")
        after = tuple(_command(folder, text, member.name, names, check_command) for text in texts)
        jobs.append(Job(member, found[member.name], tuple(needs[member.name]), after))
    plan = Plan(spec, folder, tuple(jobs))
    _check_folder(plan)
    return plan


def _command(folder: Folder, text: str, name: str, names: list[str], check: CheckCommand) -> Command:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"after={text!r}: {error}") from error
    needs = tuple(dict.fromkeys(other for word in words for other in _named(word, f"after={text!r}", names, names)))
    full = (*(_in(folder, word) for word in words), f"--run={folder.member(name)}")
    try:
        check(full)
    except UserError as error:
        raise UserError(f"after={text!r}: {error}") from error
    return Command(text, full, needs)


def _in(folder: Folder, text: str) -> str:
    return text.replace(sweeps.SWEEP, str(folder.path))


def _named(text: str, where: str, known: list[str], names: list[str]) -> list[str]:
    """The members that a text names as `{sweep}/members/NAME`. known: those that it may name."""
    found = _NAMED.findall(text)
    for name in found:
        if name not in names:
            raise UserError(f"{where}: the sweep has no member {name!r}{nearest(name, names)}")
        if name not in known:
            raise UserError(f"{where}: it needs the member {name!r}, which must stand before it in the sweep")
    return found


def _check_folder(plan: Plan) -> None:
    """Raises UserError if the folder holds something else, or members that were trained with another config."""
    folder = plan.folder
    if reason := files.unwritable(folder.path):
        raise UserError(f"--out={folder.path}: {reason}")
    before = folder.names()
    if not before and folder.path.is_dir() and any(path.name[0] != "." for path in folder.path.iterdir()):
        raise UserError(f"--out={folder.path}: holds other files and no sweep; name a new folder")
    if before and not {job.name for job in plan.jobs} & set(before) and any(map(folder.begun, before)):
        raise UserError(f"--out={folder.path}: holds another sweep, without any of these members; name a new folder")
    for job in plan.jobs:
        if not folder.begun(job.name):
            continue
        old = folder.config(job.name)
        if old is None:
            raise UserError(f"{folder.member(job.name)}: holds a run that no sweep began; name a new folder")
        trained = folder.trained(job.name, old)
        changed = [
            f"{field} was {was!r}, now {now!r}"
            for field, was, now, may in configs.differences(old, job.config)
            if (trained or not may) and not _same_place(folder, was, now)
        ]
        if changed:
            raise UserError(
                f"member {job.name}: it {'was' if trained else 'is'} trained with another config"
                f" ({'; '.join(changed)}); bring that back, give it another label, or use another --out"
            )


def _same_place(folder: Folder, was: object, now: object) -> bool:
    """Whether both are the same place in the folder of the sweep, which may have been moved."""
    here = str(folder.path)
    return isinstance(was, str) and isinstance(now, str) and now.startswith(here) and was.endswith(now[len(here) :])

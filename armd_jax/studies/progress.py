"""What a sweep shows while it runs: one bar over the tokens of all its members, and lines about what happened."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from armd_jax.studies.plan import Job
from armd_jax.studies.record import TRAIN, Folder


def tell(line: str) -> None:
    """A line on stderr that leaves the bar whole."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """A bar on stderr. Use it as a context manager."""

    def __init__(self, folder: Folder, jobs: Sequence[Job]) -> None:
        self._folder, self._jobs = folder, jobs
        done = self._tokens(jobs)
        self._bar: tqdm[Any] = tqdm(
            total=sum(job.tokens * job.config.training.num_steps for job in jobs),
            initial=done,
            unit="token",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def look(self, left: Mapping[str, bool], running: Mapping[str, str]) -> None:
        """Shows how far all members are.

        left: by member, whether it has anything left to do. running: the tasks that run, by member.
        """
        finished = sum(not anything for anything in left.values())
        self._bar.set_description(f"{finished}/{len(left)} members ", refresh=False)
        shown = []
        for job in self._jobs:
            if (task := running.get(job.name)) is not None:
                step = f"step {self._folder.step(job.name)}/{job.config.training.num_steps}"
                shown.append(f"{job.name} {step if task == TRAIN else task.split()[0]}")
        self._bar.set_postfix_str("; ".join(shown), refresh=False)
        self._bar.update(self._tokens(self._jobs) - self._bar.n)

    def _tokens(self, jobs: Sequence[Job]) -> int:
        return sum(job.tokens * min(self._folder.step(job.name), job.config.training.num_steps) for job in jobs)

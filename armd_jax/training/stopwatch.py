"""On what a training process spends its time: one activity at a time, so that they add up to its wall-clock."""

import contextlib
import os
import pathlib
import time
from collections.abc import Generator
from typing import Literal

# What the process does. starting: everything before the first step that is none of the others, from the start of the
# interpreter on. preparing: text becomes rows, or the rows are found again. restoring: a checkpoint is read, also in a
# rollback. compiling: the first step is traced, compiled and dispatched. training: steps are dispatched and waited for,
# and their rows are written. waiting: no batch is there. saving: only while a save keeps the next step from beginning.
# profiling: a trace begins or is written.
Activity = Literal[
    "training", "waiting", "evaluating", "saving", "compiling", "restoring", "preparing", "profiling", "starting"
]


class Stopwatch:
    """Seconds of each activity of this process so far. It begins in `starting`."""

    def __init__(self, began: float | None = None) -> None:
        """began: when the process began, in seconds since 1970; None: now."""
        now = time.time()
        self.began = now if began is None else min(began, now)
        self._seconds: dict[Activity, float] = {"starting": now - self.began}
        self._activity: Activity = "starting"
        self._since = time.perf_counter()

    def now(self, activity: Activity) -> None:
        """From now on, the process is at this."""
        at = time.perf_counter()
        self._seconds[self._activity] = self._seconds.get(self._activity, 0.0) + at - self._since
        self._activity, self._since = activity, at

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Generator[None]:
        """The block is this, and what follows it is what was before."""
        before = self._activity
        self.now(activity)
        try:
            yield
        finally:
            self.now(before)

    def seconds(self) -> dict[Activity, float]:
        """Seconds of each activity up to now."""
        self.now(self._activity)
        return dict(self._seconds)

    def elapsed(self) -> float:
        """Seconds since the process began."""
        return sum(self.seconds().values())


def process_began() -> float | None:
    """When this process began, in seconds since 1970, to a hundredth of a second; None if the system does not tell."""
    try:
        # The name of the program, in parentheses, may hold spaces; the start is the 20th field behind it (proc(5)).
        fields = pathlib.Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time() - max(age, 0.0)

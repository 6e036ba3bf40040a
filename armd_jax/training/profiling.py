"""Traces of some steps, written by `jax.profiler` into the folder of a run: those that the config names, or on SIGUSR1.

What is traced is computed as ever: a run has the same bits with and without profiles.
"""

import contextlib
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from armd_jax import files
from armd_jax.training.stopwatch import Stopwatch

FOLDER = "profile"  # in the workdir; a trace is a folder in it, named after its first step
ON_SIGNAL = 5  # steps that a signal asks for, if the config does not say how many


class Profiler:
    """A context manager around the steps. Only the first process traces; others leave SIGUSR1 without effect.

    A folder takes its name when its trace is whole: a process that is killed leaves a hidden folder at most, which the
    next one removes.
    """

    def __init__(
        self, workdir: pathlib.Path | None, wanted: tuple[int, ...], watch: Stopwatch, tell: Callable[[str], None]
    ) -> None:
        """workdir: None in processes that trace nothing. wanted: (first step, number of steps), or empty."""
        self._folder = workdir / FOLDER if workdir is not None else None
        self._watch, self._tell = watch, tell
        self._first, self._count = wanted if wanted else (0, ON_SIGNAL)
        self._signalled = False
        self._stack: contextlib.ExitStack | None = None  # leaving it gives the trace its name
        self._since, self._last = 0, 0
        self._newest: Any = None  # what the newest step gives
        self._handler: Any = None

    def __enter__(self) -> "Profiler":
        if self._folder is not None:
            for left in self._folder.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGUSR1, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(whole=kind is None)
        if threading.current_thread() is threading.main_thread():
            # None: it was installed by something else than Python, which cannot put it back.
            signal.signal(signal.SIGUSR1, signal.SIG_DFL if self._handler is None else self._handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def before(self, step: int) -> None:
        """To be called before step `step`, counted from 1: a trace may begin."""
        if self._folder is None or self._stack is not None or not (self._signalled or step == self._first):
            return
        self._signalled = False
        jax.block_until_ready(self._newest)  # the steps before this one are not part of the trace
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a function would be an event
        try:
            with self._watch.during("profiling"), contextlib.ExitStack() as stack:
                folder = stack.enter_context(_replaced(self._folder / f"step-{step}"))
                jax.profiler.start_trace(folder, profiler_options=options)
                self._stack, self._since, self._last = stack.pop_all(), step, step + self._count - 1
        except (OSError, RuntimeError) as error:  # the disk is full; something else is tracing
            self._tell(f"step {step}: no profile ({error}); training goes on")

    def after(self, step: int, result: Any) -> None:
        """To be called after step `step` was dispatched, with what it gives: the trace may end, once that is there."""
        self._newest = result
        if self._stack is not None and step >= self._last:
            jax.block_until_ready(result)
            self._end(whole=True)

    def _end(self, whole: bool) -> None:
        """Ends the trace, if there is one. whole: it may have its name; if not, nothing is left of it."""
        stack, self._stack = self._stack, None
        if stack is None:
            return
        with self._watch.during("profiling"):
            try:
                with stack:
                    jax.profiler.stop_trace()
                    if not whole:
                        raise _NotWhole
            except _NotWhole:
                return
            except (OSError, RuntimeError) as error:
                self._tell(f"the profile of step {self._since} could not be written ({error}); training goes on")
                return
        self._tell(f"profile: {self._folder}/step-{self._since}, of which `armd profile` prints a table")


class _NotWhole(Exception):
    pass


@contextlib.contextmanager
def _replaced(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`files.new_folder`, in place of a folder of the same name that an earlier life of the run has written."""
    with files.new_folder(folder) as temporary:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)


def newest(run: pathlib.Path) -> pathlib.Path | None:
    """The file `.xplane.pb` of the newest whole trace of a run; None if there is none."""
    found = [path for path in (run / FOLDER).glob("step-*/plugins/profile/*/*.xplane.pb") if path.is_file()]
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)

"""Runs what is left of a sweep: every training and every command after it is a process of its own.

The next task is that of the first member that has one and waits for nobody. A process gets SIGUSR2 if this one dies,
whereupon a training saves and ends, and it holds the lock of the folder as long as it lives.
"""

import ctypes
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from armd_jax.errors import STOPPED
from armd_jax.studies import record
from armd_jax.studies.plan import Job, Plan
from armd_jax.studies.progress import Progress, tell
from armd_jax.studies.record import TRAIN, Done

_POLL = 0.1  # seconds between two looks at the processes
_LOOK = 2.0  # seconds between two looks at the metrics of those that train
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)  # as a training hears them
# Tells a process to end. A training saves at it, however often it comes and whatever else comes: whoever stops a sweep
# may signal its trainings as well, and a second SIGTERM would end them at once. Other commands end at it.
_SAVE = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_TAIL = 1 << 16  # bytes at the end of what a process printed in which its error is looked for


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call ended. finished: members of which everything is done. failed: (member, reason in one line).

    left: members with something to do that were not tried, because a signal stopped the sweep. stopped: that was so.
    untrained: members that wait for a training which this call was not to run.
    """

    finished: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    stopped: bool
    untrained: tuple[str, ...] = ()


@dataclasses.dataclass
class _State:
    """A member in this call. tasks: what is left of it: the training, then commands. error: why it goes no further."""

    job: Job
    done: Done
    tasks: list[str]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class _Process:
    """A task that runs. printed: how many bytes the log had before it."""

    state: _State
    task: str
    process: "subprocess.Popen[bytes]"
    slot: int
    log: pathlib.Path
    printed: int
    began: float


def run(plan: Plan, jobs: Sequence[Job], at_once: int, train: bool = True) -> Result:
    """Runs what is left of some members, `at_once` processes at a time.

    train: whether trainings are run too; otherwise only the commands after those that are finished.
    Raises UserError if a sweep runs already.
    """
    with record.held(plan.folder, tell) as lock:
        plan.write()
        with Progress(plan.folder, jobs) as progress:
            return _Runner(plan, jobs, at_once, train, lock, progress).run()


def as_text(plan: Plan, result: Result) -> str:
    """The result for people."""
    whole = len(result.finished) + len(result.failed) + len(result.left) + len(result.untrained)
    lines = [f"{plan.folder.path}: {len(result.finished)} of {whole} members are finished"]
    lines += [f"failed: {name}: {reason}" for name, reason in result.failed]
    if result.untrained:
        lines.append(f"not trained yet, or waiting for one that is not: {', '.join(result.untrained)}")
    if result.stopped:
        lines.append("stopped by a signal; the same command continues")
    elif result.failed:
        lines.append("the same command tries again what failed")
    return "\n".join(lines)


class _Runner:
    """Runs the members of a plan that were chosen."""

    def __init__(
        self, plan: Plan, jobs: Sequence[Job], at_once: int, train: bool, lock: int, progress: Progress
    ) -> None:
        """at_once: processes at a time. train: see `run`. lock: the descriptor that they hold."""
        self._plan, self._folder, self._lock, self._progress = plan, plan.folder, lock, progress
        self._train = train
        self._states = [self._state(job) for job in jobs]
        self._slots = list(range(at_once))
        self._cores = _cores(at_once)
        self._running: list[_Process] = []
        self._asked = self._passed_on = 0  # requests to stop, and how many of them the processes have been told
        self._looked = 0.0

    def run(self) -> Result:
        """Works until nothing is left to do, or a signal asks for an end."""
        with _heard(self._ask):
            while True:
                self._pass_on()
                self._collect()
                while self._slots and not self._asked and (state := self._next()):
                    self._start(state)
                if not self._running:
                    break
                if time.monotonic() - self._looked >= _LOOK:
                    self._look()
                time.sleep(_POLL)
        self._look()
        stopped = bool(self._asked)
        waiting = [state for state in self._states if state.tasks and not state.error]
        if not stopped and self._train:
            for state in waiting:
                state.error = self._waits_for(state)
            waiting = []
        names = tuple(state.job.name for state in waiting)
        return Result(
            finished=tuple(state.job.name for state in self._states if not state.tasks),
            failed=tuple((state.job.name, state.error) for state in self._states if state.error),
            left=names if stopped else (),
            stopped=stopped and any(state.tasks for state in self._states),
            untrained=() if stopped else names,
        )

    def _state(self, job: Job) -> _State:
        done = self._folder.done(job.name)
        if self._folder.trained(job.name, job.config) and TRAIN not in done.done:
            done = Done("finished", (TRAIN, *done.done))  # by a launcher's job, or by a sweep that was killed just then
            self._folder.note(job.name, done)
        tasks = [TRAIN, *(command.text for command in job.after)]
        left = [task for task in tasks if task not in done.done]
        if done.error and not left:  # the command that failed is no longer in the sweep
            done = Done("finished", done.done)
            self._folder.note(job.name, done)
        return _State(job, done, left)

    # --- which task is next -------------------------------------------------------------------------------------------

    def _next(self) -> _State | None:
        busy = [running.state for running in self._running]
        ready = (state for state in self._states if state.tasks and not state.error and state not in busy)
        allowed = (state for state in ready if self._train or state.tasks[0] != TRAIN)
        return next((state for state in allowed if not self._missing(state)), None)

    def _missing(self, state: _State) -> list[str]:
        """The members whose training has to be finished before the next task of this one."""
        task, job = state.tasks[0], state.job
        needs = job.needs if task == TRAIN else next(one.needs for one in job.after if one.text == task)
        jobs = {one.name: one for one in self._plan.jobs}
        return [name for name in needs if not self._folder.trained(name, jobs[name].config)]

    def _waits_for(self, state: _State) -> str:
        what, missing = "its training" if state.tasks[0] == TRAIN else state.tasks[0], self._missing(state)
        here = {one.job.name for one in self._states}
        others = "" if here.issuperset(missing) else ", and which --only leaves out"
        return f"{what} waits for {', '.join(missing)}, whose training is not finished{others}"

    # --- processes ----------------------------------------------------------------------------------------------------

    def _start(self, state: _State) -> None:
        task, job = state.tasks[0], state.job
        folder = self._folder.member(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        if state.done.error:  # it is tried again
            state.done = Done("finished", state.done.done)
            self._folder.note(job.name, state.done)
        words = self._plan.command(job) if task == TRAIN else next(one.words for one in job.after if one.text == task)
        slot = self._slots.pop(0)
        log = folder / "log.txt"
        with open(log, "ab") as file:
            file.write(f"$ armd {' '.join(words)}\n".encode())
            file.flush()
            printed = file.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "armd_jax", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C at a terminal reaches this process alone, which passes it on once
                pass_fds=(self._lock,),
                preexec_fn=_Child(self._cores[slot]),
            )
        self._running.append(_Process(state, task, process, slot, log, printed, time.monotonic()))

    def _collect(self) -> None:
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            self._slots.append(running.slot)
            self._ended(running, code)

    def _ended(self, running: _Process, code: int) -> None:
        state, name = running.state, running.state.job.name
        took = f"{time.monotonic() - running.began:.0f} s"
        if code == 0:
            state.tasks.remove(running.task)
            state.done = Done("finished", (*state.done.done, running.task))
            self._folder.note(name, state.done)
            tell(f"{name}: {running.task} is done ({took})")
        elif self._asked:
            tell(f"{name}: {running.task} was stopped")  # the next call goes on with it
        else:
            what = "" if running.task == TRAIN else f"{running.task}: "
            # Where the sweep lies is no part of it: the reason stands in tables, which are the same wherever that is.
            state.error = (what + _reason(running, code)).replace(f"{self._folder.path}/", "")
            state.done = Done("failed", state.done.done, state.error)
            self._folder.note(name, state.done)
            tell(f"{name}: failed after {took}: {state.error}")

    # --- signals and progress -----------------------------------------------------------------------------------------

    def _ask(self, number: int, _: FrameType | None) -> None:
        again = number in (signal.SIGTERM, signal.SIGINT)
        self._asked = self._asked + 1 if again else max(self._asked, 1)

    def _pass_on(self) -> None:
        """Tells the processes of a request to stop: at first to save, then as it came."""
        if self._asked > self._passed_on:
            if not self._passed_on:
                tell("stopping: trainings save and end")
            number = signal.SIGTERM if self._passed_on or self._asked > 1 else _SAVE
            self._passed_on = self._asked
            for running in self._running:
                running.process.send_signal(number)

    def _look(self) -> None:
        self._looked = time.monotonic()
        running = {one.state.job.name: one.task for one in self._running}
        self._progress.look({state.job.name: bool(state.tasks) for state in self._states}, running)


class _Child:
    """What a new process does before it becomes the command."""

    def __init__(self, cores: set[int]) -> None:
        self._cores, self._parent = cores, os.getpid()
        self._prctl: Any = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None

    def __call__(self) -> None:
        for number in _HEARD:  # what comes before the command begins would be heard by nobody
            if number == _SAVE or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, _SAVE)
        if os.getppid() != self._parent:  # it died before this process asked to be told
            os._exit(STOPPED)
        if self._cores:
            os.sched_setaffinity(0, self._cores)


def _cores(at_once: int) -> list[set[int]]:
    """The cores of each of so many processes; none if they may use all.

    All get the same number, on which the last bits of a training depend, even if cores are left over.
    """
    if at_once == 1 or not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(at_once)]
    cores = sorted(os.sched_getaffinity(0))
    size = max(len(cores) // at_once, 1)
    return [{cores[(slot * size + at) % len(cores)] for at in range(size)} for slot in range(at_once)]


def _reason(running: _Process, code: int) -> str:
    """Why a process failed, in one line: its own `error: …` if it printed one."""
    if code < 0:
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint} (see {running.log})"
    if code == STOPPED:
        return "stopped by a signal that somebody else sent, and saved"
    with open(running.log, "rb") as file:
        file.seek(max(running.printed, file.seek(0, os.SEEK_END) - _TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines or [""])[-1]
    return last if errors else f"exit code {code}: {last} (see {running.log})"


@contextmanager
def _heard(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Gives signals that ask for an end, or announce one, to the handler. Those that are ignored stay ignored."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _HEARD:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for which, old in before.items():
            signal.signal(which, signal.SIG_DFL if old is None else old)

"""Stopping in good order: a signal that asks for it ends the run after the current step, with everything saved."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# What people and cluster managers send to ask for an end. A second one ends the process at once.
_ASKING = (signal.SIGTERM, signal.SIGINT)
# What announces an end: the terminal or the ssh connection was lost (SIGHUP), a time limit is near (SIGUSR2, because
# `sbatch --signal=USR2@120` asks for it), a limit on CPU time was reached (SIGXCPU). These may come again while the run
# is being saved: a shell and the kernel both send SIGHUP, and SIGXCPU comes every second. So they never end the process
# at once.
_WARNING = (signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)


class Preemption:
    """A context manager that watches for a request to stop. A second SIGTERM or SIGINT ends the process at once.

    A single process has handlers that set a flag. Several processes must stop at the same step, so there JAX's
    preemption service catches SIGTERM in any of them and makes all agree on a step; the other signals are passed on to
    it. A warning that the process was started to ignore stays ignored, as SIGHUP is under `nohup`. After a stop, all of
    them are ignored.
    """

    def __init__(self) -> None:
        self._noted = False  # whether any of the signals came
        self._asked = False  # whether one of `_ASKING` came
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1
            # A handler for SIGTERM of our own would displace the service that jax.distributed installs.
            watched = [signal.SIGINT] if several else list(_ASKING)
            watched += [number for number in _WARNING if signal.getsignal(number) is not signal.SIG_IGN]
            for number in watched:
                self._old[number] = signal.signal(number, self._pass_on if several else self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            # A warning that comes again while the process ends must not kill it: it may still be saving.
            if self._noted and number in _WARNING:
                handler = signal.SIG_IGN
            # None: it was installed by something else than Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        asking = number in _ASKING
        if asking and self._asked:
            os._exit(128 + number)
        first = not self._noted
        # Noted before anything is printed: the next signal may come in the middle of the printing.
        self._noted, self._asked = True, self._asked or asking
        if first:
            more = "; once more to leave at once" if asking else ""
            # The terminal may be what was lost, and the signal may have come in the middle of another line.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                text = f"\n{signal.Signals(number).name}: saving after this step{more}"
                print(text, file=sys.stderr, flush=True)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        first = not self._noted
        self._note(number, frame)
        if first:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop now. Every process has to call this with every step, and all get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted

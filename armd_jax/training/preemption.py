"""Stopping in good order: SIGTERM or SIGINT ends the run after the current step, with everything saved."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# The exit code after a signal stopped the run and everything was saved; the same command continues. It is EX_TEMPFAIL
# of sysexits.h.
STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """A context manager that watches for a request to stop. A second signal ends the process at once.

    A single process has handlers that set a flag. Several processes must stop at the same step, so there JAX's
    preemption service catches SIGTERM in any of them and makes all agree on a step; SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1
            # A handler for SIGTERM of our own would displace the service that jax.distributed installs.
            for number in (signal.SIGINT,) if several else _SIGNALS:
                self._old[number] = signal.signal(number, self._pass_on if several else self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        print(
            f"\n{signal.Signals(number).name}: saving after this step; once more to leave at once",
            file=sys.stderr,
            flush=True,
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop now. Every process has to call this with every step, and all get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

"""Which of several processes the others wait for, as far as its host is to blame.

All processes of a job finish a step together, because their devices wait for one another inside it. What tells them
apart is the time of the host outside of that: fetching a batch, saving, or a CPU that something else uses. Every
process notes it at every row of metrics, in the key-value store of JAX's coordinator: no device waits for it.
"""

import contextlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # it has no public name; Orbax takes it from there, too

_PREFIX = "armd/host_seconds"
_NOTABLE = 0.1  # a process is named if it is behind the others by more than this fraction of a step


def slowest(host_seconds: Mapping[int, float], step_seconds: float) -> tuple[int, float] | None:
    """The process whose host takes longest, and by what fraction of a step longer than the median of the others.

    host_seconds: of a step, by process. None if it is behind by no more than a tenth of a step, or there are no others.
    """
    if len(host_seconds) < 2 or step_seconds <= 0:
        return None
    last = max(host_seconds, key=lambda process: host_seconds[process])
    others = statistics.median(seconds for process, seconds in host_seconds.items() if process != last)
    behind = (host_seconds[last] - others) / step_seconds
    return (last, behind) if behind > _NOTABLE else None


class Stragglers:
    """The times of all processes' hosts. With a single process, it does nothing."""

    def __init__(self) -> None:
        self._client: Any = jax_distributed.global_state.client if jax.process_count() > 1 else None

    def note(self, host_seconds: float, step_seconds: float) -> dict[str, float]:
        """Notes this process's seconds of a step on the host and of the whole step.

        Returns `train/slowest_process` and `train/behind`, or nothing if no process is behind. What the others noted
        may be that of the row before.
        """
        if self._client is None:
            return {}
        found: dict[int, float] = {}
        with contextlib.suppress(RuntimeError, ValueError):  # the coordinator is gone: the job is ending
            self._client.key_value_set(f"{_PREFIX}/{jax.process_index()}", f"{host_seconds:.6f}", allow_overwrite=True)
            if jax.process_index() == 0:
                found = {
                    int(key.rpartition("/")[2]): float(text) for key, text in self._client.key_value_dir_get(_PREFIX)
                }
        named = slowest(found, step_seconds)
        return {} if named is None else {"train/slowest_process": float(named[0]), "train/behind": named[1]}

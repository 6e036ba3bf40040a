"""How the wall-clock of a run was spent, over all of its processes: a function of its events alone.

Every process notes in `events.jsonl` on what it has spent its time so far (`seconds` of a row, see
`stopwatch.Activity`): when it begins to train, before every save, at the end, and in between so often that a process
that is killed takes at most a hundredth of its life, or half a second, with it.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from armd_jax import typed
from armd_jax.training.stopwatch import Activity

# lost: training, with its evaluations and waits for data, at steps that a later process had to train again.
# not_running: no process ran, or it was killed before it noted what it did.
Category = Literal[Activity, "lost", "not_running"]

_REDONE: tuple[Activity, ...] = ("training", "waiting", "evaluating")
_LARGEST = 1e12  # seconds and steps beyond this are none


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds of a run by category, of which every one is there; they add up to `wall_seconds`.

    wall_seconds: from the begin of its first process to the last that its processes noted. lost_steps: steps that had
    to be trained again. processes: how many got as far as training.
    """

    seconds: dict[Category, float]
    wall_seconds: float
    lost_steps: int
    processes: int

    def share(self, category: Category) -> float:
        """The fraction of the wall-clock."""
        return self.seconds[category] / self.wall_seconds if self.wall_seconds else 0.0


@dataclasses.dataclass
class _Piece:
    """What happened between two rows of one process.

    after, to: the steps that were done at the first and at the second row. lost: the part of the steps between them
    that had to be trained again.
    """

    after: float
    to: float
    seconds: dict[str, float]
    lost: float = 0.0

    def lose_beyond(self, step: float) -> None:
        """A process went on from `step`: whatever came behind it has to be done again."""
        if self.to > step:
            steps = self.to - self.after
            self.lost = max(self.lost, (self.to - max(self.after, step)) / steps if steps > 0 else 1.0)


def of(events: Iterable[Mapping[str, Any]]) -> Goodput | None:
    """The goodput of a run. None if its events do not tell, because an earlier version wrote them.

    events: the rows of `events.jsonl`, in order. Rows that make no sense are passed over.
    """
    pieces: list[_Piece] = []
    first = last = None
    before: dict[str, float] = {}
    at, processes = 0.0, 0
    for row in events:
        step, now, seconds = _number(row.get("step")), _number(row.get("time")), _seconds(row.get("seconds"))
        if step is None or now is None or seconds is None:
            continue
        if row.get("event") in ("start", "resume"):
            began = _number(row.get("began"))
            began = now if began is None else began
            if last is not None and began < last:  # two commands in one Python program: the program began before
                seconds = seconds | {"starting": max(seconds.get("starting", 0.0) - (last - began), 0.0)}
            for piece in pieces:
                piece.lose_beyond(step)
            first = began if first is None else first
            before, at, processes = {}, step, processes + 1
        if first is None:
            continue  # nobody knows when the process of this row began
        spent = {name: max(value - before.get(name, 0.0), 0.0) for name, value in seconds.items()}
        pieces.append(_Piece(at, max(step, at), spent))
        before, at, last = seconds, max(step, at), now if last is None else max(last, now)
    if first is None or last is None:
        return None
    total: dict[Category, float] = dict.fromkeys(typed.choices(Category), 0.0)  # type: ignore[arg-type]  # its names
    for piece in pieces:
        for name, value in piece.seconds.items():
            lost = value * piece.lost if name in _REDONE else 0.0
            total["lost"] += lost
            total[name] += value - lost  # type: ignore[index]  # `_seconds` lets only names of activities through
    total["not_running"] = max(last - first - sum(total.values()), 0.0)
    lost_steps = round(sum(piece.lost * (piece.to - piece.after) for piece in pieces))
    return Goodput(total, sum(total.values()), lost_steps, processes)


def _seconds(value: Any) -> dict[str, float] | None:
    if not isinstance(value, dict):
        return None
    found = {name: _number(value[name]) for name in typed.choices(Activity) if name in value}
    return {name: number for name, number in found.items() if number is not None}


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) and 0 <= value < _LARGEST else None

"""What changes if a run is continued with another number of steps, and a second warm-up if its rate would jump.

Learning rate and orders are functions of the step and of `training.num_steps`. A run of 20 steps on a cosine that goes
on to 40 would leap from the end of one cosine into the middle of the other.
"""

import dataclasses
import pathlib

from armd_jax import files, typed
from armd_jax.config import Config
from armd_jax.core import task as tasks
from armd_jax.errors import UserError
from armd_jax.training import optimizer
from armd_jax.training.optimizer import Rewarm

REWARM_FILE = "rewarm.json"  # in the workdir: the second warm-up of a run that was continued
# A rate that rises by less than this does not need one.
_JUMP = 1.1


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a run goes on.

    rewarm: the second warm-up of its rate, if it has one. changes: what is different from here on, in words; empty if
    nothing is. fresh: whether the second warm-up begins here and is not stored yet.
    """

    rewarm: Rewarm | None = None
    changes: str = ""
    fresh: bool = False


def of(workdir: pathlib.Path, old: Config, new: Config, step: int, rewarm_steps: int | None) -> Continuation:
    """How the run of `old` in `workdir` goes on at `step`, which its newest checkpoint has reached, as `new`.

    rewarm_steps: over how many steps the rate may rise if it would jump, 0 for a jump. None: it may not jump.
    Raises UserError if the rate would jump and may not.
    """
    known = _stored(workdir)
    was, now = old.training.num_steps, new.training.num_steps
    if was == now or step >= now:
        return Continuation(known)
    # Both are compared at the same step, because a rate that warms up rises from step to step in any case. If the run
    # is complete, that is its last one.
    last = min(step, was - 1)
    before, instead, after = (
        float(optimizer.learning_rate(config, known)(at)) for config, at in ((old, last), (new, last), (new, step))
    )
    changes = []
    if f"{before:.3g}" != f"{instead:.3g}":
        changes.append(f"the learning rate goes from {before:.3g} to {after:.3g}")
    if _phase(old, last) != _phase(new, last):
        phases = f"from the phase {_phase(old, last)!r} to {_phase(new, step)!r}"
        changes.append(f"{tasks.of(new).drawn} go {phases}")
    jumps = instead > _JUMP * before
    if jumps and rewarm_steps is None:
        raise UserError(
            f"{workdir}: training.num_steps was {was}, now {now}: at step {step} the learning rate would jump from"
            f" {before:.3g} to {after:.3g}; give --rewarm=STEPS to let it rise over that many steps, or --rewarm=0 to"
            " let it jump"
        )
    text = f"training.num_steps was {was}, now {now}: {', '.join(changes)}" if changes else ""
    if not (jumps and rewarm_steps):
        return Continuation(known, text)
    return Continuation(Rewarm(step, rewarm_steps, before), f"{text} over {rewarm_steps} steps", fresh=True)


def store(workdir: pathlib.Path, rewarm: Rewarm) -> None:
    """Keeps a second warm-up with the run, so that it goes on in the same way however often it is taken up."""
    files.write(workdir / REWARM_FILE, typed.to_json(rewarm) + "\n")


def _stored(workdir: pathlib.Path) -> Rewarm | None:
    file = workdir / REWARM_FILE
    if not file.exists():
        return None
    values = files.read_json(file)
    try:
        return typed.build(Rewarm, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _phase(config: Config, step: int) -> str:
    return next(phase.name for phase in tasks.of(config).phases if phase.first <= step < phase.end)

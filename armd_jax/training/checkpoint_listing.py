"""What `armd checkpoints` lists: every checkpoint of a run, read and verified."""

import dataclasses
import os
import pathlib

import jax

from armd_jax import config as configs
from armd_jax.errors import UserError
from armd_jax.training import checkpoints
from armd_jax.training import state as states


@dataclasses.dataclass(frozen=True)
class Found:
    """One checkpoint as `armd checkpoints` lists it. `fault` is empty if it is whole."""

    step: int
    bytes: int
    parameters: int
    average: bool  # whether it holds averaged parameters
    skipped: int  # how many updates in a row had been skipped when it was made
    fault: str


def inspect(run: pathlib.Path) -> list[Found]:
    """Every checkpoint of a run, oldest first, each read whole and verified. Raises UserError if there is no run."""
    config = configs.read(run)
    found = []
    with checkpoints.reading(run, config) as checkpointer:
        target = states.abstract(config, checkpoints.one_device())
        parameters = sum(leaf.size for leaf in jax.tree.leaves(target.params))
        for step in checkpointer.steps():
            folder = run / "checkpoints" / str(step)
            size = sum(os.path.getsize(file) for file in folder.rglob("*") if file.is_file())
            try:
                state = checkpointer.restore(step, target)
                found.append(Found(step, size, parameters, state.ema is not None, int(state.skipped), ""))
            except UserError as error:
                found.append(Found(step, size, 0, False, 0, str(error)))
    return found

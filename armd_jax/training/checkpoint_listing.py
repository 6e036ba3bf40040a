"""What `armd checkpoints` lists: every checkpoint of a run, read and verified."""

import dataclasses
import pathlib

import jax
from etils import epath

from armd_jax import config as configs
from armd_jax import remote
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
            size = _bytes(remote.checkpoint_folder(run) / str(step))
            try:
                state = checkpointer.restore(step, target)
                found.append(Found(step, size, parameters, state.ema is not None, int(state.skipped), ""))
            except UserError as error:
                found.append(Found(step, size, 0, False, 0, str(error)))
    return found


def _bytes(folder: epath.Path) -> int:
    """The size of all files of a folder."""
    sizes = (_bytes(path) if path.is_dir() else path.stat().length for path in folder.iterdir())
    return sum(sizes)

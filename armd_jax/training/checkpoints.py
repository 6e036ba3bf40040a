"""Orbax checkpoints of a run: saving while training goes on, restoring the newest one that is whole."""

import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from armd_jax.config import Config, UserError, from_config_dict
from armd_jax.training import sharding
from armd_jax.training import state as states
from armd_jax.training.state import TrainState


class Checkpointer:
    """The checkpoints of one workdir. Use as a context manager: leaving it waits for a save that was begun."""

    def __init__(self, workdir: pathlib.Path, config: Config, read_only: bool = False) -> None:
        self._workdir, self._read_only = workdir, read_only
        training = config.training
        keep = [checkpoint_managers.LatestN(training.keep_checkpoints)]
        if training.keep_every:
            keep.append(checkpoint_managers.EveryNSteps(training.keep_every))
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(training.checkpoint_every),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainState, step: int) -> bool:
        """Saves in the background, where `step` is due by the config's interval; True where a save was begun."""
        return self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def save_last(self, state: TrainState, step: int) -> bool:
        """Saves whatever the interval says, unless this step is saved already."""
        if step in self._manager.all_steps():
            return False
        return self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def restore_newest(self, target: TrainState, on_skip: Callable[[int, str], None]) -> TrainState | None:
        """The newest checkpoint that can be read, into the shapes and shardings of `target`; None where there is none.

        A damaged one is reported through on_skip(step, reason) and passed over; unless reading only, it is moved to
        `damaged/<step>` beside the checkpoints, so that the step can be saved again and retention counts good ones.
        Raises UserError where there are checkpoints but none can be read.
        """
        found = self.steps()
        state, damaged = None, []
        for step in reversed(found):
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                state = self._manager.restore(step, args=args).state
                break
            except Exception as error:  # Orbax raises anything from KeyError to a bare Exception for damaged files
                on_skip(step, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                damaged.append(step)
        if found and state is None:
            raise UserError(f"{self._manager.directory}: none of the checkpoints {found} can be read")
        if damaged and not self._read_only and jax.process_index() == 0:
            aside = self._workdir / "damaged"
            aside.mkdir(exist_ok=True)
            for step in damaged:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                shutil.move(self._workdir / "checkpoints" / str(step), aside / str(step))
        if damaged:
            self._manager.reload()
        return state


def read_config(run: pathlib.Path) -> Config:
    """The resolved config of a run directory. Raises UserError where there is none."""
    try:
        values = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{run}: not a training run: config.json cannot be read ({error})") from error
    return from_config_dict(values)


def restore_for_inference(run: pathlib.Path, config: Config, mesh: Mesh | None = None) -> TrainState:
    """The newest whole state of a run, on this machine's devices."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    mesh = mesh or jax.sharding.Mesh(
        [[[jax.local_devices()[0]]]], sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run}: has no checkpoints yet")
    skipped: list[Any] = []
    with Checkpointer(run, config, read_only=True) as checkpointer:
        state = checkpointer.restore_newest(states.abstract(config, mesh), lambda *what: skipped.append(what))
    if state is None:
        raise UserError(f"{run}: has no checkpoints yet")
    return state

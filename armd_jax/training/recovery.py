"""What happens after too many skipped updates in a row: a report, then a rollback or the end of the run."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any, assert_never

import jax.numpy as jnp

from armd_jax import remote
from armd_jax.data import loader
from armd_jax.data.mixture import Data, sources_of
from armd_jax.training import faults, run_data
from armd_jax.training.checkpoints import Checkpointer
from armd_jax.training.faults import RunFailed
from armd_jax.training.placement import Placement
from armd_jax.training.run_log import RunLog
from armd_jax.training.state import TrainState


class Recovery:
    """Call it after more than `training.max_skipped` skipped updates in a row."""

    def __init__(
        self,
        placement: Placement,
        data: Data,
        workdir: pathlib.Path,
        checkpointer: Checkpointer,
        target: TrainState,
        log: RunLog,
    ) -> None:
        self._placement, self._data, self._workdir = placement, data, workdir
        self._checkpointer, self._target, self._log = checkpointer, target, log
        self._rolled_back_at = -1

    def __call__(self, state: TrainState, done: int) -> TrainState:
        """The parameters of the last good checkpoint, at step `done`: training goes on past the batches that failed.

        Only checkpoints of the config's interval count, not those of a stop, so that a run that was stopped on the way
        goes back to where an unbroken one would. Learning rate, order and average go on from `done`: all of them count
        batches.
        Raises RunFailed if there is no such checkpoint, if every update since the last rollback was skipped, or if the
        config says stop.
        """
        training = self._placement.config.training
        failed = done - 1 - training.max_skipped - 1  # the first skipped update took the batch of this step
        report = self._written_report(state, failed, done - 1)
        match training.after_skipped:
            case "stop":
                raise RunFailed(f"updates {failed + 1} to {done - 1} were all skipped; see {report}")
            case "rollback":
                return self._roll_back(state, failed, done, report)
            case _:
                assert_never(training.after_skipped)

    def _roll_back(self, state: TrainState, failed: int, done: int, report: str) -> TrainState:
        if self._rolled_back_at >= failed:
            raise RunFailed(f"every update since the rollback at step {self._rolled_back_at} was skipped; see {report}")
        self._checkpointer.wait()
        every = self._placement.config.training.checkpoint_every
        restored = self._checkpointer.restore_newest(
            self._target, self._log.damaged, among=lambda at: at <= failed and at % every == 0
        )
        if restored is None:
            raise RunFailed(
                f"updates {failed + 1} to {done - 1} were skipped, and no checkpoint is older than they; see {report}"
            )
        self._rolled_back_at = done
        self._log.restored()
        back = int(restored.step)
        self._log.event("rollback", done, to=back, report=report)
        self._log.tell(f"step {done}: back to the parameters of step {back}, past the batches; see {report}")
        return dataclasses.replace(restored, step=state.step, skipped=jnp.zeros_like(state.skipped))

    def _written_report(self, state: TrainState, first: int, end: int) -> str:
        """The path of the report, or why there is none: a run that can go on does not end because of a full disk."""
        try:
            return str(self._report(state, first, end))
        except OSError as error:
            return f"no report, because it could not be written ({error.strerror or error})"

    def _report(self, state: TrainState, first: int, end: int) -> pathlib.Path:
        """Writes which steps failed, their rows of the training data, and the first tensor that was not finite."""
        config, mesh = self._placement.config, self._placement.mesh
        size, seed = config.training.batch_size, config.training.seed
        with run_data.global_batches(config, self._data, mesh, first) as batches:
            _, tokens_BN = next(batches)
        at_first = dataclasses.replace(state, step=jnp.full_like(state.step, first))
        report = {
            "first_step": first + 1,
            "last_step": end,
            "first_non_finite": faults.first_non_finite(self._placement, at_first, tokens_BN),
            **rows_of(self._data, range(first, end), size, seed),
        }
        return faults.write_report(self._workdir, first + 1, report)


def rows_of(data: Data, steps: Iterable[int], batch_size: int, seed: int) -> dict[str, dict[str, list[Any]]]:
    """What a report says of batches, by their number from 1: the training rows, and of a mixture their folders too."""
    found = {str(at + 1): loader.batch_rows(data, at, batch_size, seed) for at in steps}
    rows = {"batch_rows": {at: rows.tolist() for at, (_, rows) in found.items()}}
    folders = [remote.spelled(str(source.folder)) for source in sources_of(data)]
    if len(folders) > 1:
        rows["batch_folders"] = {at: [folders[number] for number in numbers] for at, (numbers, _) in found.items()}
    return rows

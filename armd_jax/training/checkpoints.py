"""Orbax checkpoints of a run: saving while training goes on, restoring the newest one that is whole.

A checkpoint holds the training state and a digest of every array in it. Orbax notices a truncated file, but returns
flipped bytes without an error and lists an emptied folder as the newest step. A checkpoint therefore counts as whole
only if it can be read, has the arrays that the config asks for, and every digest is that of what was saved.
"""

import contextlib
import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from armd_jax import remote
from armd_jax.config import Config
from armd_jax.core.parameters import Params
from armd_jax.errors import UserError, out_of_memory
from armd_jax.training import sharding
from armd_jax.training import state as states
from armd_jax.training.state import TrainState

OnFault = Callable[[int, str], None]  # (step, reason)
# What is restored of a checkpoint: the whole state, or some of its fields by their names.
Wanted = TypeVar("Wanted", bound=TrainState | dict[str, Params])
_Read = TypeVar("_Read")


class Checkpointer:
    """The checkpoints of one workdir. Use it as a context manager; leaving it waits for a save that is under way."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        read_only: bool = False,
        on_saved: Callable[[int], None] = lambda step: None,
        on_failed_save: OnFault | None = None,
    ) -> None:
        """on_saved, on_failed_save: called when a save has ended, with its step, at the next call of this object."""
        self._folder_of_steps, self._read_only = remote.checkpoint_folder(workdir), read_only
        self._on_saved, self._on_failed_save = on_saved, on_failed_save
        self._begun: int | None = None  # the step of the save that may still be under way
        self._last_failed = False
        if not read_only:
            self._remove_unfinished()
        training = config.training
        # A rollback needs a checkpoint of the interval, so the newest of them stays however many stops come after it.
        every = checkpoint_managers.EveryNSteps(training.checkpoint_every, max_to_keep=1)
        keep = [checkpoint_managers.LatestN(training.keep_checkpoints), every]
        if training.keep_every:
            keep.append(checkpoint_managers.EveryNSteps(training.keep_every))
        self._manager = ocp.CheckpointManager(
            self._folder_of_steps,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(training.checkpoint_every),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                read_only=read_only,
            ),
            handler_registry=_handlers(),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # the other processes may be gone, so waiting for them could hang, and the job is ending anyway
        self.wait()
        try:
            self._manager.close()
        except Exception:
            if not self._last_failed:  # Orbax raises the error of a failed save again, which was told already
                raise
        if self._last_failed:
            self._remove_unfinished()

    def save(self, state: TrainState, step: int, force: bool = False) -> bool:
        """Begins to save in the background if the config's interval makes `step` due, or in any case with `force`.

        Returns whether a save was begun. If it fails, on a full disk for example, earlier checkpoints stay.
        """
        if step in self._manager.all_steps() or not (force or self._manager.should_save(step)):
            return False
        if not self.wait():
            self._remove_unfinished()
        meta = {"step": step, "digests": _numbers(digests(state))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._begun = step
        try:
            if not self._manager.save(step, args=items, force=True):
                self._begun = None
        except Exception as error:
            self._failed(error)
        return self._begun is not None

    def poll(self) -> None:
        """Finds out whether the save under way has ended, without waiting. Cheap: call it after every step."""
        if self._last_failed and self._begun is None:
            self._remove_unfinished()  # again, because a part of the save that failed may have gone on
        # Several processes wait for one another at the next save, and must not do so at different steps.
        if self._begun is not None and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> bool:
        """Waits until the save that is under way is on disk. Returns whether the last save succeeded."""
        if self._begun is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                self._failed(error)
            else:
                step, self._begun, self._last_failed = self._begun, None, False
                self._on_saved(step)
        return not self._last_failed

    def _failed(self, error: Exception) -> None:
        step, self._begun, self._last_failed = self._begun, None, True
        alone = jax.process_count() == 1  # one process of several must not go on by itself
        if self._on_failed_save is None or step is None or not alone:
            raise error
        self._remove_unfinished()
        self._on_failed_save(step, line(error))
        self._manager.reload()

    def _remove_unfinished(self) -> None:
        """Removes what saves left that failed or were killed: it could keep a disk full for ever."""
        if jax.process_index() == 0:
            for _ in range(20):  # another part of a failed save may still be writing
                left = remote.unfinished(self._folder_of_steps)
                if not left:
                    break
                for folder in left:
                    with contextlib.suppress(OSError):
                        folder.rmtree(missing_ok=True)
                time.sleep(0.1)

    def steps(self) -> list[int]:
        """The saved steps, oldest first, whole or not."""
        return sorted(self._manager.all_steps())

    def restore(self, step: int, target: Wanted) -> Wanted:
        """The state of one step, or the fields of it that `target` has, in the shapes and shardings of `target`.

        Of fields, no other array is read. Raises UserError if what is asked for is not whole.
        """
        reason, state = "", target
        try:
            stored = self._as_stored(step, target)
            state, wanted = self._read(step, stored)
            wrong = [name for name, number in _numbers(digests(state)).items() if wanted.get(name) != number]
            if stored is not target:
                state = _with_new_averages(state, target)
            reason = f"{wrong[0]} is not what was saved (its digest differs)" if wrong else ""
        except Exception as error:  # Orbax raises anything from KeyError to a bare Exception for damaged files
            if out_of_memory(error) is not None:
                raise  # the checkpoint may be whole, and must not be moved aside
            reason = line(error)
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.asarray(bool(reason))).any():
            reason = reason or "damaged for another process"  # all take the same checkpoint
        if reason:
            raise UserError(f"{self._folder(step)}: {reason}")
        return state

    def _read(self, step: int, target: Wanted) -> tuple[Wanted, dict[str, int]]:
        """The arrays of `target`, and the digests of all arrays that were saved."""
        meta = ocp.args.JsonRestore()
        if isinstance(target, TrainState):
            whole = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=meta)
            restored = self._manager.restore(step, args=whole)
            return restored.state, restored.meta["digests"]
        digests_of_all = self._manager.restore(step, args=ocp.args.Composite(meta=meta)).meta["digests"]
        # The handler that saved the state restores all of it; the one inside it also restores parts.
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        part = ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True)
        handler = ocp.PyTreeCheckpointHandler()
        try:
            return handler.restore(self._folder(step) / "state", args=part), digests_of_all
        finally:
            handler.close()

    def described(self, step: int, target: dict[str, Params]) -> tuple[epath.Path, dict[str, int]]:
        """The folder of a step's arrays, and the digest of each by its name, without reading one.

        Raises UserError if the arrays of `target` are not there, or not in its shapes.
        """
        try:
            self._as_stored(step, target)
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            return self._folder(step) / "state", dict(meta["digests"])
        except Exception as error:  # Orbax raises anything for damaged files
            if out_of_memory(error) is not None:
                raise
            raise UserError(f"{self._folder(step)}: {line(error)}") from error

    def _folder(self, step: int) -> epath.Path:
        return self._folder_of_steps / str(step)

    def _as_stored(self, step: int, target: Wanted) -> Wanted:
        """`target` as it is stored: older runs have one average of all losses.

        Raises ValueError if the stored arrays are not those of `target`. Orbax's own errors would fill screens.
        """
        metadata = self._manager.item_metadata(step)
        if metadata.state is None:
            raise ValueError("holds no training state")
        stored = {name: leaf.shape for name, leaf in _named(metadata.state.tree)}
        changed: Any = target
        if isinstance(target, TrainState) and target.loss_average.shape and stored.get("loss_average") == ():
            one: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=target.loss_average.sharding)
            changed = dataclasses.replace(target, loss_average=one)
        wanted = {name: leaf.shape for name, leaf in _named(changed)}
        compared = stored.keys() | wanted.keys() if isinstance(target, TrainState) else wanted.keys()
        for name in sorted(compared):
            if stored.get(name) != wanted.get(name):
                raise ValueError(f"{name} has shape {stored.get(name)}, the config asks for {wanted.get(name)}")
        return changed

    def restore_newest(
        self, target: Wanted, on_skip: OnFault, among: Callable[[int], bool] = lambda step: True
    ) -> Wanted | None:
        """What `restore` gives of the newest whole checkpoint, as `newest` finds it."""
        return self.newest(lambda step: self.restore(step, target), on_skip, among)

    def newest(
        self, read: Callable[[int], _Read], on_skip: OnFault, among: Callable[[int], bool] = lambda step: True
    ) -> _Read | None:
        """What `read` gives of the newest checkpoint that it can read, of those whose step qualifies; None without one.

        read: raises UserError if a step is damaged. That step is reported through on_skip(step, reason) and passed
            over. Unless this object only reads, it is also moved to `damaged/<step>` beside the checkpoints, so that
            the step can be saved again and only good checkpoints count towards how many are kept.
        Raises UserError if there are checkpoints but none of them is whole.
        """
        found = [step for step in self.steps() if among(step)]
        state: _Read | None = None
        damaged: dict[int, str] = {}
        for step in reversed(found):
            try:
                state = read(step)
                break
            except UserError as error:
                damaged[step] = str(error)
        if found and state is None:
            newest = next(iter(damaged.values()))
            raise UserError(
                f"{self._manager.directory}: none of the checkpoints {found} can be read; of the newest: {newest}"
            )
        for step, reason in damaged.items():
            on_skip(step, reason)
        if damaged and not self._read_only:
            self._move_aside(list(damaged))
        return state

    def _move_aside(self, damaged: list[int]) -> None:
        if jax.process_index() == 0:
            aside = self._folder_of_steps.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for step in damaged:
                (aside / str(step)).rmtree(missing_ok=True)
                self._folder(step).rename(aside / str(step))
        multihost_utils.sync_global_devices("damaged checkpoints moved")
        self._manager.reload()


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """The handlers of each item. Naming them beforehand lets a fresh manager find out the shapes that are stored."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state, meta = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
    for item, handler, kinds in (
        ("state", state, (ocp.args.StandardSave, ocp.args.StandardRestore)),
        ("meta", meta, (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for kind in kinds:
            registry.add(item, kind, handler)
    return registry


def line(error: Exception) -> str:
    """The error of a library in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# --- digests --------------------------------------------------------------------------------------------------------


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves with their dotted path. The names are the same for a state and for what Orbax stored of it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path), leaf


def _with_new_averages(state: Any, target: Any) -> Any:
    """The state with averages of the loss that begin anew, in the shape and sharding of `target`."""
    averages = jnp.full(target.loss_average.shape, jnp.inf, jnp.float32)
    return dataclasses.replace(state, loss_average=jax.device_put(averages, target.loss_average.sharding))


@jax.jit
def digests(state: Wanted) -> Wanted:
    """A uint32 for every array: the sum of its words, each times an odd number of its own, modulo 2^32.

    Integer sums that wrap around do not depend on the order of the terms, so the digest is the same on every mesh. An
    odd factor is invertible, so no change of a single word goes unseen.
    """

    def digest(array: jax.Array) -> jax.Array:
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
        index, stride = jnp.uint32(0), 1
        for axis in reversed(range(array.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= array.shape[axis]
        return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(digest, state)


def _numbers(tree: TrainState | dict[str, Params]) -> dict[str, int]:
    return {name: int(number) for name, number in _named(tree)}


# --- reading a run --------------------------------------------------------------------------------------------------


def one_device() -> Mesh:
    """The mesh of one device of this process."""
    return Mesh([[[jax.local_devices()[0]]]], sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def restore_for_inference(run: pathlib.Path, config: Config, mesh: Mesh | None = None) -> TrainState:
    """The newest whole state of a run, spread over the mesh, or on one device if there is none."""
    return _restore_newest(run, config, states.abstract(config, mesh or one_device()))


def restore_params(run: pathlib.Path, config: Config, ema: bool = True, mesh: Mesh | None = None) -> Params:
    """The parameters of the newest checkpoint of a run that has them whole, spread over the mesh or on one device.

    Nothing else is read: neither the moments of the optimizer, nor of raw parameters and average what is not asked for.

    ema: the average, if the run keeps one.
    """
    target = states.abstract(config, mesh or one_device())
    name = "params" if target.ema is None or not ema else "ema"
    return _restore_newest(run, config, {name: getattr(target, name)})[name]


def _restore_newest(run: pathlib.Path, config: Config, target: Wanted) -> Wanted:
    with reading(run, config) as checkpointer:
        return newest_of_run(run, checkpointer, lambda step: checkpointer.restore(step, target))


def reading(run: pathlib.Path, config: Config) -> Checkpointer:
    """The checkpoints of a run, to read them. Raises UserError if there is no folder of them."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    folder = remote.checkpoint_folder(run)
    if not folder.is_dir():
        raise UserError(f"{run}: has no checkpoints yet")
    remote.unfinished(folder)  # says if they are of a kind that does not count there
    return Checkpointer(run, config, read_only=True)


def newest_of_run(run: pathlib.Path, checkpointer: Checkpointer, read: Callable[[int], _Read]) -> _Read:
    """`Checkpointer.newest` for those who only read: damage is told on stderr. Raises UserError if there is no step."""
    found = checkpointer.newest(read, lambda _, why: print(f"damaged checkpoint passed over: {why}", file=sys.stderr))
    if found is None:
        raise UserError(f"{run}: has no checkpoints yet")
    return found

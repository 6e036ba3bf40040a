"""The training loop, top to bottom: data, mesh, state, restore, steps."""

import contextlib
import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from armd_jax import config as configs
from armd_jax.config import Config, UserError
from armd_jax.core.network import Params
from armd_jax.data import loader, packing
from armd_jax.data.packing import PreparedData
from armd_jax.training import checkpoints, faults, sharding, step
from armd_jax.training import state as states
from armd_jax.training import workdir as workdirs
from armd_jax.training.checkpoints import Checkpointer
from armd_jax.training.faults import RunFailed
from armd_jax.training.metrics import write_atomically
from armd_jax.training.preemption import Preemption
from armd_jax.training.run_log import RunLog
from armd_jax.training.state import TrainState

# Makes the weights that a new run starts from, of its resolved config, its data and its mesh.
InitialParams = Callable[[Config, PreparedData, Mesh], Params]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training call did. `steps_done` is 0 where the run was complete already.

    stopped: a signal ended it before its last step, with everything saved.
    """

    state: TrainState
    config: Config
    steps_done: int
    stopped: bool = False


def prepare_data(config: Config, workdir: pathlib.Path, progress: bool = True) -> tuple[PreparedData, Config]:
    """The prepared data of the config (made now where it is not there yet) and the config with its vocabulary size."""
    root = pathlib.Path(config.data.cache_dir) if config.data.cache_dir else workdir / "data"
    data = packing.prepare(config.data, config.model.max_length, root, progress=progress)
    return data, with_vocabulary(config, data)


def with_vocabulary(config: Config, data: PreparedData) -> Config:
    """The config with the tokenizer's vocabulary size; UserError where it names another."""
    size = data.tokenizer.vocab_size
    if config.model.vocab_size not in (0, size):
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the data's tokenizer has {size}; leave it at 0"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def train(
    config: Config,
    workdir: pathlib.Path,
    initial_params: InitialParams | None = None,
    progress: bool = True,
    debug_nans: bool = False,
) -> Result:
    """Trains to `training.num_steps`, continuing what is in `workdir`.

    Raises UserError where the input cannot work, RunFailed where the run cannot go on by itself.

    initial_params: called for the weights to start from where there is no checkpoint yet (fine-tuning). debug_nans:
    waits for every step, and ends the run at the first update that had to be skipped, with the operation to blame.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save in several lines
    workdir = workdir.absolute()
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        # --- config and data -------------------------------------------------------------------------------------
        old = checkpoints.read_config(workdir) if (workdir / "config.json").exists() else None
        if old is None:
            configs.check_new_run(config)
        workdirs.check_writable(workdir)
        mesh = sharding.make_mesh(config.mesh)
        if old is not None:
            workdirs.check_continuation(old, config, workdir)
        if primary:
            stack.enter_context(workdirs.locked(workdir))
            stack.enter_context(workdirs.left_as_found(workdir))
            data, config = prepare_data(config, workdir, progress)
        multihost_utils.sync_global_devices("data prepared")
        if not primary:
            data, config = prepare_data(config, workdir, progress=False)
        sharding.check_divisible(config, mesh)
        if old is not None:
            workdirs.check_same_data(workdir, data)

        # --- state: the newest checkpoint, else given weights, else random ones ------------------------------------
        log = RunLog(config, primary and progress)
        checkpointer = stack.enter_context(checkpoints.Checkpointer(workdir, config, on_failed_save=log.save_failed))
        target = states.abstract(config, mesh)
        state = checkpointer.restore_newest(target, log.damaged)
        resumed = state is not None
        if state is None:
            state = states.create(config, mesh, initial_params and initial_params(config, data, mesh))
        if primary:
            data.tokenizer.save(workdir / "tokenizer")
            write_atomically(workdir / "config.json", configs.to_json(config))
        first_step, last_step = int(state.step), config.training.num_steps
        if first_step >= last_step:
            return Result(state, config, 0)

        # --- what the run writes -----------------------------------------------------------------------------------
        log.open(stack, workdir if primary else None, first_step, int(state.skipped))
        log.event("resume" if resumed else "start", first_step, time=time.time(), data=data.digest)
        if primary and progress and mesh.size > 1:
            print(sharding.placement(state.params), file=sys.stderr)

        # --- steps -----------------------------------------------------------------------------------------------
        train_step = step.make_train_step(config, mesh)
        evaluate = _Evaluation(config, mesh, data)
        recovery = _Recovery(config, mesh, data, workdir, checkpointer, target, log)
        preemption = stack.enter_context(Preemption())
        stopped = False
        batches = stack.enter_context(_global_batches(config, data, mesh, first_step))
        for number, tokens_BN in batches:
            done = number + 1
            state, metrics = train_step(state, tokens_BN)
            if log.read(done, metrics) > config.training.max_skipped:
                state = recovery(state, done)
            if debug_nans and int(state.skipped):
                raise RunFailed(f"step {done}: {faults.pinpoint(config, mesh, state, number, tokens_BN)}")
            if config.training.eval_every and (done % config.training.eval_every == 0 or done == last_step):
                log.flush()
                log.evaluated(done, evaluate(state.eval_params))
            stopped = done < last_step and preemption.requested(done)
            log.save(checkpointer, state, done, force=stopped or done == last_step)
            log.bar.update()
            if stopped or done == last_step:
                break
        log.flush()
        if not checkpointer.wait():
            raise RunFailed(f"{workdir}: the checkpoint of step {done} could not be saved; earlier ones are kept")
        log.event("stop" if stopped else "end", done, time=time.time())
    return Result(state, config, done - first_step, stopped)


@contextlib.contextmanager
def _global_batches(config: Config, data: PreparedData, mesh: Mesh, first: int) -> Iterator[Iterator]:
    """Batches from step `first` on as global arrays; each process loads the rows of its own devices only."""
    size = config.training.batch_size
    here = sharding.rows_here(mesh, size)
    with loader.train_batches(data, size, config.training.seed, first, here) as batches:
        yield ((n, sharding.global_rows(mesh, size, here, tokens)) for n, tokens in batches)


class _Recovery:
    """What happens after more than `max_skipped` skipped updates in a row: report, then roll back or stop."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: PreparedData,
        workdir: pathlib.Path,
        checkpointer: Checkpointer,
        target: TrainState,
        log: RunLog,
    ) -> None:
        self._config, self._mesh, self._data, self._workdir = config, mesh, data, workdir
        self._checkpointer, self._target, self._log = checkpointer, target, log
        self._rolled_back_at = -1

    def __call__(self, state: TrainState, done: int) -> TrainState:
        """The parameters of the last good checkpoint, at step `done`: past the batches that failed.

        Only checkpoints of the config's interval count, not those of a stop: so a run that was stopped on the way goes
        back to where an unbroken one would. The learning rate goes by the updates that count, the order by `done`.
        Raises RunFailed where there is no such checkpoint, where nothing went well since the last rollback, and where
        the config says stop.
        """
        failed = done - 1 - self._config.training.max_skipped - 1  # the first skipped update took this step's batch
        report = self._report(state, failed, done - 1)
        if self._config.training.after_skipped == "stop":
            raise RunFailed(f"updates {failed + 1} to {done - 1} were all skipped; see {report}")
        if self._rolled_back_at >= failed:
            raise RunFailed(f"every update since the rollback at step {self._rolled_back_at} was skipped; see {report}")
        self._checkpointer.wait()
        every = self._config.training.checkpoint_every
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
        self._log.event("rollback", done, to=back, report=str(report))
        self._log.tell(f"step {done}: back to the parameters of step {back}, past the batches; see {report}")
        zero = jnp.zeros_like(state.skipped)
        return dataclasses.replace(restored, step=state.step, skipped=zero)

    def _report(self, state: TrainState, first: int, end: int) -> pathlib.Path:
        """Writes which steps failed, their rows of the training data, and the first tensor that was not finite."""
        training = self._config.training
        num_rows = self._data.counts("train").tokens // self._data.length
        size, seed = training.batch_size, training.seed
        rows = {str(at + 1): loader.batch_indices(at, size, seed, num_rows).tolist() for at in range(first, end)}
        with _global_batches(self._config, self._data, self._mesh, first) as batches:
            _, tokens_BN = next(batches)
        at_first = dataclasses.replace(state, step=jnp.full_like(state.step, first))
        found = faults.first_non_finite(self._config, self._mesh, at_first, tokens_BN)
        report = {
            "first_step": first + 1,
            "last_step": end,
            "first_non_finite": found,
            "batch_rows": rows,
        }
        return faults.write_report(self._workdir, first + 1, report)


class _Evaluation:
    """Exact left-to-right loss on the first batches of the validation split."""

    def __init__(self, config: Config, mesh: Mesh, data: PreparedData) -> None:
        self._config, self._mesh, self._data = config, mesh, data
        self._step = step.make_eval_step(config, mesh)

    def __call__(self, params: Params) -> dict[str, float]:
        if "valid" not in self._data.splits:
            return {}
        size, limit = self._config.training.batch_size, self._config.training.eval_batches or None
        here = sharding.rows_here(self._mesh, size)
        nll = tokens = 0.0
        for batch, valid in loader.eval_batches(self._data, "valid", size, limit):
            arrays = (sharding.global_rows(self._mesh, size, here, a[here]) for a in (batch, valid))
            sums = self._step(params, *arrays)
            nll, tokens = nll + float(sums.nll), tokens + float(sums.tokens)
        return {"eval/nll": nll / tokens, "eval/perplexity": float(np.exp(nll / tokens))}

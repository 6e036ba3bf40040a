"""The training loop, top to bottom: data, mesh, state, restore, steps."""

import contextlib
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from armd_jax import config as configs
from armd_jax import remote, streams
from armd_jax.config import Config
from armd_jax.core.parameters import Params
from armd_jax.data.mixture import Data, sources_of
from armd_jax.training import checkpoints, continuation, divisibility, faults, placement, run_data, sharding, step
from armd_jax.training import state as states
from armd_jax.training import workdir as workdirs
from armd_jax.training.continuation import Continuation
from armd_jax.training.faults import RunFailed
from armd_jax.training.preemption import Preemption
from armd_jax.training.profiling import Profiler
from armd_jax.training.recovery import Recovery
from armd_jax.training.run_log import RunLog, parameter_table
from armd_jax.training.state import TrainState
from armd_jax.training.stopwatch import Stopwatch
from armd_jax.training.validation import Validation

# Makes the weights that a new run starts from, given its resolved config, its data and its mesh.
InitialParams = Callable[[Config, Data, Mesh], Params]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training call did.

    steps_done: 0 if the run was complete already. stopped: a signal ended it before its last step, and everything is
    saved.
    """

    state: TrainState
    config: Config
    steps_done: int
    stopped: bool = False


def train(
    config: Config,
    workdir: pathlib.Path,
    initial_params: InitialParams | None = None,
    progress: bool = True,
    debug_nans: bool = False,
    rewarm_steps: int | None = None,
    began: float | None = None,
) -> Result:
    """Trains until `training.num_steps`, from the newest whole checkpoint in `workdir` if there is one.

    initial_params: called for the weights to start from if there is no checkpoint yet (fine-tuning).
    progress: show a progress bar, and the config when the run begins.
    debug_nans: wait for every step, and end the run at the first update that had to be skipped, naming the operation
        that is to blame.
    rewarm_steps: over how many steps the learning rate may rise if another number of steps would make it jump, 0 to let
        it jump. None: that is an error.
    began: when the process began, in seconds since 1970, if the time until now counts as part of the run.
    Raises UserError if the input cannot work, and RunFailed if the run cannot go on by itself.
    """
    # Orbax writes several lines about every save, and tracebacks about one that failed, which is told in one line here.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    workdir = workdir.absolute()
    primary, watch = jax.process_index() == 0, Stopwatch(began)
    with contextlib.ExitStack() as stack:
        stack.enter_context(streams.forgiving())
        # --- config and data -------------------------------------------------------------------------------------
        old = workdirs.begun(workdir)
        if old is None:
            configs.check_new_run(config)
        workdirs.check_writable(workdir)
        mesh = sharding.make_mesh(config.mesh)
        if old is not None:
            workdirs.check_continuation(old, config, workdir)
        divisibility.check(config, mesh)  # as far as can be told before the vocabulary is known
        placement.for_training(config, mesh)
        if primary:
            stack.enter_context(workdirs.locked(workdir))
            old = workdirs.begun(workdir)  # whoever held the run until now may have begun it, or gone on with it
            if old is not None:
                workdirs.check_continuation(old, config, workdir)
            stack.enter_context(workdirs.left_as_found(workdir))
        with watch.during("preparing"):
            data, config = run_data.prepare_together(config, workdir, progress, old)
        divisibility.check(config, mesh)

        # --- state: the newest checkpoint, else given weights, else random ones ------------------------------------
        log = RunLog(config, primary and progress, watch)
        checkpointer = stack.enter_context(
            checkpoints.Checkpointer(workdir, config, on_saved=log.saved, on_failed_save=log.save_failed)
        )
        target = states.abstract(config, mesh)
        with watch.during("restoring"):
            state = checkpointer.restore_newest(target, log.damaged)
        going_on = Continuation()
        resumed = state is not None
        if old is not None and state is not None:
            going_on = continuation.of(workdir, old, config, int(state.step), rewarm_steps)
        if state is None:
            state = states.create(config, mesh, initial_params(config, data, mesh) if initial_params else None)
        first_step, last_step = int(state.step), config.training.num_steps
        if first_step >= last_step:
            return Result(state, config, 0)
        if primary:
            if going_on.fresh and going_on.rewarm is not None:
                continuation.store(workdir, going_on.rewarm)
            workdirs.begin(workdir, config, data, resumed)

        # --- what the run writes -----------------------------------------------------------------------------------
        if primary and progress:
            print(configs.describe(config), file=sys.stderr)
            if mesh.size > 1:
                print(parameter_table(state.params), file=sys.stderr)
        log.open(stack, workdir if primary else None, first_step, int(state.skipped))
        changes = {"changes": going_on.changes} if going_on.changes else {}
        rows = [remote.spelled(str(source.folder.resolve())) for source in sources_of(data)]
        begun = {"began": watch.began, "data": data.digest, "rows": rows if len(rows) > 1 else rows[0], **changes}
        log.timed_event("resume" if resumed else "start", first_step, **begun)
        log.sync()
        if changes:
            log.tell(f"step {first_step}: {going_on.changes}")

        # --- steps -----------------------------------------------------------------------------------------------
        placed = placement.for_training(config, mesh)
        train_step = step.make_train_step(placed, going_on.rewarm)
        evaluate = Validation(placement.for_evaluation(config, mesh), data)
        recover = Recovery(placed, data, workdir, checkpointer, target, log)
        preemption = stack.enter_context(Preemption())
        wanted = config.training.profile
        profiler = stack.enter_context(Profiler(workdir if primary else None, wanted, watch, log.tell))
        done, stopped = first_step, False
        batches = stack.enter_context(run_data.global_batches(config, data, mesh, first_step))
        watch.now("waiting")
        for number, tokens_BN in batches:
            done = number + 1
            watch.now("compiling" if number == first_step else "training")
            log.before_step()
            profiler.before(done)
            with jax.profiler.StepTraceAnnotation("train", step_num=done):  # tells a trace its steps
                state, metrics = train_step(state, tokens_BN)
            profiler.after(done, metrics)
            watch.now("training")
            if log.read(done, metrics) > config.training.max_skipped:
                with watch.during("restoring"):
                    state = recover(state, done)
            if debug_nans and int(state.skipped):
                raise RunFailed(f"step {done}: {faults.pinpoint(placed, state, number, tokens_BN)}")
            if config.training.eval_every and (done % config.training.eval_every == 0 or done == last_step):
                log.flush()
                with watch.during("evaluating"):
                    log.evaluated(done, evaluate(state.eval_params))
            stopped = done < last_step and preemption.requested(done)
            log.save(checkpointer, state, done, force=stopped or done == last_step)
            checkpointer.poll()
            log.bar.update()
            log.beat(done)
            if stopped or done == last_step:
                break
            watch.now("waiting")
        log.flush()
        watch.now("saving")
        if not checkpointer.wait():
            kept = checkpointer.steps()
            left = f"the run can go on from step {kept[-1]}" if kept else "there is no earlier one to go on from"
            raise RunFailed(f"{workdir}: the checkpoint of step {done} could not be saved; {left}")
        log.end("stop" if stopped else "end", done)
    return Result(state, config, done - first_step, stopped)

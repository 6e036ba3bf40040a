"""`armd train`: train a model, or continue the run that is in the workdir."""

import argparse
from collections.abc import Sequence

from armd_jax import typed
from armd_jax.cli.arguments import add_config, failed, read_config, show, workdir
from armd_jax.config import Config
from armd_jax.errors import STOPPED, UserError
from armd_jax.names import Switch

HELP = "Train a model, or continue the run that is in the workdir."
IF_MEMORY_RUNS_OUT = (
    "lower training.batch_size or model.max_length, or raise training.microbatches, which cuts a batch into parts"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_config(parser)
    parser.set_defaults(result_is_printed=False)  # the result of a training is its folder, whoever reads the last line
    parser.add_argument("--workdir", required=True, type=workdir, help="folder of the run")
    parser.add_argument(
        "--debug-nans", action="store_true", help="stop at the operation that first gives NaN, and name it; slow"
    )
    parser.add_argument(
        "--rewarm",
        type=int,
        default=None,
        metavar="STEPS",
        help="if another training.num_steps would make the learning rate jump: let it rise over that many steps;"
        " 0: let it jump",
    )
    parser.add_argument(
        "--distributed",
        default="auto",
        choices=typed.choices(Switch),
        help="join the other processes of the job; auto: if the environment shows that there are any",
    )
    parser.add_argument(
        "--coordinator",
        default=None,
        metavar="HOST:PORT",
        help="address of process 0; needed only if neither a cluster manager nor TPU metadata tell it",
    )
    parser.add_argument("--num-processes", type=int, default=None, help="how many processes there are")
    parser.add_argument("--process-id", type=int, default=None, help="which of them this one is, from 0")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains, alone or as one process of several."""
    config = read_config(args, overrides)
    if args.rewarm is not None and args.rewarm < 0:
        raise UserError(f"--rewarm={args.rewarm}: must be at least 0")

    from armd_jax.training import host_memory

    host_memory.settle()  # before JAX is imported

    from armd_jax.training import distributed

    several = distributed.initialize(args.distributed, args.coordinator, args.num_processes, args.process_id)
    if several:
        return distributed.run_together(lambda: _train(args, config), IF_MEMORY_RUNS_OUT)
    return _train(args, config)


def _train(args: argparse.Namespace, config: Config) -> int:
    import jax

    from armd_jax.interop import fine_tuning
    from armd_jax.training import stopwatch, train
    from armd_jax.training import workdir as workdirs
    from armd_jax.training.faults import RunFailed

    start = fine_tuning.initial_params if config.training.init_from else None
    try:
        if start and workdirs.begun(args.workdir) is None:
            fine_tuning.check_source(config)
        result = train.train(
            config,
            args.workdir,
            start,
            debug_nans=args.debug_nans,
            rewarm_steps=args.rewarm,
            began=stopwatch.process_began(),
        )
    except RunFailed as error:
        return failed(str(error), 1)
    at = int(result.state.step)
    if result.stopped:
        text = f"stopped by a signal after step {at}, which is saved; the same command continues"
    elif not result.steps_done:
        text = f"all {config.training.num_steps} steps are done, nothing left to do"
    else:
        text = f"trained {result.steps_done} steps, now at {at}"
    if jax.process_index() == 0:
        done = {"workdir": str(args.workdir), "step": at, "steps_done": result.steps_done, "stopped": result.stopped}
        show(args, done, f"{args.workdir}: {text}")
    return STOPPED if result.stopped else 0

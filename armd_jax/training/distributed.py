"""Several processes, one training: joining them, and ending them together when one fails."""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from typing import NoReturn, assert_never

import jax

from armd_jax import remote
from armd_jax.errors import UserError, out_of_memory
from armd_jax.names import Switch

# With the runtime's own defaults, the others would wait for minutes after one process died without a word.
_HEARTBEAT_SECONDS = 20
_SHUTDOWN_SECONDS = 20
_JOIN_SECONDS = 300
_SILENT_SECONDS = 5  # a wait that takes longer is told
# What the environment says about other processes, for messages.
_SIGNS = (
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    *("TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS"),
)
_WITHOUT_OTHERS = "if there are no others, give --distributed=off; under SLURM, start every process with srun"


def several_expected(environment: Mapping[str, str]) -> bool:
    """Whether the environment shows one process of several: SLURM, Open MPI, a TPU pod, or a Kubernetes JobSet."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    in_job_set = "JOB_COMPLETION_INDEX" in environment and "JAX_COORDINATOR_ADDRESS" in environment
    several_tasks = "SLURM_PROCID" in environment and number("SLURM_NTASKS") > 1
    return several_tasks or number("OMPI_COMM_WORLD_SIZE") > 1 or len(hosts) > 1 or in_job_set


def initialize(
    mode: Switch = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> bool:
    """Joins the other processes of the job, before anything else touches JAX. Returns whether there are any.

    mode: `auto` joins if the environment shows several processes, `on` always joins (JAX then looks for TPU metadata,
        SLURM, Kubernetes or Open MPI by itself), and `off` never does.
    coordinator, num_processes, process_id: HOST:PORT of process 0, the number of processes, and which of them this one
        is; all three or none. They are needed if nothing in the environment tells them, and then decide by themselves.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id go together: give all three or none")
    if coordinator is not None and num_processes is not None and process_id is not None:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process-id={process_id}, --num-processes={num_processes}: process ids run from 0 to the number - 1"
            )
        if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={coordinator}: expected HOST:PORT")
        others = f"the {num_processes} processes that meet at {coordinator}, of which this is number {process_id}"
    elif not _joins(mode):
        return False
    else:
        signs = [f"{name}={os.environ[name]}" for name in _SIGNS if name in os.environ]
        others = f"the other processes that the environment shows ({', '.join(signs) or '--distributed=on'})"
    try:
        with _told_if_long(f"waiting for {others}; {_WITHOUT_OTHERS}"):
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=_JOIN_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
    except (ValueError, RuntimeError) as error:  # nothing tells how many there are, or the port is taken
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--distributed={mode}: no other processes were found ({reason}), but there should be {others};"
            f" {_WITHOUT_OTHERS}"
        ) from error
    return jax.process_count() > 1


@contextlib.contextmanager
def _told_if_long(text: str) -> Generator[None]:
    """Prints a line on stderr if the block takes longer than `_SILENT_SECONDS`."""
    timer = threading.Timer(_SILENT_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True  # it does not keep a process alive that is ended while it waits
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _joins(mode: Switch) -> bool:
    match mode:
        case "on":
            return True
        case "off":
            return False
        case "auto":
            return several_expected(os.environ)
        case _:
            assert_never(mode)


def run_together(run: Callable[[], int], if_memory_runs_out: str) -> int | NoReturn:
    """Runs one process's part of a job. If it fails, the process exits at once, so that the others notice and end too.

    An ordinary exit would wait for the others, which wait for this one in a collective operation.

    if_memory_runs_out: what to do then, for the message.
    """
    try:
        return run()
    except UserError as error:
        print(f"error: {' '.join(remote.spelled(str(error)).split())}", file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException as error:
        this, asked = f"process {jax.process_index()} of {jax.process_count()}", out_of_memory(error)
        if asked is None:
            print(f"{this} failed:", file=sys.stderr)
            traceback.print_exc()
        else:
            print(f"error: {this} is out of memory{asked}; {if_memory_runs_out}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

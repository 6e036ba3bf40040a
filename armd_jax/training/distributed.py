"""Several processes, one training: joining them, and ending them together when one fails."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax

from armd_jax.config import UserError

# The runtime's own defaults let the others wait for minutes when one process dies without a word.
_HEARTBEAT_SECONDS = 20
_SHUTDOWN_SECONDS = 20


def several_expected(environment: Mapping[str, str]) -> bool:
    """Whether the environment shows one process of several: SLURM, Open MPI, a TPU pod, a Kubernetes JobSet."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    in_job_set = "JOB_COMPLETION_INDEX" in environment and "JAX_COORDINATOR_ADDRESS" in environment
    several_tasks = "SLURM_PROCID" in environment and number("SLURM_NTASKS") > 1
    return several_tasks or number("OMPI_COMM_WORLD_SIZE") > 1 or len(hosts) > 1 or in_job_set


def initialize(
    mode: str = "auto", coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
    """Joins the other processes of the job, before anything else touches JAX; True where there are any.

    mode: `auto` joins where the arguments or the environment tell of several processes, `on` always (JAX then finds
    TPU metadata, SLURM, Kubernetes or Open MPI by itself), `off` never. The three others come together or not at all.
    """
    explicit = (coordinator, num_processes, process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError("--coordinator, --num-processes and --process-id go together: give all three or none")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process-id={process_id}, --num-processes={num_processes}: process ids run from 0 to the number - 1"
            )
        if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={coordinator}: expected HOST:PORT")
    elif mode == "off" or (mode == "auto" and not several_expected(os.environ)):
        return False
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=300,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--distributed={mode}: no other processes were found ({reason})") from error
    return jax.process_count() > 1


def run_together(run: Callable[[], int]) -> int | NoReturn:
    """Runs one process's part; where it fails, the process leaves at once, so that the others notice and end too.

    An ordinary exit would wait for the others, who wait for this one in a collective operation.
    """
    try:
        return run()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException:
        print(f"process {jax.process_index()} of {jax.process_count()} failed:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

"""What went wrong numerically: the first tensor of a step that is not finite, and the report about it."""

import dataclasses
import functools
import json
import pathlib
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from armd_jax import files
from armd_jax.core import objective
from armd_jax.core.parameters import Params
from armd_jax.training import sharding, step
from armd_jax.training.placement import Placement
from armd_jax.training.state import TrainState


class RunFailed(RuntimeError):
    """The run cannot go on by itself, although nobody's input was wrong: too many skipped updates, or a full disk."""


def first_non_finite(placement: Placement, state: TrainState, tokens_BN: jax.Array) -> dict[str, Any]:
    """Name and place of the first tensor of a step that is not finite, in the order of the computation.

    Looks at the parameters, the log-probabilities of the batch (with its rows and positions), and the gradients.
    `tensor` is "none" if the numbers of this step are finite: a spike, or a fault that did not happen again.
    """
    config, mesh = placement.config, placement.mesh

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def tensors(params: Params, tokens_BN: jax.Array) -> tuple[Any, jax.Array, Any, Any]:
        task = step.draw_task(config, state.step, tokens_BN.shape[1], tokens_BN)
        log_probs_BN, _ = objective.task_log_probs(params, config.model, tokens_BN, task, placement.context)
        nll_BN = objective.to_natural(task, log_probs_BN)
        grads, sums = step.gradients(params, placement, tokens_BN, task, state.step)
        whole = lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)  # noqa: E731
        return whole(params), jnp.isfinite(nll_BN), whole(sums.weighted_nll), whole(grads)

    params, nll_BN, loss, grads = jax.tree.map(np.asarray, jax.device_get(tensors(state.params, tokens_BN)))
    for kind, tree in (("parameter", params), ("nll", nll_BN), ("loss", loss), ("gradient", grads)):
        if kind == "nll":
            rows, positions = np.nonzero(~nll_BN)
            if len(rows):
                return {
                    "tensor": "nll",
                    "rows": sorted({int(row) for row in rows}),
                    "positions": sorted({int(position) for position in positions})[:32],
                }
            continue
        for path, finite in jax.tree_util.tree_leaves_with_path(tree):
            if not finite:
                return {"tensor": " ".join([kind, ".".join(key.key for key in path)]).strip()}
    return {"tensor": "none"}


def pinpoint(placement: Placement, state: TrainState, at: int, tokens_BN: jax.Array) -> str:
    """The operation, and the line of this package, where the numbers of batch `at` first turn into NaN.

    The gradient is computed once more, with every operation checked by itself.
    state: after the skipped update, so that its parameters are those from before it.
    """
    at_fault = dataclasses.replace(state, step=jnp.full_like(state.step, at))
    found = first_non_finite(placement, at_fault, tokens_BN)
    if jax.process_count() > 1:  # checking operations one by one would stop one process and leave the others waiting
        return str(found)
    task = step.draw_task(placement.config, at_fault.step, tokens_BN.shape[1], tokens_BN)
    try:
        with jax.debug_nans(True):
            jax.jit(lambda p: step.gradients(p, placement, tokens_BN, task, at_fault.step))(state.params)
    except FloatingPointError as error:
        frames = traceback.extract_tb(error.__traceback__)
        package = pathlib.Path(__file__).parent.parent
        ours = [frame for frame in frames if package in pathlib.Path(frame.filename).parents]
        line = ours[-1]
        return f"{error}, {pathlib.Path(line.filename).relative_to(package)}:{line.lineno} ({line.line}); {found}"
    return f"no operation gives NaN if it is computed by itself; {found}"


def write_report(workdir: pathlib.Path, at: int, report: dict[str, Any]) -> pathlib.Path:
    """Writes faults/step-<at>.json and returns its path."""
    path = workdir / "faults" / f"step-{at}.json"
    path.parent.mkdir(exist_ok=True)
    files.write(path, json.dumps(report, indent=2) + "\n")
    return path

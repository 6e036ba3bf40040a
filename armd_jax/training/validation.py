"""Evaluation during training: the exact left-to-right loss on the first batches of the validation split."""

import numpy as np

from armd_jax.core.parameters import Params
from armd_jax.data import loader
from armd_jax.data.packing import PreparedData
from armd_jax.training import sharding, step
from armd_jax.training.placement import Placement


class Validation:
    """Call it with parameters; it returns `eval/nll` (nats per token) and `eval/perplexity`, or nothing.

    There is nothing to return if the data have no validation split.
    """

    def __init__(self, placement: Placement, data: PreparedData) -> None:
        self._config, self._mesh, self._data = placement.config, placement.mesh, data
        self._step = step.make_eval_step(placement)

    def __call__(self, params: Params) -> dict[str, float]:
        if "valid" not in self._data.splits:
            return {}
        size, limit = self._config.training.batch_size, self._config.training.eval_batches or None
        here = sharding.rows_here(self._mesh, size)
        nll = tokens = 0.0
        for batch, valid in loader.eval_batches(self._data, "valid", size, limit):
            tokens_BN, valid_BN = (sharding.global_rows(self._mesh, size, here, a[here]) for a in (batch, valid))
            sums = self._step(params, tokens_BN, valid_BN)
            nll, tokens = nll + float(sums.nll), tokens + float(sums.tokens)
        return {"eval/nll": nll / tokens, "eval/perplexity": float(np.exp(nll / tokens))}

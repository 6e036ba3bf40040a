"""Evaluation during training: the exact loss, or the bound that the model has, on the first validation batches."""

import numpy as np

from armd_jax.core import task as tasks
from armd_jax.core.parameters import Params
from armd_jax.data import loader
from armd_jax.data.packing import PreparedData
from armd_jax.training import sharding, step
from armd_jax.training.placement import Placement


class Validation:
    """Call it with parameters; it returns `eval/nll` (nats per token) and `eval/perplexity`, or nothing.

    They are exact and left to right, unless the model has only a bound on the likelihood: then `eval/nll` is the
    negative ELBO, and `eval/nll_upper_bound` and `eval/perplexity_upper_bound` say so. There is nothing to return if
    the data have no validation split.
    """

    def __init__(self, placement: Placement, data: PreparedData) -> None:
        self._config, self._mesh, self._data = placement.config, placement.mesh, data
        self._bounds = tasks.of(placement.config).bounds
        self._step = step.make_eval_step(placement)

    def __call__(self, params: Params) -> dict[str, float]:
        if "valid" not in self._data.splits:
            return {}
        size, limit = self._config.training.batch_size, self._config.training.eval_batches or None
        here = sharding.rows_here(self._mesh, size)
        nll = tokens = 0.0
        for number, (batch, valid) in enumerate(loader.eval_batches(self._data, "valid", size, limit)):
            tokens_BN, valid_BN = (sharding.global_rows(self._mesh, size, here, a[here]) for a in (batch, valid))
            sums = self._step(params, tokens_BN, valid_BN, number)
            nll, tokens = nll + float(sums.nll), tokens + float(sums.tokens)
        per_token, perplexity = nll / tokens, float(np.exp(nll / tokens))
        if self._bounds:
            bounds = {"eval/nll_upper_bound": per_token, "eval/perplexity_upper_bound": perplexity}
            return {"eval/nll": per_token, **bounds}
        return {"eval/nll": per_token, "eval/perplexity": perplexity}

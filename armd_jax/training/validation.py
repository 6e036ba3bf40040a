"""Evaluation during training: the exact loss, or the bound that the model has, on the first validation batches."""

import numpy as np

from armd_jax.core import task as tasks
from armd_jax.core.parameters import Params
from armd_jax.data import loader
from armd_jax.data.mixture import Data, names_of, sources_of
from armd_jax.data.packing import PreparedData
from armd_jax.training import sharding, step
from armd_jax.training.placement import Placement


class Validation:
    """Call it with parameters; it returns `eval/nll` (nats per token) and `eval/perplexity`, or nothing.

    They are exact and left to right, unless the model has only a bound on the likelihood: then `eval/nll` is the
    negative ELBO, and `eval/nll_upper_bound` and `eval/perplexity_upper_bound` say so. There is nothing to return if
    the data have no validation split.

    Of a mixture, every source is scored, `eval/nll/NAME`, on an equal part of the batches, and `eval/nll` is their mean
    by the number of tokens that the validation split of each has: that of all these texts together.
    """

    def __init__(self, placement: Placement, data: Data) -> None:
        self._config, self._mesh, self._data = placement.config, placement.mesh, data
        self._bounds = tasks.of(placement.config).bounds
        self._step = step.make_eval_step(placement)

    def __call__(self, params: Params) -> dict[str, float]:
        named = zip(names_of(self._data), sources_of(self._data), strict=True)
        sources = {name: source for name, source in named if "valid" in source.splits}
        if not sources:
            return {}
        limit = -(-self._config.training.eval_batches // len(sources)) or None
        found = {name: self._per_token(params, source, limit) for name, source in sources.items()}
        total = sum(source.counts("valid").tokens for source in sources.values())
        per_token = sum(found[name] * (source.counts("valid").tokens / total) for name, source in sources.items())
        perplexity = float(np.exp(per_token))
        values = {"eval/nll": per_token}
        if self._bounds:
            values |= {"eval/nll_upper_bound": per_token, "eval/perplexity_upper_bound": perplexity}
        else:
            values["eval/perplexity"] = perplexity
        if len(sources_of(self._data)) > 1:
            values |= {f"eval/nll/{name}": nll for name, nll in found.items()}
        return values

    def _per_token(self, params: Params, source: PreparedData, limit: int | None) -> float:
        """Nats per token of the first `limit` batches of a source; None: of all."""
        size = self._config.training.batch_size
        here = sharding.rows_here(self._mesh, size)
        nll = tokens = 0.0
        for number, (batch, valid) in enumerate(loader.eval_batches(source, "valid", size, limit)):
            tokens_BN, valid_BN = (sharding.global_rows(self._mesh, size, here, a[here]) for a in (batch, valid))
            sums = self._step(params, tokens_BN, valid_BN, number)
            nll, tokens = nll + float(sums.nll), tokens + float(sums.tokens)
        return nll / tokens

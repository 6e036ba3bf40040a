"""The default mode of decoding: S streams at equal distances, one network call per block (paper section on SBP)."""

import jax
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.inference import sampler, schedule
from armd_jax.inference.decoding import Decoding, Request, Weights
from armd_jax.inference.generation import Generation, collect
from armd_jax.inference.sampler import SamplingState


class Strided(Decoding[SamplingState]):
    """Texts in S streams; see `inference.sampler`."""

    def __init__(self, weights: Weights, config: ModelConfig, request: Request) -> None:
        """Reads the evidence."""
        streams = request.streams
        self.in_order = streams == 1
        self._order, self._call_BN = schedule.order_of(request.known_BN, streams)
        plan = schedule.strided(request.known_BN, streams, config.max_length)
        rows = len(plan.first_B)
        state = sampler.start(weights.layers, config, plan, request.seed_B, request.stream_B)
        super().__init__(config, request, plan, weights.loop(2 * rows * streams, rows * streams), state)

    def _advance(self, until: int) -> SamplingState:
        return sampler.advance(
            self._params, self._config, self._plan, self._state, self._draw, self._ending, np.int32(until)
        )

    @property
    def finished(self) -> bool:
        """Whether every text is complete or has ended."""
        call, ended_B, free_B = jax.device_get((self._state.call, self._state.ended_B, self._plan.free_B))
        return not (~ended_B & (call < free_B)).any() or call >= self._plan.num_calls

    def _collect(self) -> Generation:
        calls = int(self._state.call)
        return collect(
            self._request.known_BN,
            self._gather(self._state.context_BT, self._plan.index_BW),
            self._gather(self._state.log_prob_BT, self._plan.index_BW),
            self._order,
            np.where(self._call_BN > calls, -1, self._call_BN),
            calls,
            self._request.ends,
            self.in_order,
            self._request.streams,
        )

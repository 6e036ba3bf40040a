"""A batch of texts in the making: a state on the device that network calls change, and what there is after each."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import jax
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core.parameters import Params
from armd_jax.inference import schedule
from armd_jax.inference.draw import Draw
from armd_jax.inference.generation import Ends, Generation
from armd_jax.inference.sampler import Ending
from armd_jax.inference.schedule import Schedule

# Network calls between two looks for stop strings, which the device does not know.
_BETWEEN_LOOKS = 16


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters of a model in the layouts that decoding wants.

    layers: `parameters.unstack`ed. loop: (rows of both streams, rows of G) of a call -> the layout for such calls.
    """

    layers: Params
    loop: Callable[[int, int], Params]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be written, and how; see `LanguageModel.generate`.

    known_BN: int, at natural positions, as `requests.known_rows` gives it. seed_B, stream_B: int32, what the random
    numbers of each row are made from.
    """

    known_BN: np.ndarray
    seed_B: np.ndarray
    stream_B: np.ndarray
    streams: int
    draw: Draw
    ends: Ends
    end_bias: float = 0.0
    max_entropy: float = 0.0


class State(Protocol):
    """What the state of every mode has: how many calls were made (int32 scalar), and which texts have ended (bool)."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def call(self) -> jax.Array: ...
    @property
    def ended_B(self) -> jax.Array: ...


S = TypeVar("S", bound=State)


class Decoding(abc.ABC, Generic[S]):
    """Texts that are written call by call; one subclass for each `names.DecodingMode`.

    in_order: whether the texts are written left to right, so that one that has ended needs no more calls.
    """

    in_order: bool

    def __init__(self, config: ModelConfig, request: Request, plan: Schedule, params: Params, state: S) -> None:
        """params: in the layout for the calls. state: after the evidence was read, before any token is drawn."""
        self._config, self._request, self._plan, self._params, self._state = config, request, plan, params, state
        self._draw = request.draw.for_rows(len(plan.first_B))
        self._ending = Ending.make(request.ends.token, request.end_bias)
        self._calls = 0

    @abc.abstractmethod
    def _advance(self, until: int) -> S:
        """The state after `until` calls in all, or when nothing is left to do; `self._state` may be used up."""

    @abc.abstractmethod
    def _collect(self) -> Generation:
        """What has been made so far."""

    @property
    @abc.abstractmethod
    def finished(self) -> bool:
        """Whether no call is left to make."""

    def advance(self, calls: int | None = None) -> Generation:
        """Makes so many more network calls, or all that are left, and returns what there is then."""
        last = 2**30 if calls is None else self._calls + calls
        looks = bool(self.in_order and self._request.ends.stop)
        while True:
            until = min(last, self._calls + _BETWEEN_LOOKS) if looks else last
            self._state = self._advance(until)
            made = self._collect()
            self._calls = made.num_calls
            if looks:
                stopped_B = made.end_B < schedule.lengths(self._request.known_BN)
                ended_B = np.asarray(self._state.ended_B).copy()
                ended_B[: len(stopped_B)] |= stopped_B
                self._state = dataclasses.replace(self._state, ended_B=jax.device_put(ended_B))
            if made.num_calls >= last or self.finished:
                return made

    def _gather(self, a_BT: jax.Array, index_BW: jax.Array) -> np.ndarray:
        """Values at context indices, moved to natural positions [B, N]; anything where there is no such position."""
        batch, length = self._request.known_BN.shape
        index_BN = np.minimum(np.asarray(index_BW)[:batch, :length], a_BT.shape[1] - 1)
        return np.take_along_axis(np.asarray(a_BT)[:batch], index_BN, axis=1)

"""Texts of many requests, written in batches: a bounded queue, and one thread that makes network calls.

A batch is put together from texts that wait and can share a compiled program (`Group`), and it keeps its texts until
each of them has ended or is wanted no more. Texts that come later form another batch. Up to _ACTIVE batches take turns,
call by call, so that a short text need not wait for the end of a long one.

After every call, each text gets a `Progress`. Nothing piles up if its reader is slow: a later one replaces an earlier.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from armd_jax.errors import UserError, out_of_memory
from armd_jax.inference.draw import GREEDY
from armd_jax.inference.generation import Generation
from armd_jax.inference.language_model import LanguageModel
from armd_jax.inference.schedule import FREE
from armd_jax.names import DecodingMode
from armd_jax.serving.metrics import Metrics

_LOG = logging.getLogger(__name__)
_ACTIVE = 2  # batches that take turns; each has a cache of its own on the device


@dataclasses.dataclass(frozen=True)
class Group:
    """What the texts of a batch have in common. nucleus: whether their top_p is below 1."""

    mode: DecodingMode
    streams: int
    greedy: bool
    nucleus: bool
    stop_at_end: bool


@dataclasses.dataclass(frozen=True)
class Asked:
    """A text to write. known: token ids, and FREE where to generate. For the rest see `LanguageModel.generate`."""

    known: tuple[int, ...]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    mode: DecodingMode = "strided"
    streams: int = 1
    stop_at_end: bool = True

    @property
    def group(self) -> Group:
        """With which texts it can share a batch."""
        return Group(self.mode, self.streams, self.temperature < GREEDY, self.top_p < 1, self.stop_at_end)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What there is of a text after a network call: one row of a generation.

    length: places of the text. finished: whether all tokens before its end are there.
    """

    made: Generation
    row: int
    length: int
    finished: bool

    @classmethod
    def of(cls, made: Generation, row: int, length: int) -> "Progress":
        """The row of a generation, whose text has so many places."""
        return cls(made, row, length, not (made.call_BN[row, : made.end_B[row]] < 0).any())

    @property
    def num_calls(self) -> int:
        """Network calls of its batch until now."""
        return self.made.num_calls

    @property
    def end(self) -> int:
        """Where the text ends, as far as that is known."""
        return int(self.made.end_B[self.row])

    @property
    def tokens_N(self) -> np.ndarray:
        """int32, at natural positions."""
        return self.made.tokens_BN[self.row, : self.length]

    @property
    def call_N(self) -> np.ndarray:
        """int32, the call that made each token, as `Generation.call_BN`."""
        return self.made.call_BN[self.row, : self.length]

    @property
    def log_prob_N(self) -> np.ndarray:
        """float32, nats."""
        assert self.made.log_prob_BN is not None  # only a denoiser has none
        return self.made.log_prob_BN[self.row, : self.length]


class QueueFull(Exception):
    """There is no room for more texts."""


class Closed(Exception):
    """The server is shutting down."""


class Text:
    """A text in the making. `progress` and `failure` are replaced by the thread that writes it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.progress: Progress | None = None
        self.failure: Exception | None = None
        self.unwanted = False  # nobody reads it any more, so that no call need be made for it
        self.arrived = time.perf_counter()

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.unwanted or self.failure is not None or (self.progress is not None and self.progress.finished)


class Ticket:
    """The texts of one request. `changed` is set in the event loop that made the ticket, whenever one has changed."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.texts = [Text(each) for each in asked]
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def tell(self) -> None:
        """Sets `changed`, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self.changed.set)


class _Batch:
    """Texts that are written together, and the calls that are left."""

    def __init__(self, members: Sequence[tuple[Text, Ticket]], steps: Iterator[Generation]) -> None:
        self.members, self.steps = list(members), steps
        self.tokens = self.calls = 0

    @property
    def over(self) -> bool:
        return all(text.over for text, _ in self.members)


class Batcher:
    """Takes tickets, and writes their texts in a thread of its own from `start` to `close`."""

    def __init__(self, lm: LanguageModel, max_batch: int, max_queue: int) -> None:
        """max_batch: texts per batch. max_queue: texts that may wait."""
        self._lm, self._max_batch, self.max_queue = lm, max_batch, max_queue
        self._waiting: collections.deque[tuple[Text, Ticket]] = collections.deque()
        self._active: list[_Batch] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="armd-batches", daemon=True)
        self.metrics = Metrics(self.num_waiting, self.num_active)

    def num_waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    def num_active(self) -> int:
        """Texts that are being written."""
        return sum(not text.over for batch in list(self._active) for text, _ in batch.members)

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def close(self) -> None:
        """Fails all texts that are not finished. The thread ends after the network call that it is in."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self) -> None:
        """Waits for the end of the thread."""
        self._thread.join()

    def submit(self, ticket: Ticket) -> None:
        """Puts the texts of a ticket into the queue, all or none of them. Raises QueueFull or Closed."""
        with self._changed:
            if self._closing:
                raise Closed
            if len(self._waiting) + len(ticket.texts) > self.max_queue:
                raise QueueFull
            self._waiting.extend((text, ticket) for text in ticket.texts)
            self._changed.notify()

    def drop(self, ticket: Ticket) -> None:
        """Nobody reads the texts of this ticket any more: they leave the queue, and their batches end with the others.

        May be called for texts that have ended.
        """
        with self._changed:
            for text in ticket.texts:
                text.unwanted = True
            if any(other is ticket for _, other in self._waiting):
                self._waiting = collections.deque(one for one in self._waiting if one[1] is not ticket)

    def program(self, rows: int) -> int:
        """With how many rows a batch of so many texts is computed: 1 or max_batch, so that few programs are needed."""
        return 1 if rows == 1 else self._max_batch

    def steps(self, texts: Sequence[Asked]) -> Iterator[Generation]:
        """The calls of texts of one group. The first ones are repeated, if that fills up the rows of the program."""
        group = texts[0].group
        rows = [*texts, *[texts[0]] * (self.program(len(texts)) - len(texts))]
        return self._lm.generate_stream(
            evidence_BN=[each.known for each in rows],
            seed=[each.seed for each in rows],
            temperature=[each.temperature for each in rows],
            top_p=[each.top_p for each in rows] if group.nucleus else None,
            mode=group.mode,
            streams=group.streams,
            stop_at_end=group.stop_at_end,
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._active):
                    self._changed.wait()
                if self._closing:
                    break
                taken = self._take() if len(self._active) < _ACTIVE else []
            if taken and (batch := self._begin(taken)):
                self._active.append(batch)
            for batch in self._active:
                self._step(batch)
            self._active = [batch for batch in self._active if not batch.over]
        left = [*self._waiting, *(member for batch in self._active for member in batch.members)]
        self._waiting.clear()
        self._active.clear()
        self._fail(left, Closed())

    def _take(self) -> list[tuple[Text, Ticket]]:
        """The text that has waited longest, and those of its group, in the order of their arrival."""
        if not self._waiting:
            return []
        group = self._waiting[0][0].asked.group
        taken = [one for one in self._waiting if one[0].asked.group == group][: self._max_batch]
        chosen = {id(text) for text, _ in taken}
        self._waiting = collections.deque(one for one in self._waiting if id(one[0]) not in chosen)
        return taken

    def _begin(self, members: list[tuple[Text, Ticket]]) -> _Batch | None:
        self.metrics.batch_rows.observe(len(members))
        given = sum(len(text.asked.known) - text.asked.known.count(FREE) for text, _ in members)
        self.metrics.tokens.labels("prompt").inc(given)
        try:
            return _Batch(members, self.steps([text.asked for text, _ in members]))
        except Exception as error:  # whatever it is, the server goes on and the requests are told
            self._fail(members, error)
            return None

    def _step(self, batch: _Batch) -> None:
        """Makes one call, and tells everybody."""
        if batch.over:
            return
        try:
            made = next(batch.steps)
        except Exception as error:
            self._fail(batch.members, error)
            return
        tokens = int((made.call_BN[: len(batch.members)] > 0).sum())
        self.metrics.tokens.labels("generated").inc(tokens - batch.tokens)
        self.metrics.calls.inc(made.num_calls - batch.calls)
        batch.tokens, batch.calls = tokens, made.num_calls
        now, tickets = time.perf_counter(), {}
        for row, (text, ticket) in enumerate(batch.members):
            if not text.over:
                if text.progress is None:
                    self.metrics.first_token_seconds.observe(now - text.arrived)
                text.progress = Progress.of(made, row, len(text.asked.known))
                tickets[id(ticket)] = ticket
        for ticket in tickets.values():
            ticket.tell()

    def _fail(self, members: Sequence[tuple[Text, Ticket]], error: Exception) -> None:
        if not isinstance(error, Closed | UserError) and out_of_memory(error) is None:
            _LOG.error("a batch failed", exc_info=error)
        for text, ticket in members:
            if not text.over:
                text.failure = error
                ticket.tell()

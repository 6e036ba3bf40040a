"""What a run tells while it goes on: the progress bar, metrics.jsonl, events.jsonl, lines on stderr."""

import contextlib
import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from armd_jax import remote
from armd_jax.config import Config
from armd_jax.core import flops
from armd_jax.core.parameters import Params
from armd_jax.training import step
from armd_jax.training.checkpoints import Checkpointer
from armd_jax.training.metrics import Event, MetricWriter
from armd_jax.training.state import TrainState
from armd_jax.training.stopwatch import Stopwatch
from armd_jax.training.stragglers import Stragglers

# What a row of metrics.jsonl says of speed: in two runs that are otherwise equal to the last bit, it differs.
SPEED = (
    "train/tokens_per_second",
    "train/mfu",
    "train/ar_mfu",
    "train/data_wait",
    "train/host_wait",
    "train/slowest_process",
    "train/behind",
)
# How often `spent` is written: after this part of the life of the process, but with at least and at most so many
# seconds between two of them. Whoever kills the process takes no more with it.
_PART, _SHORTEST, _LONGEST = 0.01, 0.5, 60.0


@dataclasses.dataclass(frozen=True)
class _Moment:
    """When a row was made: the step and the time, in seconds as all that follows.

    For how long there had been no batch, no work for the device, and for how long the host did not wait for the device.
    """

    step: int
    time: float
    without_batch: float
    without_work: float
    on_host: float


class RunLog:
    """What the run tells: the progress bar, metrics.jsonl, events.jsonl.

    Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host.
    """

    bar: "tqdm[Any]"

    def __init__(self, config: Config, progress: bool, watch: Stopwatch) -> None:
        self._config, self._progress, self._watch = config, progress, watch
        self._every, self._last = config.training.log_every, config.training.num_steps
        self._tokens = config.training.batch_size * config.model.max_length
        self._writer: MetricWriter | None = None
        self._pending: tuple[int, step.Metrics] | None = None
        self._skipped = 0  # updates skipped in a row, as of the last step that was read
        self._last_row: _Moment | None = None
        # When the device last had work for certain, and how long there had been no batch by then; None before step 1.
        self._busy: tuple[float, float] | None = None
        self._without_work = 0.0
        self._host_since: float | None = None  # since when the host has waited for no device, as far as not counted yet
        self._on_host = 0.0
        self._stragglers = Stragglers()
        self._next_spent = 0.0
        self._done, self._ended = 0, False
        self._shown: dict[str, str] = {}
        self._early: list[tuple[Event, int, dict[str, Any]]] = []  # events from before the writer could be opened

    def open(self, stack: contextlib.ExitStack, workdir: pathlib.Path | None, first_step: int, skipped: int) -> None:
        """Opens the files in `workdir` (None: this process writes none) and the bar. The stack closes them."""
        self._skipped, self._done = skipped, first_step
        if workdir is not None:
            self._writer = MetricWriter(workdir, self._config, first_step, self.tell)
            stack.callback(self._writer.close)
            stack.callback(self._spent_at_the_end)
        for name, at, details in self._early:
            self.event(name, at, **details)
        self.bar = stack.enter_context(
            tqdm(
                total=self._last,
                initial=first_step,
                unit="step",
                disable=not self._progress,
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10.0,
            )
        )

    def event(self, name: Event, at: int, **details: Any) -> None:
        if self._writer:
            self._writer.event(name, at, **details)

    def timed_event(self, name: Event, at: int, **details: Any) -> None:
        """An event with the time, and with the seconds of every activity of this process up to it."""
        seconds = {activity: round(value, 3) for activity, value in self._watch.seconds().items()}
        self.event(name, at, time=time.time(), **details, seconds=seconds)
        self._done = at
        elapsed = sum(seconds.values())
        self._next_spent = elapsed + min(max(_PART * elapsed, _SHORTEST), _LONGEST)

    def beat(self, done: int) -> None:
        """To be called after every step: now and then, notes what the time was spent on."""
        self._done = done
        if self._writer and self._watch.elapsed() >= self._next_spent:
            self.timed_event("spent", done)

    def end(self, name: Event, at: int) -> None:
        """Notes the end of the process's training."""
        self.timed_event(name, at)
        self._ended = True

    def _spent_at_the_end(self) -> None:
        """If an error ends the run, notes what the time was spent on until then."""
        if not self._ended:
            self.timed_event("spent", self._done)

    def tell(self, text: str) -> None:
        """A line on stderr that leaves the bar whole."""
        if jax.process_index() == 0:
            tqdm.write(remote.spelled(text), file=sys.stderr)

    def damaged(self, at: int, reason: str) -> None:
        self.tell(f"checkpoint {at} is damaged and was skipped: {reason}")
        if self._writer:
            self.event("skip", at, reason=reason)
        else:
            self._early.append(("skip", at, {"reason": reason}))

    def saved(self, at: int) -> None:
        """To be called when a checkpoint is on disk."""
        self.event("save", at)

    def save_failed(self, at: int, reason: str) -> None:
        self.tell(f"the checkpoint of step {at} could not be saved ({reason}); training goes on")
        self.event("save_failed", at, reason=reason)

    def save(self, checkpointer: Checkpointer, state: TrainState, done: int, force: bool) -> None:
        if not (force or done % self._config.training.checkpoint_every == 0):
            return
        self.flush()
        if self._skipped and not force:  # a rollback needs the checkpoint from before, and these would push it out
            return
        self.timed_event("spent", done)  # a run that goes on from this checkpoint has lost what follows
        with self._watch.during("saving"):
            self.sync()
            checkpointer.save(state, done, force)

    def sync(self) -> None:
        """Puts all that was written on disk, or into the bucket of the run."""
        if self._writer:
            self._writer.sync()

    def before_step(self) -> None:
        """To be called before a step is dispatched. Finds out, without waiting, whether the device ran out of work."""
        self._count_host()
        if self._busy is None:
            return
        newest: Any = self._pending[1]["train/skipped"] if self._pending is not None else None
        now, waited = time.perf_counter(), self._without_batch()
        if newest is None or newest.is_ready():  # JAX's types do not know `is_ready`
            since, waited_then = self._busy
            self._without_work += max(now - since - (waited - waited_then), 0.0)
        self._busy = (now, waited)

    def _count_host(self) -> None:
        now = time.perf_counter()
        self._on_host += 0.0 if self._host_since is None else now - self._host_since
        self._host_since = now

    def _without_batch(self) -> float:
        return self._watch.seconds().get("waiting", 0.0)

    def read(self, done: int, metrics: step.Metrics) -> int:
        """Takes a step's metrics. Returns how many updates in a row had been skipped as of the step before it."""
        self._host_since = time.perf_counter()  # a CPU computes the step while it is dispatched
        self.flush()
        self._pending = (done, metrics)
        return self._skipped

    def restored(self) -> None:
        """Notes the step that a rollback replaces, and forgets the skipped updates."""
        self.flush()
        self._skipped = 0

    def flush(self) -> None:
        """Reads the metrics of the pending step, if there is one, and writes its row if one is due."""
        if self._pending is None:
            return
        (done, metrics), self._pending = self._pending, None
        self._count_host()
        self._skipped = int(metrics["train/skipped"])  # waits until the device is done with that step
        self._host_since = time.perf_counter()
        self._busy = (self._host_since, self._without_batch())
        due = done % self._every == 0 or done in (1, self._last)
        if not (due or self._skipped):
            return
        values = {name: float(value) for name, value in metrics.items()}
        if self._skipped:
            self.event("skip_update", done, in_a_row=self._skipped)
            self.tell(
                f"step {done}: the update was skipped (loss {values['train/loss']}, gradient norm"
                f" {values['train/grad_norm']}), {self._skipped} in a row"
            )
        if not due:
            return
        now, last = self._moment(done), self._last_row
        if last is not None and done > last.step:  # no rate from the first row: it includes compilation
            seconds = now.time - last.time
            rate = (done - last.step) * self._tokens / seconds
            values["train/tokens_per_second"] = rate
            values["train/data_wait"] = (now.without_batch - last.without_batch) / seconds
            values["train/host_wait"] = (now.without_work - last.without_work) / seconds
            steps = done - last.step
            values |= self._stragglers.note((now.on_host - last.on_host) / steps, seconds / steps)
            self._shown["tokens/s"] = f"{rate:,.0f}"
            utilization = flops.utilization(self._config.model, rate, jax.devices()[0].device_kind, jax.device_count())
            if utilization is not None:
                values |= {"train/mfu": utilization.model, "train/ar_mfu": utilization.autoregressive}
                self._shown |= {"mfu": f"{utilization.model:.0%}", "ar_mfu": f"{utilization.autoregressive:.0%}"}
        self._last_row = now
        self._shown["loss"] = f"{values['train/loss']:.4f}"
        self.bar.set_postfix(self._shown, refresh=False)
        if self._writer:
            self._writer.write(done, values)

    def _moment(self, done: int) -> _Moment:
        return _Moment(done, time.perf_counter(), self._without_batch(), self._without_work, self._on_host)

    def evaluated(self, done: int, values: dict[str, float]) -> None:
        self._last_row = self._moment(done)  # evaluation does not count into the training rate
        self._host_since = self._last_row.time
        self._busy = (self._last_row.time, self._last_row.without_batch)
        if values:
            self._shown["eval"] = f"{values['eval/nll']:.4f}"
            self.bar.set_postfix(self._shown, refresh=False)
            if self._writer:
                self._writer.write(done, values)


def parameter_table(params: Params) -> str:
    """A table of where the parameters lie: name, shape, mesh axes, bytes per device."""
    lines = [f"{'parameter':<34} {'shape':<22} {'axes':<28} bytes/device"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(key.key for key in path)
        local = leaf.sharding.shard_shape(leaf.shape)
        size = int(np.prod(local)) * leaf.dtype.itemsize
        lines.append(f"{name:<34} {leaf.shape!s:<22} {tuple(leaf.sharding.spec)!s:<28} {size:,}")
    return "\n".join(lines)

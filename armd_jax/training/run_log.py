"""What a run tells while it goes on: the progress bar, metrics.jsonl, events.jsonl, lines on stderr."""

import contextlib
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


class RunLog:
    """What the run tells: the progress bar, metrics.jsonl, events.jsonl.

    Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host.
    """

    bar: "tqdm[Any]"

    def __init__(self, config: Config, progress: bool) -> None:
        self._config, self._progress = config, progress
        self._every, self._last = config.training.log_every, config.training.num_steps
        self._tokens = config.training.batch_size * config.model.max_length
        self._writer: MetricWriter | None = None
        self._pending: tuple[int, step.Metrics] | None = None
        self._skipped = 0  # updates skipped in a row, as of the last step that was read
        self._clock: tuple[int, float] | None = None
        self._shown: dict[str, str] = {}
        self._early: list[tuple[Event, int, dict[str, Any]]] = []  # events from before the writer could be opened

    def open(self, stack: contextlib.ExitStack, workdir: pathlib.Path | None, first_step: int, skipped: int) -> None:
        """Opens the files in `workdir` (None: this process writes none) and the bar. The stack closes them."""
        self._skipped = skipped
        if workdir is not None:
            self._writer = MetricWriter(workdir, self._config, first_step, self.tell)
            stack.callback(self._writer.close)
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
        self.sync()
        checkpointer.save(state, done, force)

    def sync(self) -> None:
        """Puts all that was written on disk, or into the bucket of the run."""
        if self._writer:
            self._writer.sync()

    def read(self, done: int, metrics: step.Metrics) -> int:
        """Takes a step's metrics. Returns how many updates in a row had been skipped as of the step before it."""
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
        self._skipped = int(metrics["train/skipped"])  # waits until the device is done with that step
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
        now = time.perf_counter()
        if self._clock is not None and done > self._clock[0]:  # no rate from the first row: it includes compilation
            rate = (done - self._clock[0]) * self._tokens / (now - self._clock[1])
            values["train/tokens_per_second"] = rate
            self._shown["tokens/s"] = f"{rate:,.0f}"
            utilization = flops.utilization(self._config.model, rate, jax.devices()[0].device_kind, jax.device_count())
            if utilization is not None:
                values |= {"train/mfu": utilization.model, "train/ar_mfu": utilization.autoregressive}
                self._shown |= {"mfu": f"{utilization.model:.0%}", "ar_mfu": f"{utilization.autoregressive:.0%}"}
        self._clock = (done, now)
        self._shown["loss"] = f"{values['train/loss']:.4f}"
        self.bar.set_postfix(self._shown, refresh=False)
        if self._writer:
            self._writer.write(done, values)

    def evaluated(self, done: int, values: dict[str, float]) -> None:
        self._clock = (done, time.perf_counter())  # evaluation does not count into the training rate
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

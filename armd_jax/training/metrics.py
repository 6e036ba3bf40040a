"""What a run writes down: metrics.jsonl and events.jsonl always, TensorBoard and W&B if installed and wanted."""

import contextlib
import os
import pathlib
import secrets
import threading
from collections.abc import Callable
from typing import Any, Literal

from armd_jax import files, typed
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.training import lease

Event = Literal["start", "resume", "save", "save_failed", "skip", "skip_update", "rollback", "spent", "stop", "end"]
Tell = Callable[[str], None]  # says one line to whoever watches the run

# Rows that wait for TensorBoard's thread. It waits for nobody to notice that it died: with a short queue, the next row
# would then wait for ever.
_TENSORBOARD_QUEUE = 1000
_TENSORBOARD_CLOSES = 20.0  # seconds after which its last rows are given up


class _Rows:
    """A .jsonl file. A row that cannot be written, on a full disk for example, waits and is tried again with the next.

    A run that could go on must not end because nothing can be written about it.
    """

    def __init__(self, path: pathlib.Path, tell: Tell) -> None:
        self._path, self._tell = path, tell
        self._waiting: list[str] = []
        self._failing = False

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(typed.to_json(row) + "\n")
        self.write()

    def write(self, to_disk: bool = False) -> bool:
        """Writes the rows that wait. Returns whether all are written.

        to_disk: only returns when the disk has them, and not just the operating system.
        """
        try:
            if self._waiting:
                files.append(self._path, "".join(self._waiting))
                self._waiting = []
            if to_disk and self._path.exists():
                with open(self._path, "rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._failing:
                self._tell(f"{self._path}: cannot be written ({error.strerror or error}); its rows wait until it can")
            self._failing = True
            return False
        if self._failing:
            self._tell(f"{self._path}: can be written again, and no row is missing")
        self._failing = False
        return True

    def close(self) -> None:
        if not self.write():
            self._tell(f"{self._path}: its last {len(self._waiting)} rows could not be written")


class MetricWriter:
    """Writes rows as they come. Open it after a restore: rows after `step` belong to lost work and are removed."""

    def __init__(self, workdir: pathlib.Path, config: Config, step: int, tell: Tell) -> None:
        self._tell = tell
        self._lease = lease.of(workdir)
        files.keep_first_rows(workdir / "metrics.jsonl", lambda row: row["step"] <= step)
        self._metrics, self._events = (_Rows(workdir / name, tell) for name in ("metrics.jsonl", "events.jsonl"))
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.training.tensorboard:
            try:
                from tensorboardX import SummaryWriter

                self._tensorboard = SummaryWriter(
                    str(workdir / "tensorboard"), purge_step=step + 1, max_queue=_TENSORBOARD_QUEUE
                )
            except ImportError:
                pass
            except OSError as error:
                tell(f"TensorBoard's files cannot be written ({error.strerror or error}); training goes on without")
        if config.training.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise UserError("training.wandb_project needs the extra: pip install -e '.[wandb]'") from error
            name = workdir / "wandb-run-id"  # every life of the run continues the same W&B run
            if not name.exists():
                files.write(name, secrets.token_hex(4))
            project = config.training.wandb_project
            self._wandb = wandb.init(project=project, dir=str(workdir), id=name.read_text(), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row of scalars at a step."""
        self._metrics.add({"step": step, **values})
        if self._tensorboard_lives():
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _tensorboard_lives(self) -> bool:
        """Whether TensorBoard's thread still takes rows. It ends at the first that it cannot write."""
        if self._tensorboard is None:
            return False
        worker = getattr(self._tensorboard.file_writer.event_writer, "_worker", None)
        if worker is not None and not worker.is_alive():
            self._tell("TensorBoard's files could not be written; training goes on without")
            self._tensorboard = None  # not closed, because closing would wait for the thread
        return self._tensorboard is not None

    def _close_tensorboard(self) -> None:
        with contextlib.suppress(OSError):
            self._tensorboard.close()

    def event(self, name: Event, step: int, **details: Any) -> None:
        """Appends a row to events.jsonl."""
        self._events.add({"event": name, "step": step, **details})

    def sync(self) -> None:
        """Puts the rows on disk, so that no checkpoint is newer than the metrics from before it, if the disk allows."""
        self._metrics.write(to_disk=True)
        self._store()

    def _store(self) -> None:
        if self._lease is not None:
            try:
                self._lease.store()
            except UserError as error:
                if self._lease.lost:
                    raise
                self._tell(f"{error}; what is written about the run waits until it can be stored")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        if self._tensorboard_lives():
            closing = threading.Thread(target=self._close_tensorboard, daemon=True)
            closing.start()
            closing.join(_TENSORBOARD_CLOSES)  # on a full disk it might never end
        if self._wandb is not None:
            self._wandb.finish()

"""What a run writes down: metrics.jsonl and events.jsonl always, TensorBoard and W&B if installed and wanted."""

import json
import os
import pathlib
import secrets
from typing import Any, Literal

from armd_jax import files, typed
from armd_jax.config import Config
from armd_jax.errors import UserError

Event = Literal["start", "resume", "save", "save_failed", "skip", "skip_update", "rollback", "stop", "end"]


class MetricWriter:
    """Writes rows as they come. Open it after a restore: rows after `step` belong to lost work and are removed."""

    def __init__(self, workdir: pathlib.Path, config: Config, step: int) -> None:
        self._path, self._events_path = workdir / "metrics.jsonl", workdir / "events.jsonl"
        files.drop_partial_line(self._events_path)
        kept = [row for row in files.read_json_lines(self._path) if row["step"] <= step]
        files.write(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.training.tensorboard:
            try:
                from tensorboardX import SummaryWriter

                self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
            except ImportError:
                pass
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
        self._file.write(typed.to_json({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def event(self, name: Event, step: int, **details: Any) -> None:
        """Appends a row to events.jsonl."""
        files.append_json_line(self._events_path, {"event": name, "step": step, **details})

    def sync(self) -> None:
        """Puts the rows on disk, so that no checkpoint is ever newer than the metrics from before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

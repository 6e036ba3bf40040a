"""What a run writes down: metrics.jsonl and events.jsonl always, TensorBoard and W&B where installed and wanted."""

import json
import math
import os
import pathlib
import secrets
import tempfile
from typing import Any

from armd_jax.config import Config, UserError


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; these are for everyone who may read the run
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """The same tree of dicts, lists and numbers with None for what is not finite: JSON has no other word for it."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _end_with_a_whole_line(path: pathlib.Path) -> None:
    """Takes a last line that a kill cut short out of a .jsonl file."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])


class MetricWriter:
    """Writes rows as they come. Open it after a restore: rows after `step` belong to work that was lost and go."""

    def __init__(self, workdir: pathlib.Path, config: Config, step: int) -> None:
        self._path = workdir / "metrics.jsonl"
        _end_with_a_whole_line(workdir / "events.jsonl")
        self._events_path = workdir / "events.jsonl"
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._tensorboard = self._wandb = None
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
            name = workdir / "wandb-run-id"  # the same W&B run in every life
            if not name.exists():
                write_atomically(name, secrets.token_hex(4))
            project = config.training.wandb_project
            self._wandb = wandb.init(project=project, dir=str(workdir), id=name.read_text(), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row of scalars at a step."""
        self._file.write(json.dumps({"step": step, **finite(values)}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def event(self, name: str, step: int, **details: Any) -> None:
        """A row in events.jsonl: start, resume, save, save_failed, skip, skip_update, rollback, stop, end."""
        with open(self._events_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": name, "step": step, **details}) + "\n")

    def sync(self) -> None:
        """Puts the rows on disk, so that no checkpoint is ever newer than the metrics that led to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

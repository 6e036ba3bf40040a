"""What a run writes down: every row, in order, whatever the disk does in between."""

import dataclasses
import errno
import json
import os
import pathlib

import pytest

from armd_jax.config import Config
from armd_jax.training.metrics import MetricWriter

CONFIG = dataclasses.replace(Config(), training=dataclasses.replace(Config().training, tensorboard=False))


def _steps(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_wait_for_space(tmp_path, full_disk):
    """While the disk is full rows wait, which is told once. Then they are written in order, and that is told too."""
    told = []
    writer = MetricWriter(tmp_path, CONFIG, 0, told.append)
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    writer.write(1, {"train/loss": 1.0})
    writer.event("start", 0)
    with full_disk(metrics.stat().st_size + 7):
        for step in (2, 3):
            writer.write(step, {"train/loss": 1.0})
            writer.event("skip_update", step, reason="x" * 100)
        writer.sync()
        assert _steps(metrics) == [1] and _steps(events) == [0]
    reason = os.strerror(errno.EFBIG)
    assert told == [f"{path}: cannot be written ({reason}); its rows wait until it can" for path in (metrics, events)]
    writer.write(4, {"train/loss": 1.0})
    assert _steps(metrics) == [1, 2, 3, 4] and _steps(events) == [0]
    writer.close()
    assert _steps(events) == [0, 2, 3]
    assert [line.partition(": ")[2] for line in told[2:]] == ["can be written again, and no row is missing"] * 2


def test_what_was_never_written_is_counted_at_the_end(tmp_path, full_disk):
    told = []
    writer = MetricWriter(tmp_path, CONFIG, 0, told.append)
    with full_disk(0):
        writer.write(1, {})
        writer.write(2, {})
        writer.close()
    assert told[-1] == f"{tmp_path / 'metrics.jsonl'}: its last 2 rows could not be written"


def test_a_run_is_taken_up_on_a_full_disk(tmp_path, full_disk):
    """Rows of lost work are cut off, and what is left of a row that was cut short, without any space."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    (tmp_path / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"eve')
    with full_disk(0):
        MetricWriter(tmp_path, CONFIG, 2, lambda text: None).event("resume", 2)
        assert _steps(tmp_path / "metrics.jsonl") == [1, 2] and _steps(tmp_path / "events.jsonl") == [0]
    writer = MetricWriter(tmp_path, CONFIG, 2, lambda text: None)
    writer.event("resume", 2)
    assert _steps(tmp_path / "events.jsonl") == [0, 2]


def test_tensorboard_on_a_full_disk_stops_nobody(tmp_path, full_disk):
    """Its thread dies at the first row that it cannot write. Nobody waits for it, and the other rows are written."""
    pytest.importorskip("tensorboardX")
    told = []
    writer = MetricWriter(tmp_path, Config(), 0, told.append)
    writer.write(1, {"train/loss": 1.0})
    values = {f"train/{number}": 1.0 for number in range(30)}
    with full_disk(0):
        for step in range(2, 60):
            writer.write(step, values)
    writer.write(60, values)
    writer.close()
    assert _steps(tmp_path / "metrics.jsonl") == list(range(1, 61))
    assert sum("TensorBoard" in line for line in told) <= 1

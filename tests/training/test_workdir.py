"""The workdir: one training at a time, no stale locks, and which fields may change."""

import dataclasses
import signal
import subprocess
import sys

import pytest

from armd_jax.cli import main as cli
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.training import workdir as workdirs

_HOLD = "import pathlib, sys, time; from armd_jax.training import workdir\n"
_HOLD += "with workdir.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_second_training_is_refused(tmp_path, capsys, corpus, smoke_config):
    """While a process holds the workdir another is refused, with its number; its death frees it."""
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (run / "data").mkdir()  # what the first one is preparing
        (run / "data" / "rows").write_text("rows")
        command = ["train", f"--config={smoke_config}", f"--config.data.path={corpus}", f"--workdir={run}"]
        assert cli.main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and f"process {holder.pid}" in error
        assert sorted(path.name for path in run.rglob("*")) == [".lock", "data", "rows"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (run / ".lock").exists()  # left by the dead process
    with workdirs.locked(run), pytest.raises(UserError, match="a training is running in it"), workdirs.locked(run):
        pass
    assert [path.name for path in run.iterdir()] == ["data"]


def test_every_field_is_decided():
    """A field that may change can be changed; any other is refused by its name."""
    config = Config()
    for section in dataclasses.fields(Config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            other = f"{value}x" if isinstance(value, str) else (7,) if isinstance(value, tuple) else not value
            changed = dataclasses.replace(config, **{section.name: dataclasses.replace(values, **{field.name: other})})
            if field.metadata.get("may_change"):
                workdirs.check_continuation(config, changed, "run")
            elif (section.name, field.name) != ("model", "vocab_size"):  # 0 there means: as the data have it
                with pytest.raises(UserError, match=f"{section.name}.{field.name} was"):
                    workdirs.check_continuation(config, changed, "run")

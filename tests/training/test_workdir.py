"""The workdir: one training at a time, no stale locks, and which fields may change."""

import dataclasses
import signal
import subprocess
import sys

import pytest

from armd_jax import config as configs
from armd_jax import files
from armd_jax.cli import main as cli
from armd_jax.config import Config
from armd_jax.data import packing, tokenizers
from armd_jax.data_config import DataConfig
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
    """A field that may change can be changed; any other is refused by its name, or its content is compared."""
    config = Config()
    for section in dataclasses.fields(Config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            other = f"{value}x" if isinstance(value, str) else (7,) if isinstance(value, tuple) else not value
            changed = dataclasses.replace(config, **{section.name: dataclasses.replace(values, **{field.name: other})})
            if field.metadata.get("may_change"):
                workdirs.check_continuation(config, changed, "run")
                assert not workdirs.data_changes(config, changed)
            elif section.name == "data" and field.name != "reset":  # what it names is compared, see test_run_data.py
                workdirs.check_continuation(config, changed, "run")
                assert workdirs.data_changes(config, changed).startswith(f"data.{field.name} was")
            elif (section.name, field.name) != ("model", "vocab_size"):  # 0 there means: as the data have it
                with pytest.raises(UserError, match=f"{section.name}.{field.name} was"):
                    workdirs.check_continuation(config, changed, "run")


def test_nothing_saved_is_nothing_to_go_on_with(tmp_path):
    """A workdir whose run has no checkpoint is open to any config, unless its config.json is not that of a run."""
    assert workdirs.begun(tmp_path / "missing") is None and workdirs.begun(tmp_path) is None
    config = Config()
    (tmp_path / "config.json").write_text(configs.to_json(config))
    assert workdirs.begun(tmp_path) is None
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)  # of a save that was cut off
    assert workdirs.begun(tmp_path) is None
    (tmp_path / "checkpoints" / "10").mkdir()
    assert workdirs.begun(tmp_path) == config
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="holds an export, not a run; .* another folder and training.init_from="):
        workdirs.begun(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        workdirs.begun(tmp_path)


def test_a_run_begun_again_has_its_own_tokenizer(tmp_path, corpus):
    """The files of another tokenizer, of an attempt that saved nothing, do not stay beside it."""
    other = DataConfig(path=str(corpus), vocab_size=300)
    packing.prepare_into(other, 16, tmp_path / "other", progress=False).tokenizer.save(tmp_path / "run" / "tokenizer")
    data = packing.prepare_into(DataConfig(path=str(corpus), tokenizer="bytes"), 16, tmp_path / "prep", progress=False)
    workdirs.begin(tmp_path / "run", Config(), data, resumed=False)
    assert tokenizers.load(tmp_path / "run" / "tokenizer").hash == data.tokenizer.hash


def test_weights_to_start_from_may_be_spelled_in_another_way(tmp_path, monkeypatch):
    """The same folder is the same; another one is not, because a run that goes on does not read it."""
    monkeypatch.chdir(tmp_path)

    def config(init_from: str) -> Config:
        return dataclasses.replace(Config(), training=dataclasses.replace(Config().training, init_from=init_from))

    for spelled in ("a", "./a", "a/", str(tmp_path / "a"), "b/../a"):
        workdirs.check_continuation(config("a"), config(spelled), "run")
    workdirs.check_continuation(config("x/a"), config("y/a"), "run")  # x/a is no longer there: it was moved
    (tmp_path / "x/a").mkdir(parents=True)
    with pytest.raises(UserError, match="training.init_from was 'x/a', now 'y/a'"):
        workdirs.check_continuation(config("x/a"), config("y/a"), "run")
    with pytest.raises(UserError, match="training.init_from was 'gs://one/a', now 'gs://two/a'"):
        workdirs.check_continuation(config("gs://one/a"), config("gs://two/a"), "run")
    for other in ("b", ""):
        with pytest.raises(UserError, match=f"training.init_from was 'a', now '{other}'"):
            workdirs.check_continuation(config("a"), config(other), "run")
    with pytest.raises(UserError, match=r"training.init_from was '', now '\.'"):
        workdirs.check_continuation(config(""), config("."), "run")


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], None),
        ([{"event": "start", "step": 0}], None),
        ([{"event": "start", "data": 3}], None),
        ([{"event": "save", "data": "x"}, {"step": 3}], None),
        ([{"event": "start", "data": "x"}], ("x",)),
        ([{"event": "start", "data": "x", "rows": 3}], ("x",)),
        ([{"event": "start", "data": "x", "rows": ["a", "b"]}], ("x", "a", "b")),
        ([{"event": "start", "data": "x", "rows": "a"}, {"event": "resume", "data": "x", "rows": "b"}], ("x", "b")),
        ([{"event": "start", "data": "x", "rows": "a"}, {"event": "start", "data": "y", "rows": "c"}], ("y", "c")),
    ],
)
def test_what_a_run_is_trained_on(tmp_path, lines, found):
    """The last start counts: of a run that was begun again, what came before is another run's."""
    for line in lines:
        files.append_json_line(tmp_path / "events.jsonl", line)
    trained = workdirs.trained_on(tmp_path)
    assert (trained and (trained.digest, *map(str, trained.folders))) == found

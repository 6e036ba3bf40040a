"""Runs on a mixture (`data.mixture`): from training over a kill to the report, known by what they hold."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from armd_jax import config as configs
from armd_jax import files
from armd_jax.cli import main as cli
from armd_jax.config import Config
from armd_jax.data import loader, packing
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.evaluation import held_out
from armd_jax.interop import fine_tuning
from armd_jax.report import page
from armd_jax.training import metrics, recovery, run_data, run_log, train
from armd_jax.training import workdir as workdirs

LENGTH = 16
MIXTURE = ("wiki:3", "code:1")


def _config(mixture: tuple[str, ...] = MIXTURE, **training: Any) -> Config:
    values = configs.default_config_dict()
    values.data.mixture = mixture
    values.model.update(max_length=LENGTH, num_layers=2, two_stream_layers=1, width=16, num_heads=2)
    values.model.update(positional_width=8, dropout=0.1)
    values.order.update(ar_steps=2, permute_steps=4, max_permuted=4, streams=(1, 2))
    values.training.update(num_steps=8, batch_size=4, log_every=1, eval_every=4, eval_batches=3, checkpoint_every=3)
    values.training.update(tensorboard=False, **training)
    return configs.from_config_dict(values)


@pytest.fixture
def place(tmp_path, monkeypatch, corpus):
    """The folder that everything happens in: two prepared folders in bytes. Paths are relative to it."""
    monkeypatch.chdir(tmp_path)
    lines = corpus.read_text().splitlines(keepends=True)
    code = [line.replace("river", "while").replace("stone", "return") for line in lines[40:]]
    for name, part in (("wiki", lines[:40]), ("code", code)):
        pathlib.Path(f"{name}.jsonl").write_text("".join(part))
        source = DataConfig(path=f"{name}.jsonl", tokenizer="bytes", valid_fraction=0.2, test_fraction=0.1)
        packing.prepare_into(source, LENGTH, pathlib.Path(name), progress=False)
    return tmp_path


class _PowerCut(Exception):
    pass


def _rows(run: pathlib.Path) -> list[dict[str, float]]:
    rows = files.read_json_lines(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in run_log.SPEED} for row in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_on_a_mixture(place, monkeypatch, capsys):
    """It says what it is trained on. Killed and started again, from another folder, it ends bit for bit as an unbroken
    one. Every source has a figure of its own. The run is scored, exported, reported on and started from."""
    whole = train.train(_config(), place / "whole")
    assert "data.mixture: in 8 steps, 75.00% wiki (" in capsys.readouterr().err
    write = metrics.MetricWriter.write

    def dying(self, number, values):
        if number == 5:
            raise _PowerCut
        write(self, number, values)

    with monkeypatch.context() as patch, pytest.raises(_PowerCut):
        patch.setattr(metrics.MetricWriter, "write", dying)
        train.train(_config(), place / "run", progress=False)
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")  # where no folder has these names
    again = train.train(_config(), place / "run", progress=False)
    monkeypatch.chdir(place)
    assert again.steps_done == 5
    for one, other in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert _rows(place / "run") == _rows(place / "whole")
    start, *_ = files.read_json_lines(place / "run" / "events.jsonl")
    assert start["rows"] == [str(place / name) for name in ("wiki", "code")]

    last = _rows(place / "run")[-1]
    tokens = [packing.open_prepared(place / name).counts("valid").tokens for name in ("wiki", "code")]
    mean = np.average([last["eval/nll/wiki"], last["eval/nll/code"]], weights=tokens)
    assert last["eval/nll"] == pytest.approx(mean, rel=1e-6) and last["eval/nll/wiki"] != last["eval/nll/code"]
    assert last["eval/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)

    assert cli.main(["eval", "--run=run", "--split=valid", "--streams=2", "--draws=0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == sum(tokens) and found["unigram"] and found["xz_bits_per_byte"]
    assert (place / "run" / "baselines.json").exists() and not (place / "wiki" / "baselines.json").exists()
    assert cli.main(["export", "--run=run", "--out=export", "--format=huggingface"]) == 0
    data, _ = run_data.prepare(_config(), place / "run", progress=False)
    card = (place / "export" / "README.md").read_text()
    assert f"75.00% `wiki`, 25.00% `code`: {data.counts('train').documents:,} documents" in card
    facts = page._facts(configs.read(place / "run"), [], [])
    assert "text: 75.00% wiki, 25.00% code; tokenizer: wiki/tokenizer" in facts
    fine_tuning.check_source(_config(init_from="run"))


def _begin(config: Config) -> pathlib.Path:
    """Makes `run` the folder of a run with a checkpoint, as training does."""
    run = pathlib.Path("run")
    data, resolved = run_data.prepare(config, run, progress=False)
    run.mkdir()
    workdirs.begin(run, resolved, data, resumed=False)
    rows = [str(pathlib.Path(name).absolute()) for name in ("wiki", "code")]
    files.append_json_line(run / "events.jsonl", {"event": "start", "step": 0, "data": data.digest, "rows": rows})
    (run / "checkpoints" / "5").mkdir(parents=True)
    return run


def _go_on(run: pathlib.Path, config: Config):
    old = workdirs.begun(run)
    workdirs.check_continuation(old, config, run)
    return run_data.prepare(config, run, progress=False, old=old)


def test_a_run_is_what_it_holds(place):
    """Folders may move and weights may be scaled; other shares, another sequence and other text are refused."""
    run = _begin(_config())
    shutil.move("code", "moved")
    same = _go_on(run, _config(("./wiki:0.75", "moved:.25")))[0]
    assert same.digest == workdirs.trained_on(run).digest
    for other in (("wiki:2", "moved:1"), ("moved:1", "wiki:3"), ("wiki:1",), ()):
        with pytest.raises(UserError, match=r"^run holds a run .*\(.*data.mixture was \('wiki:3', 'code:1'\), now \("):
            _go_on(run, _config(other))
    with pytest.raises(UserError, match=r"^data.mixture: 'code' is no folder"):
        _go_on(run, _config())
    shutil.move("moved", "code")
    text = dataclasses.replace(_config(), data=DataConfig(path="wiki.jsonl", tokenizer="bytes"))
    with pytest.raises(
        UserError, match=r"^run holds a run on a mixture \(data.path was '', now 'wiki.jsonl'; data.mixt"
    ):
        _go_on(run, text)


def test_a_run_on_one_folder_may_name_it_either_way(place):
    """One folder alone is no mixture, so that the batches are the same."""
    chosen = dataclasses.replace(_config(()), data=DataConfig(path="wiki"))
    run = _begin(chosen)
    assert _go_on(run, _config(("wiki:1",)))[0].digest == _go_on(run, chosen)[0].digest


def test_held_out_text_is_that_of_the_run(place):
    """The validation texts of all folders. Where they hold other rows now, nothing is scored in their place."""
    run = _begin(_config())
    config = workdirs.begun(run)
    found = held_out.find(run, config, "valid")
    assert found.digest == workdirs.trained_on(run).digest and len(found.sources) == 2
    shutil.rmtree("code")
    with pytest.raises(UserError, match=r"^data.mixture: 'code' is no folder"):
        held_out.find(run, config, "valid")
    other = DataConfig(path="code.jsonl", tokenizer="bytes", valid_fraction=0.4)
    packing.prepare_into(other, LENGTH, pathlib.Path("code"), progress=False)
    with pytest.raises(UserError, match=r"^run: data.mixture names other rows than it was trained on; .* --data$"):
        held_out.find(run, config, "valid")
    os.remove("run/events.jsonl")  # as in an export, which does not say what it was trained on
    assert len(held_out.find(run, config, "valid").sources) == 2


def test_processes_open_the_folders_themselves(place, monkeypatch):
    """And compare what they hold with what the first one has."""
    told = []
    monkeypatch.setattr(run_data, "_from_first", lambda text: told.append(text) or told[0])
    first, resolved = run_data.prepare_together(_config(), place / "run", False, None)
    assert resolved.data == dataclasses.replace(_config().data, tokenizer="wiki/tokenizer", end_of_text=256)
    assert resolved.model.vocab_size == 257
    monkeypatch.setattr(run_data.jax, "process_index", lambda: 1)
    other, same = run_data.prepare_together(_config(), place / "run", False, None)
    assert (other.digest, same) == (first.digest, resolved)
    with pytest.raises(UserError, match="process 1: its rows in wiki, code are not those of process 0: give"):
        run_data.prepare_together(_config(("wiki:1", "code:1")), place / "run", False, None)


def test_a_report_of_a_fault_names_the_folder_of_every_row(place):
    """A row number alone would not say which text it is. Of one folder, the numbers are enough."""
    data, _ = run_data.prepare(_config(), place / "run", progress=False)
    report = recovery.rows_of(data, (3, 4), 4, seed=0)
    with loader.train_batches(data, 4, 0, start_step=3) as batches:
        for at in ("4", "5"):
            _, tokens = next(batches)
            folders, rows = report["batch_folders"][at], report["batch_rows"][at]
            assert sorted(folders) == ["code", "wiki", "wiki", "wiki"]
            opened = {folder: packing.open_prepared(pathlib.Path(folder)).rows("train") for folder in folders}
            assert (tokens == [opened[folder][row] for folder, row in zip(folders, rows, strict=True)]).all()
    assert list(recovery.rows_of(data.sources[0], (3, 4), 4, seed=0)) == ["batch_rows"]

"""Held-out text of a run: what training prepared is taken, and nothing is written outside the run."""

import dataclasses
import json
import pathlib
import shutil
import sys
import types

import pytest

from armd_jax import files
from armd_jax.cli import main as cli
from armd_jax.config import Config, ModelConfig
from armd_jax.data import packing, text_files, tokenizers
from armd_jax.data.packing import PreparedData
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.evaluation import held_out

LENGTH = 16


@pytest.fixture
def config(corpus: pathlib.Path) -> Config:
    """The config of a run on the small corpus in bytes."""
    return Config(model=ModelConfig(max_length=LENGTH), data=DataConfig(path=str(corpus), tokenizer="bytes"))


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run's folder with its tokenizer and no data yet, as an export is."""
    folder = tmp_path / "run"
    tokenizers.BytesTokenizer().save(folder / "tokenizer")
    return folder


def _trained(config: Config, root: pathlib.Path) -> PreparedData:
    """What training prepares."""
    return packing.prepare(config.data, LENGTH, root, progress=False)


def test_numbers_of_streams_are_those_that_divide_the_rows_that_are_scored(smoke_run, corpus, tmp_path, capsys):
    """Rows that were prepared ahead may be shorter than the model's: 3 divides their 48 tokens, and 32 does not."""
    given = DataConfig(path=str(corpus), tokenizer=str(smoke_run))
    rows = packing.prepare(given, 48, tmp_path, progress=False).folder
    argv = ["eval", f"--run={smoke_run}", f"--data={rows}", "--no-baselines", "--draws=0"]
    assert cli.main([*argv, "--streams=3", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["strided"]) == ["3"]
    assert cli.main([*argv, "--streams=32"]) == 2
    error = capsys.readouterr().err
    assert "--streams=32: 32 does not divide the 48 tokens of a row" in error and len(error.splitlines()) == 1


def test_the_data_of_training_are_taken(run, config):
    """What a run was trained on is found under the name that training gave it, and nothing is prepared again."""
    trained = _trained(config, run / "data")
    found = held_out.find(run, config, "test")
    assert found.folder == trained.folder and found.counts("test") == trained.counts("test")
    assert list((run / "data").iterdir()) == [trained.folder]


def test_a_cache_folder_is_read_and_never_written(run, config, tmp_path):
    """Data in `data.cache_dir` are taken from there; if they are not there, they are prepared in the run's folder."""
    elsewhere = tmp_path / "elsewhere"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(elsewhere)))
    found = held_out.find(run, config, "test")
    assert found.folder.parent == run / "data" and not elsewhere.exists()
    shutil.rmtree(run / "data")
    trained = _trained(config, elsewhere)
    assert held_out.find(run, config, "test").folder == trained.folder
    assert not (run / "data").exists()


def _note_rows(run: pathlib.Path, trained: PreparedData) -> None:
    """Notes in the run what it was trained on, as training does."""
    start = {"event": "start", "step": 0, "data": trained.digest, "rows": str(trained.folder.absolute())}
    files.append_json_line(run / "events.jsonl", start)


def test_a_run_is_evaluated_on_its_own_rows(run, config, tmp_path, monkeypatch):
    """In whatever folder one is, however the config spells the text, and also if the text is gone or was changed."""
    text = tmp_path / "docs.jsonl"
    shutil.copy(config.data.path, text)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="docs.jsonl"))
    trained = _trained(config, run / "data")
    _note_rows(run, trained)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert held_out.find(run, config, "test").folder == trained.folder
    monkeypatch.chdir(tmp_path)
    text.write_text(text.read_text().replace("river", "brook"))
    assert held_out.find(run, config, "test").folder == trained.folder
    with pytest.raises(UserError, match="no 'nowhere' split"):
        held_out.find(run, config, "nowhere")
    # Without them, changed text would have parts of what was trained on in its test split.
    shutil.rmtree(run / "data")
    with pytest.raises(UserError, match="own rows are gone, and data.path='docs.jsonl' names other text"):
        held_out.find(run, config, "test")


def test_a_stored_config_opens_no_dataset(run, config, monkeypatch):
    """A config that came with a run could name any TFDS builder, and builders are code: it is not even asked for. Rows
    of the run itself are taken, and a dataset that the user names is opened, in the user's own folder."""
    opened = []
    module = types.SimpleNamespace(builder=lambda name, **options: opened.append((name, options)) or 1 / 0)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    trained = _trained(config, run / "data")
    stored = dataclasses.replace(config.data, path="tfds:huggingface:evil/set", tfds_data_dir="/evil")
    config = dataclasses.replace(config, data=stored)
    with pytest.raises(UserError, match=r"does not choose a TFDS dataset .*--data=tfds:huggingface:evil/set"):
        held_out.find(run, config, "test")
    _note_rows(run, trained)
    assert held_out.find(run, config, "test").folder == trained.folder and not opened
    with pytest.raises(UserError, match="no dataset that can be read"):
        held_out.find(run, config, "test", "tfds:mine")
    assert opened == [("mine", {"data_dir": None})]


def test_a_text_without_a_test_split(run, config, tmp_path):
    """The validation split stands for it, unless the test split is asked for by name; a text of neither is an error."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("one two three " * 40)
    source = str(tmp_path / "*.txt")
    data = held_out.find(run, config, None, source)
    assert held_out.chosen_split(None, data.splits) == "valid" and data.counts("valid").bytes > 0
    with pytest.raises(UserError, match="no 'test' split; it has train, valid"):
        held_out.find(run, config, "test", source)
    assert held_out.chosen_split(None, held_out.find(run, config, None).splits) == "test"
    assert held_out.chosen_split("train", data.splits) == "train"
    (tmp_path / "valid.txt").unlink()
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, valid_fraction=0.0, test_fraction=0.0))
    with pytest.raises(UserError, match="no 'valid' split"):
        held_out.find(run, alone, None, str(tmp_path / "train.txt"))


def test_what_prepare_wrote_can_be_scored(run, config, tmp_path):
    """`--data` takes a prepared folder as it is, and so does a config that names one."""
    made = packing.prepare_into(config.data, LENGTH, tmp_path / "prep", progress=False)
    assert held_out.find(run, config, "test", str(made.folder)).folder == made.folder
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(made.folder)))
    assert held_out.find(run, config, "test").folder == made.folder
    assert not (run / "data").exists()
    with pytest.raises(UserError, match="no 'nowhere' split"):
        held_out.find(run, config, "nowhere", str(made.folder))


def test_new_rows_go_where_they_are_wanted(run, config, tmp_path):
    found = held_out.find(run, config, "test", rows=tmp_path / "rows")
    assert found.folder.parent == tmp_path / "rows" / "data" and not (run / "data").exists()
    assert held_out.find(run, config, "test", rows=tmp_path / "rows").folder == found.folder


def test_an_export_has_the_same_rows(run, config):
    """Without prepared data, the text is prepared with the tokenizer files of the folder: into the same rows."""
    found, trained = held_out.find(run, config, "test"), _trained(config, run / "trained")
    assert found.num_rows("test") == trained.num_rows("test")
    assert all((found.rows("test")[row] == trained.rows("test")[row]).all() for row in range(found.num_rows("test")))
    assert held_out.find(run, config, "test").folder == found.folder  # found again


def test_other_text_gets_the_tokenizer_of_the_run(run, config, tmp_path, monkeypatch):
    """Other text is cut into rows of the run's length with the run's own tokenizer."""
    (tmp_path / "test.txt").write_text("words and words. " * 30)
    (tmp_path / "train.txt").write_text("words and words. " * 30)
    found = held_out.find(run, config, "test", str(tmp_path / "*.txt"))
    assert found.length == LENGTH and found.tokenizer.hash == tokenizers.load(run / "tokenizer").hash
    assert found.counts("test").bytes == 30 * 17
    monkeypatch.setattr(text_files, "hash_file", lambda _: pytest.fail("unchanged text was read again"))
    assert held_out.find(run, config, "test", str(tmp_path / "*.txt")).folder == found.folder


def test_text_or_a_split_that_is_not_there_is_an_error(run, config, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        held_out.find(run, config, "test", str(tmp_path / "missing.txt"))
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("words and words. " * 30)
    with pytest.raises(UserError, match="no 'nowhere' split"):
        held_out.find(run, config, "nowhere", str(tmp_path / "*.txt"))
    assert not (run / "data").exists()

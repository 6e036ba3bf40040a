"""Held-out text of a run: what training prepared is taken, and nothing is written outside the run."""

import dataclasses
import pathlib
import shutil

import pytest

from armd_jax.config import Config, DataConfig, ModelConfig
from armd_jax.data import packing, tokenizers
from armd_jax.data.packing import PreparedData
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


def test_an_export_has_the_same_rows(run, config):
    """Without prepared data, the text is prepared with the tokenizer files of the folder: into the same rows."""
    found, trained = held_out.find(run, config, "test"), _trained(config, run / "trained")
    assert found.num_rows("test") == trained.num_rows("test")
    assert all((found.rows("test")[row] == trained.rows("test")[row]).all() for row in range(found.num_rows("test")))
    assert held_out.find(run, config, "test").folder == found.folder  # found again


def test_other_text_gets_the_tokenizer_of_the_run(run, config, tmp_path):
    """Other text is cut into rows of the run's length with the run's own tokenizer."""
    (tmp_path / "test.txt").write_text("words and words. " * 30)
    (tmp_path / "train.txt").write_text("words and words. " * 30)
    found = held_out.find(run, config, "test", str(tmp_path / "*.txt"))
    assert found.length == LENGTH and found.tokenizer.hash == tokenizers.load(run / "tokenizer").hash
    assert found.counts("test").bytes == 30 * 17


def test_text_or_a_split_that_is_not_there_is_an_error(run, config, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        held_out.find(run, config, "test", str(tmp_path / "missing.txt"))
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("words and words. " * 30)
    with pytest.raises(UserError, match="no 'nowhere' split"):
        held_out.find(run, config, "nowhere", str(tmp_path / "*.txt"))
    assert not (run / "data").exists()

"""Real text that generated texts are compared with: which rows are taken, and what happens if there are none."""

import pytest

from armd_jax.config import Config, ModelConfig
from armd_jax.data import packing
from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.evaluation import generative_reference


def test_real_text_is_spread_over_the_split(data):
    """Full rows, the first and the last among them, each once, cut to the length."""
    full = data.counts("train").tokens // data.length
    rows = generative_reference.spread(data, "train", 9, 5)
    stored = data.rows("train")
    assert len(rows) == 5 and all(len(row) == 9 for row in rows)
    assert rows[0] == stored[0][:9].tolist() and rows[-1] == stored[full - 1][:9].tolist()
    assert len(generative_reference.spread(data, "train", 16, 10**6)) == full
    with pytest.raises(UserError, match="^its rows have 16 tokens, fewer than --length=17"):
        generative_reference.spread(data, "train", 17, 1)


def test_a_text_without_a_whole_row_is_none_unless_it_is_asked_for(tmp_path):
    """The run's own held-out text is compared with only if it is there; one that is named has to be."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("the river moves slowly\n" * 9)
    (tmp_path / "text" / "test.txt").write_text("short\n")
    given = DataConfig(path=str(tmp_path / "text"), tokenizer="bytes")
    config = Config(model=ModelConfig(max_length=16), data=given)
    BytesTokenizer().save(tmp_path / "run" / "tokenizer")
    packing.prepare(given, 16, tmp_path / "run" / "data", progress=False)
    where = tmp_path / "run", config
    assert generative_reference.find(*where, None, tmp_path / "run", 8, 4) is None
    with pytest.raises(UserError, match="^--reference=test: its test split has no row of 16 tokens$"):
        generative_reference.find(*where, "test", tmp_path / "run", 8, 4)
    found = generative_reference.find(*where, "train", tmp_path / "run", 8, 4)
    assert found is not None and len(found.rows) == 4 and found.name == "train split"

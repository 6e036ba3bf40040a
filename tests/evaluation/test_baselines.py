"""What text is worth without a network: right, and measured once for the same rows."""

import json
import math
import pathlib
from collections import Counter

import numpy as np
import pytest

from armd_jax.data import loader, packing
from armd_jax.data_config import DataConfig
from armd_jax.evaluation import baselines
from armd_jax.evaluation.baselines import Baselines


def _ids(data: packing.PreparedData, split: str) -> list[int]:
    rows = np.concatenate([data.rows(split)[row] for row in range(data.num_rows(split))])
    return rows[: data.counts(split).tokens].tolist()


@pytest.mark.parametrize("split", ["train", "test"])
def test_unigram_against_a_hand_count(data, split):
    """The unigram model is the training split's token frequencies, one added to each."""
    ids, size = _ids(data, "train"), data.tokenizer.vocab_size
    seen = Counter(ids)
    expected = -sum(math.log((seen[token] + 1) / (len(ids) + size)) for token in _ids(data, split))
    assert Baselines(data).unigram_nats(split) == pytest.approx(expected, rel=1e-9)


def test_training_text_has_no_number_of_the_compressor(data):
    """After itself nothing is left of it to compress."""
    assert Baselines(data).xz_bits_per_byte("train") is None and Baselines(data).xz_bits_per_byte("test") > 0


def _figures(data: packing.PreparedData, *kept_in: pathlib.Path) -> dict[str, tuple[float, float | None]]:
    known = Baselines(data, kept_in)
    return {split: (known.unigram_nats(split), known.xz_bits_per_byte(split)) for split in ("valid", "test")}


def test_the_same_rows_are_measured_once(data, tmp_path, monkeypatch):
    """The second time, no training row is read and nothing is compressed, for one split or another."""
    first = _figures(data, tmp_path / "kept.json")
    read, batches = [], loader.eval_batches
    monkeypatch.setattr(loader, "eval_batches", lambda *given: read.append(given[1]) or batches(*given))
    monkeypatch.setattr(baselines.lzma, "compress", lambda *_, **__: pytest.fail("text was compressed"))
    assert _figures(data, tmp_path / "kept.json") == first
    assert read == ["valid", "test"]


def test_what_cannot_be_written_is_measured_again(data, tmp_path):
    """The first place that can be written keeps the figures; they are read from any."""
    (tmp_path / "file").write_text("")
    first = _figures(data, tmp_path / "file" / "kept.json")
    assert first == _figures(data, tmp_path / "file" / "kept.json", tmp_path / "kept.json") == _figures(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept.json"]


DAMAGES = {
    "other rows": {"rows": "other"},
    "no rows": {"rows": None},
    "too few counts": {"unigrams": [1, 2]},
    "no counts": {"unigrams": []},
    "words": {"unigrams": "many"},
    "no list": {"xz_bits_per_byte": 3},
    "one more field": {"more": 1},
    "cut": "{",
    "a list": "[]",
    "empty": "",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "a negative count", "another sum"])
def test_a_file_that_is_not_about_these_rows_is_measured_again(data, tmp_path, damage):
    """Whatever is wrong with it, the figures are right, and the file is right afterwards."""
    file = tmp_path / "kept.json"
    first = _figures(data, file)
    right = json.loads(file.read_text())
    one, two, *more = right["unigrams"]
    counts = {"a negative count": [-1, one + two + 1, *more], "another sum": [one + 1, two, *more]}
    wrong = {"unigrams": counts[damage]} if damage in counts else DAMAGES[damage]
    file.write_text(wrong if isinstance(wrong, str) else json.dumps(right | wrong))
    assert _figures(data, file) == first and json.loads(file.read_text()) == right


def test_other_held_out_rows_are_compressed_anew(tmp_path):
    """The same training rows may have other held-out rows beside them in another folder."""
    folder, kept = tmp_path / "text", tmp_path / "kept.json"
    folder.mkdir()
    digests = set()
    for text in ("the old tree and the new tree. ", "a bird sees the light and moves. "):
        (folder / "train.txt").write_text("the old river moves slowly under the stone. " * 20)
        (folder / "test.txt").write_text(text * 9)
        config = DataConfig(path=str(folder), tokenizer="bytes", valid_fraction=0.0)
        data = packing.prepare(config, 16, tmp_path / "cache", progress=False)
        assert Baselines(data, [kept]).xz_bits_per_byte("test") == Baselines(data).xz_bits_per_byte("test")
        digests.add(data.digest)
    assert len(digests) == 1 and len(json.loads(kept.read_text())["xz_bits_per_byte"]) == 2

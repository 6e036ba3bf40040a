"""Parameters of a checkpoint that are read in parts: the same bits, each piece decompressed once, damage named."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tensorstore

from armd_jax import config as configs
from armd_jax.errors import UserError
from armd_jax.training import checkpoints, stored_params

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture
def run(tmp_path, smoke_run) -> pathlib.Path:
    """A copy of the smoke run, with checkpoints 30 and 40."""
    shutil.copytree(smoke_run, tmp_path / "run")
    return tmp_path / "run"


def test_arrays_are_those_of_the_run(run):
    """The average or the raw parameters, every array and every layer of it, to the last bit, with their step."""
    config = configs.read(run)
    for ema in (True, False):
        whole = checkpoints.restore_params(run, config, ema)
        with stored_params.open_newest(run, config, ema) as stored:
            assert stored.step == 40 and jax.tree.structure(stored.params) == jax.tree.structure(whole)
            for found, expected in zip(jax.tree.leaves(stored.params), jax.tree.leaves(whole), strict=True):
                assert found.shape == expected.shape
                np.testing.assert_array_equal(np.asarray(found), expected)
                np.testing.assert_array_equal(found[len(expected) // 2], expected[len(expected) // 2])


def test_the_digest_is_that_of_the_checkpoint(run):
    """Both compute it, one on a device and one in pieces, of arrays of whatever shape and however small the pieces."""
    config = configs.read(run)
    whole = checkpoints.restore_params(run, config)
    expected = {path: int(number) for path, number in jax.tree_util.tree_leaves_with_path(checkpoints.digests(whole))}
    patch = pytest.MonkeyPatch()
    for block in (1, 1000, 1 << 22):
        patch.setattr(stored_params, "_BLOCK", block)
        with stored_params.open_newest(run, config) as stored:
            for path, leaf in jax.tree_util.tree_leaves_with_path(stored.params):
                assert leaf._arrays.digest(leaf._path) == expected[path]
    patch.undo()


def _decoded() -> int:
    """How many pieces of arrays TensorStore did not find in its cache so far."""
    (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/cache/miss_count")
    return int(metric["values"][0]["value"])


def test_layers_in_a_row_are_decompressed_once(run):
    """An array that is one piece is decompressed to verify it and once more for all of its layers."""
    config = configs.read(run)
    with stored_params.open_newest(run, config) as stored:
        misses = []
        for leaf in jax.tree.leaves(stored.params):
            before = _decoded()
            for row in range(leaf.shape[0]):
                leaf[row]
            misses.append(_decoded() - before)
            arrays = leaf._arrays
            assert sum(map(arrays._bytes, arrays._opened)) <= max(map(arrays._bytes, arrays.leaves))
        assert max(misses) <= 8 < max(leaf.shape[0] for leaf in jax.tree.leaves(stored.params)), misses


def test_a_damaged_step_is_passed_over(run, capsys):
    """As when all of it is restored: the newest step that is whole is taken, and what is wrong with others is told."""
    config = configs.read(run)
    meta = next(file for file in (run / "checkpoints" / "40" / "meta").iterdir() if "digests" in file.read_text())
    values = json.loads(meta.read_text())
    name = next(name for name in values["digests"] if name.startswith("ema.causal"))
    values["digests"][name] ^= 1
    meta.write_text(json.dumps(values))
    with stored_params.open_newest(run, config) as stored:
        assert stored.step == 30
    assert f"40: {name} is not what was saved" in capsys.readouterr().err
    with stored_params.open_newest(run, config, ema=False) as stored:
        assert stored.step == 40


@pytest.mark.parametrize("digests", [None, [], "x", {}])
def test_digests_that_are_none(run, capsys, digests):
    """A damaged note of digests is damage of its step."""
    config = configs.read(run)
    meta = next(file for file in (run / "checkpoints" / "40" / "meta").iterdir() if "digests" in file.read_text())
    meta.write_text(json.dumps({"digests": digests}))
    with stored_params.open_newest(run, config) as stored:
        assert stored.step == 30
    assert "damaged checkpoint passed over: " in capsys.readouterr().err


def test_files_that_vanish_while_they_are_read(run):
    """What was verified and cannot be read when it is used is an error."""
    config = configs.read(run)
    with stored_params.open_newest(run, config) as stored:
        assert np.asarray(stored.params["embedding"]).any()
        for file in (run / "checkpoints" / "40" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        with pytest.raises(UserError, match="checkpoints/40: "):
            np.asarray(stored.params["final_norm"]["scale"])

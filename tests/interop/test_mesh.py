"""`--mesh`: a run is scored and sampled, and an export is loaded, with its weights spread over several devices."""

import os
import pathlib
import subprocess
import sys

import pytest

from armd_jax.cli import main as cli

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Compares a run on one device with the same on meshes of four.
_CASES = """
import json, pathlib, sys
import jax, numpy as np
import armd_jax as armd
from armd_jax.cli import main as cli
from armd_jax.config import MeshConfig
from armd_jax.training import sharding

run, out = sys.argv[1], pathlib.Path(sys.argv[2])
one = armd.load(run)
spread = armd.load(run, mesh=sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)))
weight = spread.params["causal"]["mlp_in"]
assert len(weight.sharding.device_set) == 4 and weight.addressable_shards[0].data.size * 4 == weight.size
tokens = np.random.default_rng(0).integers(0, 257, (2, 64)).astype(np.int32)
order = armd.order.strided(2, 64, 4)
np.testing.assert_allclose(spread.log_prob(tokens, order), one.log_prob(tokens, order), atol=1e-4)
written = [lm.generate(2, 16, streams=2, prompt=[5, 6], temperature=0) for lm in (one, spread)]
np.testing.assert_array_equal(written[0].tokens_BN, written[1].tokens_BN)

found = {}
for name, words in (("one", []), ("four", ["--mesh=data=2,fsdp=-1"])):
    assert cli.main(["eval", f"--run={run}", "--draws=1", "--streams=2", f"--out={out / name}", *words]) == 0
    found[name] = json.loads((out / name / "eval.json").read_text())
for score in ("left_to_right", "random_orders"):
    nats = [result[score]["nats_per_token"] for result in found.values()]
    np.testing.assert_allclose(nats[1], nats[0], rtol=1e-5)
assert cli.main(["sample", f"--run={run}", "--length=8", "--mesh=tensor=2,data=-1", f"--out={out}"]) == 0
assert cli.main(["export", f"--run={run}", f"--out={out / 'export'}"]) == 0
copy = armd.load(out / "export", mesh=sharding.make_mesh(MeshConfig(fsdp=4)))
assert len(copy.params["causal"]["mlp_in"].sharding.device_set) == 4
for found, expected in zip(jax.tree.leaves(copy.params), jax.tree.leaves(one.params), strict=True):
    np.testing.assert_array_equal(found, expected)
for words in (["--mesh=fsdp=3"], ["--mesh=data=3,fsdp=-1"], ["--mesh=tensor=4"], ["--mesh=data=4", "--batch=6"]):
    assert cli.main(["eval", f"--run={run}", f"--out={out}", *words]) == 2, words
"""


@pytest.mark.slow
def test_verbs_on_a_mesh_find_what_one_device_finds(tmp_path, smoke_run):
    """Scores agree to 1e-5, greedy texts are equal, and no device has more than its part."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", _CASES, str(smoke_run), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, words in zip(
        errors, ("needs 3 devices, but there are 4", "cannot be divided", "model.num_heads=2", "--batch=6"), strict=True
    ):
        assert words in line


@pytest.mark.parametrize("words", ["", "fsdp", "fsdp=0", "fsdp=two", "model=2", "data=-1,fsdp=-1", "fsdp=-2", "2"])
def test_axes_that_are_none(tmp_path, capsys, words):
    """One line that names the argument, before anything is read."""
    assert cli.main(["eval", f"--run={tmp_path}", f"--mesh={words}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: argument --mesh: ") and len(err.splitlines()) == 1

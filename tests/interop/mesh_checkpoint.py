"""Program of test_readable.py: saves a run's state over 8 devices, and its parameters as one process has them."""

import pathlib
import sys

import jax
import numpy as np

from armd_jax import config as configs
from armd_jax.interop import safetensors_format
from armd_jax.training import checkpoints, sharding
from armd_jax.training import state as states

run, out = map(pathlib.Path, sys.argv[1:])
config = configs.read(run)
mesh = sharding.make_mesh(configs.MeshConfig(data=2, fsdp=2, tensor=2))
rng = np.random.default_rng(0)
state = jax.tree.map(
    lambda leaf: jax.device_put(np.asarray(rng.standard_normal(leaf.shape) * 9).astype(leaf.dtype), leaf.sharding),
    states.abstract(config, mesh),
)
assert len(state.params["causal"]["query"].sharding.device_set) == 8
assert not state.params["causal"]["query"].sharding.is_fully_replicated
with checkpoints.Checkpointer(run, config) as checkpointer:
    checkpointer.save(state, 7, force=True)
np.savez(out, **{name: np.asarray(a) for name, a in safetensors_format.flatten(state.ema, config.model).items()})

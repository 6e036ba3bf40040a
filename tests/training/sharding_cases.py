"""Gradients and losses of one toy run on several meshes, written as .npz; a process of its own with 8 devices."""

import dataclasses
import sys

import jax
import numpy as np

from armd_jax import config as configs
from armd_jax.training import sharding, state, step

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "mixed": (2, 2, 2)}


def main(out: str) -> None:
    assert jax.device_count() == 8
    jax.config.update("jax_disable_most_optimizations", True)
    values = configs.default_config_dict()
    values.model.update(vocab_size=100, max_length=16, num_layers=2, two_stream_layers=1, width=16, num_heads=2)
    values.model.update(positional_width=8, dropout=0.1)
    values.order.update(ar_steps=0, permute_steps=2, max_permuted=8)
    values.optimizer.update(learning_rate=1e-2, warmup_steps=1, ema_decay=0.9)
    values.training.update(num_steps=5, batch_size=8)
    config = configs.from_config_dict(values)
    tokens = np.random.default_rng(0).integers(0, 100, (5, 8, 16)).astype(np.int32)
    results = {}
    for name, shape in MESHES.items():
        devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
        placed = dataclasses.replace(config, mesh=configs.MeshConfig(*shape))
        sharding.check_divisible(placed, mesh)
        now = state.create(placed, mesh)
        rows = [jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in tokens]

        def gradients(params, batch, placed=placed, mesh=mesh):
            return step.gradients(params, placed, batch, step.draw_order(placed, 0, 16), 0, mesh)[0]

        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(gradients)(now.params, rows[0])):
            results[f"{name}/gradient{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
        results[f"{name}/parts"] = np.asarray(len(now.params["causal"]["mlp_in"].sharding.device_set))
        results[f"{name}/share"] = np.asarray(
            now.params["causal"]["mlp_in"].addressable_shards[0].data.size / now.params["causal"]["mlp_in"].size
        )
        train_step, losses = step.make_train_step(placed, mesh), []
        for batch in rows:
            now, metrics = train_step(now, batch)
            losses.append(float(metrics["train/loss"]))
        results[f"{name}/losses"] = np.asarray(losses)
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])

"""Gradients and losses of one toy run on several meshes, written as .npz; a process of its own with 8 devices."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from armd_jax import config as configs
from armd_jax.training import checkpoints, divisibility, placement, sharding, state, step

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "mixed": (2, 2, 2), "tensor": (1, 2, 4)}
MESHES["flash"] = MESHES["mixed"]  # with the GPU kernel, interpreted
DENOISER = {"one": (1, 1, 1), "mixed": (2, 2, 2)}
STEPS, BATCH, LENGTH = 20, 8, 16


def main(out: str) -> None:
    assert jax.device_count() == 8
    jax.config.update("jax_disable_most_optimizations", True)
    values = configs.default_config_dict()
    values.model.update(vocab_size=100, max_length=LENGTH, num_layers=2, two_stream_layers=1, width=64, num_heads=4)
    values.model.update(positional_width=8, dropout=0.0)
    values.order.update(ar_steps=0, permute_steps=2, max_permuted=8)
    values.optimizer.update(learning_rate=1e-3, warmup_steps=2, ema_decay=0.9)
    values.training.update(num_steps=STEPS, batch_size=BATCH, checkpoint_every=STEPS)
    config = configs.from_config_dict(values)
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.2, (STEPS, BATCH, LENGTH)), 99).astype(np.int32)  # a few common, many rare
    results = {}
    for name, shape in MESHES.items():
        placed, mesh = _placed(config, shape)
        if name == "flash":
            placed = dataclasses.replace(placed, model=dataclasses.replace(placed.model, attention="flash"))
        divisibility.check(placed, mesh)
        now = state.create(placed, mesh)

        where = placement.for_training(placed, mesh)

        def gradients(params, batch, placed=placed, where=where):
            return step.gradients(params, where, batch, step.draw_task(placed, STEPS - 1, LENGTH), 0)[0]

        first = jax.device_put(tokens[0], sharding.batch_sharding(mesh))
        if name == "flash":
            program = str(jax.make_jaxpr(gradients)(now.params, first))
            results["flash/kernels"] = np.asarray(program.count("pallas_call["))
        compiled = jax.jit(gradients).lower(now.params, first).compile()
        results[f"{name}/flops"] = np.asarray(compiled.cost_analysis()["flops"])
        for path, leaf in jax.tree_util.tree_leaves_with_path(compiled(now.params, first)):
            results[f"{name}/gradient{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
        here = sharding.rows_here(mesh, BATCH)
        results[f"{name}/batch"] = np.asarray(sharding.global_rows(mesh, BATCH, here, tokens[0][here]) == first)
        weight = now.params["causal"]["mlp_in"]
        results[f"{name}/parts"] = np.asarray(len(weight.sharding.device_set))
        results[f"{name}/share"] = np.asarray(weight.addressable_shards[0].data.size / weight.size)
        _, losses = _train(placed, mesh, now, tokens)
        results[f"{name}/losses"] = np.asarray(losses)
    results["moved/losses"] = np.asarray(_moved(config, pathlib.Path(out).parent / "adamw", tokens))
    muon = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind="muon"))
    placed, mesh = _placed(muon, MESHES["one"])
    results["muon/losses"] = np.asarray(_train(placed, mesh, state.create(placed, mesh), tokens)[1])
    results["muon moved/losses"] = np.asarray(_moved(muon, pathlib.Path(out).parent / "muon", tokens))
    denoiser = dataclasses.replace(config, model=dataclasses.replace(config.model, kind="denoiser"))
    for name, shape in DENOISER.items():
        placed, mesh = _placed(denoiser, shape)
        _, losses = _train(placed, mesh, state.create(placed, mesh), tokens)
        results[f"denoiser/{name}"] = np.asarray(losses)
    uneven = dataclasses.replace(config.model, max_length=LENGTH - 1)
    for name in ("one", "tensor"):
        placed, mesh = _placed(dataclasses.replace(config, model=uneven), MESHES[name])
        _, losses = _train(placed, mesh, state.create(placed, mesh), tokens[:2, :, :-1])
        results[f"uneven/{name}"] = np.asarray(losses)
    np.savez(out, **results)


def _placed(config: configs.Config, shape: tuple[int, int, int]) -> tuple[configs.Config, Mesh]:
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    return dataclasses.replace(config, mesh=configs.MeshConfig(*shape)), mesh


def _train(
    config: configs.Config, mesh: Mesh, now: state.TrainState, batches: Sequence[np.ndarray]
) -> tuple[state.TrainState, list[float]]:
    train_step, losses = step.make_train_step(placement.for_training(config, mesh)), []
    for batch in batches:
        now, metrics = train_step(now, jax.device_put(batch, sharding.batch_sharding(mesh)))
        losses.append(float(metrics["train/loss"]))
    return now, losses


def _moved(config: configs.Config, folder: pathlib.Path, tokens: np.ndarray) -> list[float]:
    """The losses of a run that is saved and restored on the way: 8 devices, then 4, then 1."""
    losses = []
    for shape, part in (((2, 2, 2), slice(0, 7)), ((1, 4, 1), slice(7, 14)), ((1, 1, 1), slice(14, STEPS))):
        placed, mesh = _placed(config, shape)
        with checkpoints.Checkpointer(folder, placed) as checkpointer:
            now = checkpointer.restore_newest(state.abstract(placed, mesh), lambda *fault: sys.exit(str(fault)))
            now = state.create(placed, mesh) if now is None else now
            assert int(now.step) == part.start
            now, some = _train(placed, mesh, now, tokens[part])
            assert checkpointer.save(now, part.stop, force=True)
        losses += some
    return losses


if __name__ == "__main__":
    main(sys.argv[1])

"""How well training uses a device: the step of an experiment, of the AR model of its size, and a plain product.

    python experiments/benchmarks/mfu.py --config=experiments/owt_small.py --rows=32 [--json]

Runs the step that `armd train` runs, with the experiment's own kernels, optimizer and average of weights, on random
tokens on all devices of this machine. The two models and the product take turns, and figures are medians over the
turns. MFU counts the model's own FLOPs, AR MFU those of an autoregressive model of the same size by the convention of
the field, both against the published peak of the device. `of a product` is the rate of the model's FLOPs over that of
one large square product in the same dtype, which needs no published figure. Memory is what the compiler assigned on one
device: the training state, the batch, and the largest sum of what a step holds beside them.
"""

import argparse
import dataclasses
import statistics
import sys
from typing import Any

from armd_jax.training import host_memory

if host_memory.trains_on_cpu():
    host_memory.keep_freed_memory()  # before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
from common import Case, machine, print_json, print_versions, timed

from armd_jax import config as configs
from armd_jax import experiment_file
from armd_jax.config import Config
from armd_jax.core import flops, sizes
from armd_jax.core.peaks import peak_flops
from armd_jax.errors import UserError
from armd_jax.training import divisibility, placement, sharding, state, step


def experiment(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The experiment with this many rows in one microbatch, and a vocabulary."""
    values = experiment_file.load_config_file(args.config)
    values.training.update(batch_size=args.rows, microbatches=1)
    values.mesh.update(data=-1, fsdp=1, tensor=1)
    values.model.vocab_size = args.vocab
    experiment_file.apply_overrides(values, overrides)
    config = configs.from_config_dict(values)
    if not config.model.has_orders:
        raise UserError(f"{args.config}: model.kind={config.model.kind!r}: only steps of an ARMD are measured")
    return config


def ar_of(config: Config) -> Config:
    """The autoregressive model of the same size, trained from left to right."""
    order = dataclasses.replace(config.order, kind="left_to_right", sbp_steps=0, mix=())
    model = dataclasses.replace(config.model, two_stream_layers=0, aggregator="shift")
    return dataclasses.replace(config, model=model, order=order)


def training_case(config: Config) -> tuple[Case, int]:
    """A training step, and the bytes that the compiler assigned on one device."""
    mesh = sharding.make_mesh(config.mesh)
    divisibility.check(config, mesh)
    now = state.create(config, mesh)
    rng, shape = np.random.default_rng(0), (config.training.batch_size, config.model.max_length)
    random = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    tokens = jax.device_put(random, sharding.batch_sharding(mesh))
    compiled = step.make_train_step(placement.for_training(config, mesh)).lower(now, tokens).compile()
    memory = compiled.memory_analysis()
    assigned = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assigned -= memory.alias_size_in_bytes

    def train() -> None:
        nonlocal now
        now, _ = jax.block_until_ready(compiled(now, tokens))

    return train, assigned


def product_case(size: int, dtype: Any) -> Case:
    """One product of two square matrices on one device."""
    product = jax.jit(jnp.matmul)
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return lambda: jax.block_until_ready(product(matrix, matrix))


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="an experiment file; --config.section.field=value changes it")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step, on all devices together")
    parser.add_argument("--vocab", type=int, default=50257, help="size of the vocabulary")
    parser.add_argument("--product", type=int, default=8192, help="width of the square matrices of the product")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args, overrides = parser.parse_known_args()
    if args.turns < 1 or args.product < 1 or args.vocab < 1:
        sys.exit("error: --turns, --product and --vocab must be at least 1")
    try:
        config = experiment(args, overrides)
        models = {"ARMD": config, "AR": ar_of(config)}
        cases, memory = {}, {}
        for name, one in models.items():
            cases[name], memory[name] = training_case(one)
    except UserError as error:
        sys.exit(f"error: {error}")
    device = jax.devices()[0]
    dtype = sizes.activation_dtype(config.model.for_platform(device.platform))
    cases["product"] = product_case(args.product, dtype)
    for case in cases.values():
        case()  # the first call is not timed
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.turns):
        for name, case in cases.items():
            seconds[name].append(timed(case))
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    tokens = config.training.batch_size * config.model.max_length
    plain = 2.0 * args.product**3 / medians["product"]
    peak = peak_flops(device.device_kind)
    table: dict[str, dict[str, float | None]] = {}
    for name, one in models.items():
        rate = tokens / medians[name] / jax.device_count()  # of one device
        own = flops.training_flops_per_token(one.model).total * rate
        as_ar = flops.ar_training_flops_per_token(one.model) * rate
        table[name] = {
            "tokens_per_second": rate * jax.device_count(),
            "step_seconds": medians[name],
            "mfu": own / peak if peak else None,
            "ar_mfu": as_ar / peak if peak else None,
            "of_product": own / plain,
            "memory_bytes": memory[name],
        }
    result = machine(False) | {
        "config": args.config,
        "overrides": overrides,
        "rows": args.rows,
        "length": config.model.max_length,
        "dtype": np.dtype(dtype).name,
        "attention": placement.for_training(config, sharding.make_mesh(config.mesh)).config.model.attention,
        "product_flops_per_second": plain,
        "models": table,
        "step_ratio_armd_ar": statistics.median(a / b for a, b in zip(seconds["ARMD"], seconds["AR"], strict=True)),
    }
    if args.json:
        print_json(result)
        return
    print_versions(machine(False))
    print(f"{args.config}, {args.rows} rows of {result['length']}, {result['dtype']}, {result['attention']} attention")
    print(f"medians over {args.turns} turns; a product of {args.product}²: {plain / 1e12:,.2f} TFLOP/s\n")
    print(f"{'':6} {'tokens/s':>11} {'step ms':>9} {'MFU':>7} {'AR MFU':>7} {'of a product':>13} {'GiB':>7}")
    for name, row in table.items():
        mfu, ar_mfu = ("unknown" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "ar_mfu"))
        print(
            f"{name:6} {row['tokens_per_second']:>11,.0f} {row['step_seconds'] * 1e3:>9,.1f} {mfu:>7} {ar_mfu:>7}"
            f" {row['of_product']:>13.1%} {row['memory_bytes'] / 2**30:>7.2f}"
        )
    print(f"\ntime of a step, ARMD/AR: {result['step_ratio_armd_ar']:.3f}")


if __name__ == "__main__":
    main()

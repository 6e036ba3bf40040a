"""Attention of a two-stream layer: dense, chunked, splash on TPU, flash on GPU; both streams in one call against two.

    python experiments/benchmarks/attention.py [--lengths 256 1024] [--turns 9] [--json]

Rows of X (causal) and of G (strictly causal) attend to the keys and values of X, in the natural order. A case computes
the value and the gradients of queries, keys and values. The cases take turns, and times and ratios are medians over the
turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from armd_jax.training import host_memory

if host_memory.trains_on_cpu():
    host_memory.keep_freed_memory()  # before JAX is imported, as in `armd train`

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, median_ratio, print_json, print_versions

from armd_jax.core import block_mask, order
from armd_jax.core.kernels import flash, splash
from armd_jax.core.kernels.attention import attention

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def implementations(length: int, chunk: int, with_dense: bool) -> dict[str, Attention]:
    """Ways to compute the attention of both streams over the same keys, by name."""

    def in_two(q_BQHK, k_BTHK, v_BTHK, len_BQ):
        halves = zip(jnp.split(q_BQHK, 2, axis=1), jnp.split(len_BQ, 2, axis=1), strict=True)
        return jnp.concatenate([attention(q, k_BTHK, v_BTHK, lens, "chunked", chunk) for q, lens in halves], axis=1)

    found: dict[str, Attention] = {}
    if with_dense:
        found["dense"] = lambda *a: attention(*a, "dense")
    found["chunked"] = lambda *a: attention(*a, "chunked", chunk)
    found["chunked, two calls"] = in_two
    if jax.default_backend() == "tpu" and length % 128 == 0:
        found["splash"] = lambda *a: splash.attention(*a, "two_stream", patterns=(1,))
    if jax.default_backend() == "gpu":
        found["flash"] = flash.attention
    return found


def case(run: Attention, inputs: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """Value and gradients of one call, finished when it returns."""
    function = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(run(*a).astype(jnp.float32) ** 2), argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(function(*inputs))


def measure(args: argparse.Namespace, length: int) -> dict[str, list[float]]:
    """Seconds of every turn of every implementation."""
    rng = np.random.default_rng(0)
    shapes = [(args.batch, rows, args.heads, args.head_width) for rows in (2 * length, length, length)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), args.dtype) for shape in shapes)
    mask = block_mask.build(order.left_to_right(args.batch, length))
    inputs = (q, k, v, jnp.concatenate([mask.x_len_BN, mask.strict_len_BN], axis=1))
    dense_bytes = args.batch * args.heads * 2 * length * length * 4
    cases = {
        name: case(run, inputs)
        for name, run in implementations(length, args.chunk, dense_bytes <= args.dense_gib * 2**30).items()
    }
    for run in cases.values():
        run()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.turns):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024])
    for name, default in {"batch": 4, "heads": 8, "head-width": 32, "chunk": 128, "turns": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dense-gib", type=float, default=2.0, help="leave dense out if its scores are larger")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    if min(*args.lengths, args.batch, args.heads, args.head_width, args.chunk, args.turns) < 1:
        sys.exit("error: sizes and turns must be at least 1")

    facts = machine(hugging_face=False)
    rows = []
    for length in args.lengths:
        seconds = measure(args, length)
        rows += [
            {
                "length": length,
                "implementation": name,
                "milliseconds": 1e3 * statistics.median(values),
                "time_to_chunked": median_ratio(values, seconds["chunked"]),
            }
            for name, values in seconds.items()
        ]
    if args.json:
        print_json(facts | {"results": rows})
        return
    print_versions(facts)
    print(f"batch {args.batch}, {args.heads} heads of {args.head_width}, {args.dtype}, chunks of {args.chunk}\n")
    print(f"{'length':>6}  {'':20} {'ms':>9} {'x chunked':>10}")
    for row in rows:
        name = f"{row['length']:>6}  {row['implementation']:20}"
        print(f"{name} {row['milliseconds']:>9.1f} {row['time_to_chunked']:>10.2f}")


if __name__ == "__main__":
    main()

"""Training speed: one ARMD step against one AR step of the same size, and a Hugging Face GPT-2's.

    python experiments/benchmarks/train_step.py [--batch 16] [--pairs 9] [--json]

A step is loss, gradients and AdamW with the state donated; the forward and backward pass alone are timed beside it. The
models take turns, and ratios are medians over the pairs. GPT-2 trains with torch's AdamW; the faster of eager and sdpa
attention counts. Freed memory stays with the process, as in `armd train`.
"""

import argparse
import statistics
import sys
from typing import Any

from armd_jax.core import parameters
from armd_jax.training import host_memory

if host_memory.trains_on_cpu():
    host_memory.keep_freed_memory()  # before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Case, add_size_flags, gpt2, has_hugging_face, machine, median_ratio, model_configs, print_json, timed
from common import print_machine as print_header

from armd_jax.config import ModelConfig
from armd_jax.core import objective, order
from armd_jax.core.flops import training_flops_per_token
from armd_jax.core.network import Params
from armd_jax.core.order import Order

State = tuple[Params, optax.OptState]


def jax_cases(config: ModelConfig, batch: int) -> tuple[Case, Case]:
    """A whole training step, and loss with gradients alone, on random tokens in the natural order.

    Tokens and order are arguments as in training, so that nothing about them is folded into the program.
    """
    shape = (batch, config.max_length)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape), jnp.int32)
    drawn = order.left_to_right(*shape)
    tx = optax.adamw(3e-4)

    def loss(params: Params, tokens: jax.Array, drawn: Order) -> jax.Array:
        sums = objective.loss_sums(params, config, tokens, drawn)
        return sums.weighted_nll / sums.weight

    def update(state: State, tokens: jax.Array, drawn: Order) -> State:
        params, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss)(params, tokens, drawn), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    gradients = jax.jit(jax.value_and_grad(loss))
    step = jax.jit(update, donate_argnums=0)
    params = jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), config)
    state = (jax.tree.map(jnp.copy, params), tx.init(params))

    def train() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, tokens, drawn))

    return train, lambda: jax.block_until_ready(gradients(params, tokens, drawn))


def hf_case(args: argparse.Namespace, attention: str) -> Case:
    """One training step of a GPT-2 of the same size."""
    import torch

    model = gpt2(args, attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    tokens = torch.randint(0, args.vocab, (args.batch, args.length), device=model.device)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return train


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size_flags(parser)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=9, help="turns per model")
    parser.add_argument("--hf-turns", type=int, default=3, help="turns of GPT-2")
    args = parser.parse_args()
    if args.batch < 1 or args.pairs < 1 or args.hf_turns < 1:
        sys.exit("error: --batch, --pairs and --hf-turns must be at least 1")
    args.hf = has_hugging_face() and not args.no_hf
    configs = model_configs(args)

    cases: dict[str, Case] = {}
    for name, config in configs.items():
        cases[name], cases[f"{name} forward+backward"] = jax_cases(config, args.batch)
    hf = {attention: hf_case(args, attention) for attention in ("eager", "sdpa")} if args.hf else {}
    for case in (*cases.values(), *hf.values()):
        case()  # compiles, or warms up
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.pairs):
        for name, case in cases.items():
            seconds[name].append(timed(case))
    hf_seconds = {name: [timed(case) for _ in range(args.hf_turns)] for name, case in hf.items()}

    tokens = args.batch * args.length
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = machine(args.hf) | {
        "step_ratio_armd_ar": median_ratio(seconds["ARMD"], seconds["AR"]),
        "forward_backward_ratio_armd_ar": median_ratio(
            seconds["ARMD forward+backward"], seconds["AR forward+backward"]
        ),
        "flop_ratio_armd_ar": training_flops_per_token(configs["ARMD"]).total
        / training_flops_per_token(configs["AR"]).total,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "flops_per_second": {
            name: training_flops_per_token(config).total * tokens / medians[name] for name, config in configs.items()
        },
    }
    if hf:
        best = min(hf_seconds, key=lambda name: statistics.median(hf_seconds[name]))
        result["hugging_face"] = best
        result["tokens_per_second"]["GPT-2"] = tokens / statistics.median(hf_seconds[best])
        result["speed_armd_gpt2"] = statistics.median(hf_seconds[best]) / medians["ARMD"]
        result["speed_ar_gpt2"] = statistics.median(hf_seconds[best]) / medians["AR"]
    if args.json:
        print_json(result)
        return
    print_header(machine(args.hf), args)
    print(f"batch {args.batch}, medians over {args.pairs} turns\n")
    print(f"{'':26} {'tokens/s':>9} {'model GFLOP/s':>14}")
    for name, rate in result["tokens_per_second"].items():
        flops = result["flops_per_second"].get(name)
        print(f"{name:26} {rate:>9,.0f} {'' if flops is None else f'{flops / 1e9:,.1f}':>14}")
    print(f"\ntime of a step, ARMD/AR:        {result['step_ratio_armd_ar']:.3f}")
    print(f"forward+backward alone:         {result['forward_backward_ratio_armd_ar']:.3f}")
    print(f"analytic FLOPs, ARMD/AR:        {result['flop_ratio_armd_ar']:.3f}")
    if hf:
        print(f"speed against GPT-2 ({result['hugging_face']}):   ARMD x{result['speed_armd_gpt2']:.2f},", end=" ")
        print(f"AR x{result['speed_ar_gpt2']:.2f}")


if __name__ == "__main__":
    main()

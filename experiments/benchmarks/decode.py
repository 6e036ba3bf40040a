"""Decoding speed: ARMD in S streams, AR through the same cached sampler, and a Hugging Face GPT-2 of the same size.

    python experiments/benchmarks/decode.py [--batches 1 8] [--streams 1 2 4 8] [--json]

Every case generates whole rows without a prompt, through the public `LanguageModel.generate`. The cases take turns, JAX
first in each turn, and times are medians over the turns. Compilation is not timed. GPT-2 has random weights and samples
with its KV cache, in float32, under no_grad and on all cores; of eager and sdpa attention, each with a minimal loop and
with `generate`, the fastest counts.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
from common import add_size_flags, gpt2, has_hugging_face, machine, median_ratio, model_configs, print_json
from common import print_machine as print_header

from armd_jax.core.flops import decoding_flops_per_token
from armd_jax.inference.language_model import LanguageModel

Case = Callable[[int], int]  # seed -> network calls made


def jax_case(model: LanguageModel, batch: int, streams: int) -> Case:
    """Generates one batch of full rows; `generate` returns numpy arrays, so the device has finished."""
    return lambda seed: model.generate(batch=batch, streams=streams, seed=seed).num_calls


def hf_loop(model: Any, batch: int, length: int) -> Case:
    """A minimal loop that samples `length` tokens after one start token from a GPT-2 with its cache."""
    import torch

    @torch.no_grad()
    def run(seed: int) -> int:
        torch.manual_seed(seed)
        token, cache = torch.zeros((batch, 1), dtype=torch.long, device=model.device), None
        for _ in range(length):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = torch.multinomial(torch.softmax(out.logits[:, -1].float(), dim=-1), 1)
        token.cpu()
        return length

    return run


def hf_generate(model: Any, batch: int, length: int) -> Case:
    """The same through the `generate` of transformers."""
    import torch

    @torch.no_grad()
    def run(seed: int) -> int:
        torch.manual_seed(seed)
        start = torch.zeros((batch, 1), dtype=torch.long, device=model.device)
        mask = torch.ones_like(start)
        out = model.generate(
            start, attention_mask=mask, max_new_tokens=length, do_sample=True, top_k=0, use_cache=True
        ).cpu()
        return out.shape[1] - 1

    return run


def fastest_hf(args: argparse.Namespace, batch: int) -> tuple[str, Case]:
    """The fastest of the four ways to sample from GPT-2, by two warm runs each."""
    best: tuple[float, str, Case] | None = None
    for attention in ("eager", "sdpa"):
        model = gpt2(args, attention).eval()
        if args.dtype == "bfloat16":
            model = model.bfloat16()
        for name, make in (("loop", hf_loop), ("generate", hf_generate)):
            run = make(model, batch, args.length)
            run(0)
            seconds = min(timed(run, seed)[0] for seed in (1, 2))
            if best is None or seconds < best[0]:
                best = (seconds, f"{attention}, {name}", run)
    assert best is not None
    return best[1], best[2]


def timed(run: Case, seed: int) -> tuple[float, int]:
    """Seconds of one run, and its network calls."""
    start = time.perf_counter()
    calls = run(seed)
    return time.perf_counter() - start, calls


def measure(args: argparse.Namespace, models: dict[str, LanguageModel], batch: int) -> dict[str, Any]:
    """All cases at one batch size, which take turns: seconds, tokens per second, network calls and ratios."""
    cases: dict[str, Case] = {"AR": jax_case(models["AR"], batch, 1)}
    for streams in args.streams:
        cases[f"ARMD S={streams}"] = jax_case(models["ARMD"], batch, streams)
    variant = None
    if args.hf:
        variant, cases["HF GPT-2"] = fastest_hf(args, batch)
    calls = {name: run(0) for name, run in cases.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(args.repeats):
        for name, run in cases.items():
            seconds[name].append(timed(run, repeat + 1)[0])
    tokens = batch * args.length
    rows = {}
    for name, times in seconds.items():
        rows[name] = {
            "seconds": statistics.median(times),
            "tokens_per_second": tokens / statistics.median(times),
            "network_calls": calls[name],
        }
        for other, short in (("ARMD S=1", "s1"), ("AR", "ar"), ("HF GPT-2", "hf")):
            if other in seconds:
                rows[name][f"speed_over_{short}"] = median_ratio(seconds[other], times)
    return {"batch": batch, "hf_variant": variant, "rows": rows}


def print_table(result: dict[str, Any], flop_ratio: float) -> None:
    """One table per batch size; ratios are of tokens per second."""
    variant = f" (HF GPT-2: {result['hf_variant']})" if result["hf_variant"] else ""
    print(
        f"\nbatch {result['batch']}{variant}\n{'':10} {'tokens/s':>9} {'calls':>6} {'x S=1':>6} {'x AR':>6} {'x HF':>6}"
    )
    for name, row in result["rows"].items():
        ratios = (row.get(f"speed_over_{other}") for other in ("s1", "ar", "hf"))
        cells = " ".join(f"{'-' if ratio is None else format(ratio, '.2f'):>6}" for ratio in ratios)
        print(f"{name:10} {row['tokens_per_second']:>9.0f} {row['network_calls']:>6} {cells}")
    print(f"analytic FLOPs per token, ARMD/AR: {flop_ratio:.3f} (by FLOPs alone {1 / flop_ratio:.2f} x AR's rate)")


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_flags(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    args.hf = has_hugging_face() and not args.no_hf
    warnings.filterwarnings("ignore", module="torch|transformers")
    configs = model_configs(args)
    models = {name: LanguageModel.create(config) for name, config in configs.items()}
    flops = {name: decoding_flops_per_token(config) for name, config in configs.items()}
    flop_ratio = flops["ARMD"].total / flops["AR"].total
    results = []
    if args.hf:
        gpt2(args, "eager")  # sets torch's threads before they are reported
    facts = machine(args.hf)
    if not args.json:
        print_header(facts, args)
    for batch in args.batches:
        results.append(measure(args, models, batch))
        if not args.json:
            print_table(results[-1], flop_ratio)
        jax.clear_caches()
    if args.json:
        print_json(
            facts
            | {
                "flops_per_token": {name: value.total for name, value in flops.items()},
                "flop_ratio": flop_ratio,
                "decode": results,
            }
        )


if __name__ == "__main__":
    main()

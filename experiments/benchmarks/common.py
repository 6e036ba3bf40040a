"""Parts that the benchmarks share: model sizes, facts about the machine, the Hugging Face GPT-2 to compare with."""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

from armd_jax.config import ModelConfig, check_model
from armd_jax.errors import UserError

Case = Callable[[], Any]  # what is timed, finished when it returns
SIZE_FLAGS = {"layers": 8, "two-stream": 4, "width": 256, "heads": 8, "length": 256, "vocab": 4096}


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for the size of the models."""
    for name, default in SIZE_FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of activations")
    parser.add_argument("--attention", default="auto", choices=("auto", "dense", "chunked"))
    parser.add_argument("--no-hf", action="store_true", help="leave out the Hugging Face GPT-2")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def model_configs(args: argparse.Namespace) -> dict[str, ModelConfig]:
    """ARMD with the size of the flags, and the autoregressive model of that size, a config of the same network."""
    armd = ModelConfig(
        vocab_size=args.vocab,
        max_length=args.length,
        num_layers=args.layers,
        two_stream_layers=args.two_stream,
        width=args.width,
        num_heads=args.heads,
        dtype=args.dtype,
        attention=args.attention,
    )
    ar = ModelConfig(**{**vars(armd), "two_stream_layers": 0, "aggregator": "shift"})
    for config in (armd, ar):
        try:
            check_model(config)
        except UserError as error:
            sys.exit(f"error: {error}")
    return {"ARMD": armd, "AR": ar}


def has_hugging_face() -> bool:
    """Whether torch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def gpt2(args: argparse.Namespace, attention: str) -> Any:
    """A Hugging Face GPT-2 of the flags' size with random weights and no dropout, on the GPU if there is one."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=args.layers,
        n_embd=args.width,
        n_head=args.heads,
        n_positions=args.length,
        vocab_size=args.vocab,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config).to("cuda" if torch.cuda.is_available() else "cpu")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(hugging_face: bool) -> dict[str, Any]:
    """Hardware, threads and versions."""
    names = ("jax", "jaxlib", "flax", "optax") + (("torch", "transformers") if hugging_face else ())
    device = jax.devices()[0]
    facts: dict[str, Any] = {
        "machine": f"{num_cores()}-core {platform.machine()}",
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "threads": {"jax": num_cores() if device.platform == "cpu" else None},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in names},
    }
    if hugging_face:
        import torch

        facts["threads"]["torch"] = torch.get_num_threads()
        facts["torch_device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return facts


def print_versions(facts: dict[str, Any]) -> None:
    """The facts of `machine` as text."""
    torch = f", torch on {facts['torch_device']}" if "torch_device" in facts else ""
    print(f"{facts['machine']}, {facts['device']}{torch}")
    print("threads: " + ", ".join(f"{name} {count}" for name, count in facts["threads"].items() if count))
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))


def print_machine(facts: dict[str, Any], args: argparse.Namespace) -> None:
    """The facts of `machine` and the model's size, as text."""
    print_versions(facts)
    print(
        f"{args.layers} layers (ARMD: {args.two_stream} two-stream), width {args.width}, {args.heads} heads,"
        f" length {args.length}, vocabulary {args.vocab}, {args.dtype}"
    )
    if not args.hf:
        reason = "--no-hf" if args.no_hf else "torch or transformers is not installed"
        print(f"Hugging Face GPT-2 left out: {reason}")


def timed(case: Case) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios of pairs that were timed side by side, so that drifts of a shared machine cancel."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def print_json(value: dict[str, Any]) -> None:
    """The result as one JSON object."""
    print(json.dumps(value, indent=2))

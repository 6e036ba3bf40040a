"""`armd serve`: a page on which texts appear call by call, and an OpenAI-compatible API."""

import argparse
from collections.abc import Sequence

from armd_jax.cli.arguments import add_run, show
from armd_jax.errors import UserError

HELP = "Serve a page on which texts appear call by call, and an OpenAI-compatible API."
IF_MEMORY_RUNS_OUT = "lower --max-batch"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_run(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free, which is printed")
    parser.add_argument("--max-batch", type=int, default=8, help="texts that are written together")
    parser.add_argument("--max-queue", type=int, default=128, help="texts that may wait; more are refused (503)")
    parser.add_argument("--max-choices", type=int, default=32, help="texts per request, at most --max-queue")
    parser.add_argument(
        "--max-tokens", type=int, default=None, help="tokens drawn for a text; default: the model's max_length"
    )
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that requests have when the server is ended")
    parser.add_argument(
        "--no-warm-up", action="store_true", help="compile no program ahead: first requests wait for the compiler"
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prints the address, and serves until SIGTERM or SIGINT."""
    del overrides
    for flag, number in (
        ("--max-batch", args.max_batch),
        ("--max-queue", args.max_queue),
        ("--max-choices", args.max_choices),
        ("--max-tokens", args.max_tokens),
    ):
        if number is not None and number < 1:
            raise UserError(f"{flag}={number}: must be at least 1")
    if not 0 <= args.grace < float("inf"):
        raise UserError(f"--grace={args.grace}: must be at least 0 seconds")
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"armd serve needs {error.name}, which is in an extra: pip install -e '.[serve]'") from error

    from armd_jax.interop.load import load
    from armd_jax.serving import server, warm_up
    from armd_jax.serving.api import Limits
    from armd_jax.serving.batching import Batcher
    from armd_jax.training import sharding

    with server.listen(args.host, args.port) as listener:  # before the model is loaded, which takes longer
        lm = load(args.run, not args.no_ema, args.mesh and sharding.make_mesh(args.mesh))
        if not lm.config.has_orders:
            raise UserError(f"--run={args.run}: a denoiser (model.kind) is not served; armd sample writes its texts")
        if lm.tokenizer is None:
            raise UserError(f"--run={args.run}: has no tokenizer, and what is served are texts")
        batcher = Batcher(lm, args.max_batch, args.max_queue)
        if not args.no_warm_up:
            warm_up.compile_usual(lm, batcher, args.max_batch, progress=not args.json)
        limits = Limits(choices=args.max_choices, max_tokens=args.max_tokens or lm.config.max_length)
        model, address = args.run.resolve().name, server.url(listener)
        served = server.Server(lm, model, batcher, limits, server.hosts(listener, args.host), args.grace)
        show(args, {"url": address, "model": model}, f"{model} is served at {address} (Ctrl-C ends it)")
        served.run_until_signal(listener)
    return 0

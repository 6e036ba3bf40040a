"""`armd sample`: draw samples in one or several parallel streams, or from a denoiser, and time it."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, Literal

from armd_jax import files, typed
from armd_jax.cli.arguments import (
    add_out,
    add_run,
    check_out,
    check_seed,
    file,
    show,
    show_and_keep,
    whole_numbers,
)
from armd_jax.errors import UserError
from armd_jax.names import DecodingMode, DenoisingSampler

HELP = "Draw samples in one or several parallel streams, or from a denoiser, and time it."
IF_MEMORY_RUNS_OUT = "lower --batch, --length or --streams"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_run(parser)
    parser.add_argument(
        "--streams",
        default=None,
        help="one or more numbers of streams, such as 1,2,4,8; default: 1. With --mode=lossless also auto: the fastest",
    )
    parser.add_argument(
        "--mode",
        default="strided",
        choices=typed.choices(DecodingMode),
        help="S streams side by side (the default); left to right with S - 1 drafted tokens, which changes no"
        " probability; or up to S places at a time that the model is sure of",
    )
    parser.add_argument(
        "--max-entropy",
        type=float,
        default=1.0,
        help="nats up to which --mode=confident is sure of a place; default: 1",
    )
    parser.add_argument(
        "--sampler",
        default=None,
        choices=typed.choices(DenoisingSampler),
        help="of a denoiser: one token per call in a random order (the default), the steps of the diffusion, or the"
        " most confident tokens first",
    )
    parser.add_argument(
        "--steps",
        default=None,
        help="of a denoiser with another sampler than first_hitting: one or more numbers of steps, such as 32,64;"
        " default: one per token",
    )
    parser.add_argument("--batch", type=int, default=1, help="samples per number of streams or of steps")
    parser.add_argument("--length", type=int, default=None, help="tokens; default: the model's max_length")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=None, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=None, help="draw from the nucleus of this probability only")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="instead of a length: tokens after the prompt")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--suffix", default="", help="text to end with; what lies between is filled in")
    parser.add_argument(
        "--ignore-end", action="store_true", help="draw and show what comes behind an end-of-text token as well"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=None,
        metavar="TEXT",
        help="a text that ends what is written; may be given several times",
    )
    parser.add_argument(
        "--end-bias",
        type=float,
        default=0.0,
        help="added to the logit of end-of-text in all streams but the last; -inf: they never end a text",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--prompts",
        type=file,
        default=None,
        metavar="FILE.jsonl",
        help='a file of prompts, one object per line: {"prompt": "…"}, or {"text": "The [[5]] sat."} with gaps. A text'
        " for each is appended to --out=FILE.jsonl, and the same command continues if it was interrupted",
    )
    add_out(parser, "samples.json", "; with --prompts, the file to append to")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Draws the samples, prints them, and keeps them in the run if it can be written."""
    del overrides
    if args.prompts is not None:
        return _complete(args)
    check_out(args)
    if args.length is not None and args.max_new_tokens is not None:
        raise UserError("--length and --max-new-tokens: give one of the two")
    streams: Sequence[int | Literal["auto"]] | None = None
    if args.streams is not None:  # lm.generate refuses auto in modes that have no such choice
        streams = ["auto"] if args.streams == "auto" else whole_numbers(args.streams, "--streams")
    steps = [] if args.steps is None else whole_numbers(args.steps, "--steps")
    for flag, text in (("--prompt", args.prompt), ("--suffix", args.suffix)):
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise UserError(f"{flag}={text!r}: is not UTF-8 text")

    from armd_jax.evaluation import results, samples
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    lm = load(args.run, not args.no_ema, args.mesh and sharding.make_mesh(args.mesh))
    drawn = samples.draw(
        lm,
        ([1] if lm.config.has_orders else []) if streams is None else streams,
        batch=args.batch,
        length=lm.config.max_length if args.length is None else args.length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        prompt=args.prompt,
        suffix=args.suffix,
        seed=args.seed,
        sampler=args.sampler,
        steps=steps,
        max_new_tokens=args.max_new_tokens,
        mode=args.mode,
        **_how(args),
    )
    return show_and_keep(args, drawn, samples.as_text(drawn), args.run, results.SAMPLES_FILE)


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """What both ways of sampling are told alike. Raises UserError if a stop text is none."""
    if any(re.search("[\ud800-\udfff]", text) for text in args.stop or ()):
        raise UserError(f"--stop={args.stop!r}: is not UTF-8 text")
    return {
        "stop_at_end": not args.ignore_end,
        "max_entropy": args.max_entropy,
        "end_bias": args.end_bias,
        "stop": tuple(args.stop or ()),
    }


def _complete(args: argparse.Namespace) -> int:
    """Writes a text for every prompt of a file."""
    for flag, given in (
        ("--prompt", args.prompt),
        ("--suffix", args.suffix),
        ("--sampler", args.sampler),
        ("--steps", args.steps),
        ("--length", args.length),
    ):
        if given:
            raise UserError(
                f"{flag} does not go together with --prompts; its lines and --max-new-tokens say what to write"
            )
    if args.out is None:
        raise UserError("--prompts needs --out=FILE.jsonl, the file to write the texts into")
    if args.out.is_dir():
        raise UserError(f"--out={args.out}: is a folder; with --prompts it has to be a file")
    if reason := files.unwritable(args.out.parent):
        raise UserError(f"--out={args.out}: {reason}")
    check_seed(args.seed)
    if args.max_new_tokens is not None and args.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens={args.max_new_tokens}: must be at least 0")
    streams = [1] if args.streams is None else whole_numbers(args.streams, "--streams")
    if len(streams) > 1:
        raise UserError(f"--streams={args.streams}: with --prompts, give one number of streams")

    from armd_jax.evaluation import completions
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    lm = load(args.run, not args.no_ema, args.mesh and sharding.make_mesh(args.mesh))
    settings = completions.Settings(
        streams=streams[0],
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        mode=args.mode,
        **_how(args),
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    summary = completions.complete(lm, args.prompts, args.out, settings, args.batch, progress=not args.json)
    return show(args, summary, completions.as_text(summary, args.out))

"""The part of `armd eval` that judges texts which the model writes: `--judge` and the arguments that belong to it."""

import argparse
import math
import sys
import typing
from typing import Any

from armd_jax import config as configs
from armd_jax import typed
from armd_jax.cli.arguments import check_seed, folder, show, source, whole_numbers
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.names import DecodingMode, DenoisingSampler, Reset

_STREAMS, _TEMPERATURES, _SAMPLES = "1,2,4", "0.7,0.8,0.9,1.0", 64
_ENOUGH = 1000  # texts for MAUVE
# Arguments that belong to `--judge`.
OWN = ("samples", "length", "temperatures", "modes", "samplers", "steps", "top_p", "reference")


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    group = parser.add_argument_group("texts that the model writes, in place of held-out text")
    add = group.add_argument
    add(
        "--judge",
        default=None,
        type=folder,
        metavar="DIR",
        help="the model that scores them: a run, an export, or a causal language model as a Hugging Face folder or a"
        " .gguf file. It runs on one device, whatever --mesh is. Finished settings are kept in generation.json and not"
        " drawn again",
    )
    add("--samples", type=int, default=None, help=f"texts of each setting; default: {_SAMPLES}")
    add("--length", type=int, default=None, help="tokens of each text; default: the model's max_length")
    add("--temperatures", default=None, help=f"default: {_TEMPERATURES}")
    add(
        "--modes",
        default=None,
        help="modes of decoding (see armd sample --mode; confident with its default --max-entropy), each with all"
        " --streams",
    )
    add("--samplers", default=None, help="of a denoiser, see armd sample --sampler")
    add(
        "--steps",
        default=None,
        help="of a denoiser: one or more numbers of steps, for other samplers than first_hitting",
    )
    add("--top-p", type=float, default=None, help="draw from the nucleus of this probability only")
    add(
        "--reference",
        default=None,
        type=source,
        help="real text to compare with: train, valid, test, or other text as for --data; default: the run's own"
        " held-out text, if it is there",
    )


def run(args: argparse.Namespace) -> int:
    """Draws texts, lets the judge score them, prints the figures and keeps them in the run."""
    check_seed(args.seed)
    samples = _SAMPLES if args.samples is None else args.samples
    if samples < 1 or args.batch < 1:
        raise UserError("--samples and --batch must be at least 1")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p={args.top_p}: must be in (0, 1]")
    temperatures = _numbers(args.temperatures or _TEMPERATURES)
    config = configs.read(args.run)
    length = config.model.max_length if args.length is None else args.length
    if not 1 <= length <= config.model.max_length:
        raise UserError(f"--length={length}: must be in 1 .. {config.model.max_length}, the model's max_length")

    from armd_jax.evaluation import generative, generative_opening, generative_reference, generative_results
    from armd_jax.interop.load import load
    from armd_jax.training import sharding

    if config.model.has_orders:
        _refuse(args, ("samplers", "steps"), "a denoiser (model.kind); choose --streams and --modes instead")
        modes = _names(args.modes or "strided", DecodingMode, "--modes")
        ways = generative.ways_of_armd(modes, _streams(args, config, length), length)
    else:
        _refuse(args, ("streams", "modes"), "an ARMD; choose --samplers and --steps instead")
        samplers = _names(args.samplers or "first_hitting", DenoisingSampler, "--samplers")
        steps = [] if args.steps is None else list(dict.fromkeys(whole_numbers(args.steps, "--steps")))
        ways = generative.ways_of_denoiser(samplers, steps, length)
    record = generative_results.Record.open(args.run if args.out is None else args.out, promised=args.out is not None)
    rows = args.run if args.out is None else args.out
    real = generative_reference.find(args.run, config, args.reference, rows, length, samples)
    lm = load(args.run, not args.no_ema, args.mesh and sharding.make_mesh(args.mesh))
    judge = generative_opening.open_judge(args.judge, args.batch)
    found = generative.evaluate(
        lm,
        judge,
        ways,
        temperatures,
        samples=samples,
        length=length,
        batch=args.batch,
        seed=args.seed,
        top_p=args.top_p,
        real=real,
        known=record.entries,
        keep=record.add,
        progress=not args.json,
    )
    compared = any(entry.mauve_text for entry in found)
    notes = _notes(config.data.reset, None if real is None else min(samples, len(real.rows)), compared)
    text = generative_results.as_text(found, "\n".join(notes))
    code = show(args, record.content, text)
    if record.unwritten:
        file = record.folder / generative_results.GENERATION_FILE
        print(f"{file} was not written ({record.unwritten}); --out=FOLDER keeps it elsewhere", file=sys.stderr)
    return code


def _notes(reset: Reset, texts: int | None, compared: bool) -> list[str]:
    """What a reader of the tables has to know.

    reset: `data.reset` of the model that wrote. texts: how many MAUVE has of generated or of real text, whichever is
    less; None: there is no real text. compared: whether MAUVE was computed.
    """
    notes = []
    match reset:
        case "none":
            pass
        case "document":
            notes.append(
                "The model was trained with data.reset=document: it never saw a token behind an end-of-text, and here"
                " it writes on behind one with all of the text before it in view."
            )
        case _:
            typing.assert_never(reset)
    if texts is None:
        notes.append("No real text to compare with was found; --reference names some.")
    elif not compared:
        notes.append("MAUVE is not installed (an extra, under the GPL): pip install -e '.[mauve]'")
    elif texts < _ENOUGH:
        notes.append(f"MAUVE is made for thousands of texts; from {texts:,} it says little.")
    return notes


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",") if word]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise UserError(f"--temperatures={text!r}: expected numbers from 0 such as 0.8,1.0")
    return list(dict.fromkeys(numbers))


def _names(text: str, literal: object, flag: str) -> list[Any]:
    """The names of a list such as `strided,lossless`. Raises UserError if one is none of the `Literal`'s."""
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names:
        raise UserError(f"{flag}={text!r}: expected names such as {','.join(typed.choices(literal))}")
    for name in names:
        typed.check_choice(literal, name, flag)
    return names


def _refuse(args: argparse.Namespace, names: tuple[str, ...], whose: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name}={getattr(args, name)}: belongs to {whose}")


def _streams(args: argparse.Namespace, config: Config, length: int) -> list[int]:
    """The numbers of streams that are asked for; by default those that the model has learned."""
    fitting = ",".join(number for number in _STREAMS.split(",") if int(number) <= length)
    return list(dict.fromkeys(whole_numbers(args.streams or (_learned(config) and fitting) or "1", "--streams")))


def _learned(config: Config) -> bool:
    """Whether a model has seen other orders than left to right, so that several streams make sense."""
    order = config.order
    match order.kind:
        case "left_to_right":
            return bool(order.sbp_steps or order.mix)
        case "progressive" | "uniform" | "strided" | "masked_diffusion" | "contiguous":
            return True
        case _:
            typing.assert_never(order.kind)

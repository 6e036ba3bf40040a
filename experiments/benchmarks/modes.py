"""Modes of decoding: how many network calls each of them takes, how fast it is, and how good its texts are.

First train a model that has seen contiguous blocks, which lossless decoding drafts in, and an autoregressive (AR) judge
on the same text:

    armd train --config=experiments/quickstart.py --workdir=runs/mix --config.order.mix=contiguous:0.3
    armd train --config=experiments/quickstart.py --workdir=runs/judge --config.order.kind=left_to_right \\
        --config.order.sbp_steps=0 --config.model.two_stream_layers=0 --config.model.aggregator=shift
    python experiments/benchmarks/modes.py --run=runs/mix --judge=runs/judge --results=runs/modes.json
    python experiments/pictures/modes.py runs/modes.json

Every mode writes `--texts` whole texts without a prompt for each number of streams S, text i with seed `--seed` + i.
Calls per token are those that a text needs by itself: in a batch, the slowest text decides when the last call is made.
The generative perplexity is that of all texts under the judge, left to right. It is low for dull texts too; therefore
the entropy of the frequencies of tokens in all texts stands beside it (in nats), and the share of different ones among
all pairs of neighbouring tokens. Nats per token are under the order in which the mode wrote, by the model itself.

Then come speeds. The cases take turns, a speed is the median over the turns, and ratios are medians of the ratios of
single turns to strided decoding with S = 1. Compilation is not timed. Lossless decoding is timed once more at batch 1,
where it continues the first `--prompt` tokens of the texts that S = 1 wrote, because at temperature 0 all texts without
a prompt are the same one.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import numpy as np
from common import machine, median_ratio, print_json, print_versions
from tqdm import tqdm
from trainings import commit, markdown, mean_and_error

from armd_jax.core import order as orders
from armd_jax.errors import UserError
from armd_jax.evaluation import generative_results, generative_tokens
from armd_jax.evaluation.generative_judge import OwnJudge
from armd_jax.inference.generation import Generation
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop.load import load
from armd_jax.names import DecodingMode

MODES: tuple[DecodingMode, ...] = get_args(DecodingMode)
Run = Callable[[int], Generation]  # number of a turn, -1 for the one that compiles -> what was written


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how it writes."""

    lm: LanguageModel
    mode: DecodingMode
    streams: int

    def write(
        self,
        args: argparse.Namespace,
        seeds: Sequence[int],
        temperature: float,
        prompt: Sequence[int] | None = None,
    ) -> Generation:
        """One text of `--length` tokens, prompt included, for each seed."""
        return self.lm.generate(
            len(seeds),
            args.length,
            mode=self.mode,
            streams=self.streams,
            temperature=temperature,
            seed=seeds,
            prompt=prompt,
            stop_at_end=False,
            max_entropy=args.max_entropy,
        )


# --- quality --------------------------------------------------------------------------------------------------------


def quality(case: Case, judge: OwnJudge, args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of all texts of a case, and their tokens. Standard errors are those of means over texts."""
    tokens, calls, own, difference = [], [], [], 0.0
    for start in range(0, args.texts, args.batch):
        seeds = range(args.seed + start, args.seed + min(start + args.batch, args.texts))
        made = case.write(args, seeds, args.temperature)
        assert made.log_prob_BN is not None and made.order is not None
        tokens.append(made.tokens_BN)
        calls += (made.call_BN.max(axis=1) / args.length).tolist()
        own += (-made.log_prob_BN.mean(axis=1, dtype=np.float64)).tolist()
        parallel_BN = np.asarray(case.lm.log_prob(made.tokens_BN, made.order))
        difference = max(difference, float(np.abs(parallel_BN - made.log_prob_BN).max()))
    tokens_BN = np.concatenate(tokens)
    scores = judge.score(tokens_BN.tolist(), features=False)
    perplexity, error = generative_results.perplexity_of_corpus(scores.nats_T, scores.tokens_T)
    own_nats, own_error = mean_and_error(own)
    return {
        "mode": case.mode,
        "streams": case.streams,
        "texts": len(tokens_BN),
        "calls_per_token": float(np.mean(calls)),
        "generative_perplexity": perplexity,
        "generative_perplexity_error": error,
        "entropy": generative_tokens.entropy(tokens_BN.ravel()),
        "distinct_bigrams": generative_tokens.distinct(tokens_BN, 2),
        "nats_per_token": own_nats,
        "nats_per_token_error": own_error,
        "largest_difference": difference,
    }, tokens_BN


# --- speed ----------------------------------------------------------------------------------------------------------


def take_turns(runs: Sequence[Run], turns: int, silent: bool) -> tuple[list[list[float]], list[list[Generation]]]:
    """For each of the runs the seconds of every turn, and what it wrote. They have been compiled before."""
    for run in runs:
        run(-1)
    seconds: list[list[float]] = [[] for _ in runs]
    made: list[list[Generation]] = [[] for _ in runs]
    for turn in tqdm(range(turns), "turns", disable=silent, leave=False):
        for number, run in enumerate(runs):
            begin = time.perf_counter()
            made[number].append(run(turn))
            seconds[number].append(time.perf_counter() - begin)
    return seconds, made


def speed(tokens: int, seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The median rate of runs that draw so many tokens, and the median ratio to the base's."""
    return {
        "tokens_per_second": tokens / float(np.median(seconds)),
        "speed_over_s1": median_ratio(list(base), list(seconds)),
    }


def add_speeds(rows: list[dict[str, Any]], cases: Sequence[Case], args: argparse.Namespace) -> None:
    """Completes the rows of cases, the first of which is strided decoding with S = 1, with their speed."""

    def run_of(case: Case) -> Run:
        def run(turn: int) -> Generation:
            first = args.seed + (turn + 1) * args.batch
            return case.write(args, range(first, first + args.batch), args.temperature)

        return run

    seconds, _ = take_turns([run_of(case) for case in cases], args.turns, args.json)
    for row, own in zip(rows, seconds, strict=True):
        row |= speed(args.batch * args.length, own, seconds[0])


def lossless(lm: LanguageModel, written_BN: np.ndarray, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Drafts, calls and speed of lossless decoding at batch 1, for each temperature; first strided with S = 1.

    written_BN: texts, the beginnings of which are continued.
    """
    cases = [Case(lm, "strided", 1), *(Case(lm, "lossless", streams) for streams in args.streams)]
    free, rows = args.length - args.prompt, []

    def run_of(case: Case, temperature: float) -> Run:
        def run(turn: int) -> Generation:
            prompt = written_BN[turn % len(written_BN), : args.prompt].tolist()
            return case.write(args, [args.seed + turn + 1], temperature, prompt)

        return run

    for temperature in args.temperatures:
        seconds, made = take_turns([run_of(case, temperature) for case in cases], args.turns, args.json)
        for case, own, texts in zip(cases, seconds, made, strict=True):
            drafted, accepted = sum(text.drafted for text in texts), sum(text.accepted for text in texts)
            same = [(text.tokens_BN == s1.tokens_BN).all() for text, s1 in zip(texts, made[0], strict=True)]
            row = {
                "temperature": temperature,
                "mode": case.mode,
                "streams": case.streams,
                "acceptance": accepted / drafted if drafted else None,
                "tokens_per_call": free * len(texts) / sum(text.num_calls for text in texts),
                "distinct_bigrams": generative_tokens.distinct([row for text in texts for row in text.tokens_BN], 2),
                "largest_difference": max(differences(lm, texts)),
                "same_texts": float(np.mean(same)),
            }
            rows.append(row | speed(free, own, seconds[0]))
    return rows


def differences(lm: LanguageModel, texts: Iterable[Generation]) -> list[float]:
    """By text how far the log-probability of a token is from what one pass, left to right, says at the most."""
    found = []
    for text in texts:
        assert text.log_prob_BN is not None
        pass_BN = np.asarray(lm.log_prob(text.tokens_BN, orders.left_to_right(*text.tokens_BN.shape)))
        found.append(float(np.abs(pass_BN - text.log_prob_BN).max()))
    return found


# --- the command ----------------------------------------------------------------------------------------------------


def as_markdown(result: dict[str, Any]) -> str:
    """Both tables, and what they show about likelihoods."""
    rows = [*result["modes"], result["judge"] | {"mode": "AR judge itself"}]
    header = ["mode", "S", "calls per token", "tokens/s", "× strided S = 1", "generative perplexity", "entropy"]
    cells = [
        [
            row["mode"],
            str(row["streams"]),
            f"{row['calls_per_token']:.3f}",
            *_speed_cells(row),
            f"{row['generative_perplexity']:.1f} ± {row['generative_perplexity_error']:.1f}",
            f"{row['entropy']:.3f}",
            f"{row['distinct_bigrams']:.3f}",
            f"{row['nats_per_token']:.3f} ± {row['nats_per_token_error']:.3f}",
        ]
        for row in rows
    ]
    parts = [markdown([*header, "distinct bigrams", "nats per token, own order"], cells)]
    largest = max(row["largest_difference"] for row in [*rows, *result["lossless"]])
    parts.append(
        "The log-probability of a token, as the sampler tells it, differs from that of one pass under the same order by"
        f" {largest:.1e} nats at the most."
    )
    if result["lossless"]:
        header = ["temperature", "mode", "S", "acceptance", "tokens per call", "tokens/s", "× strided S = 1"]
        cells = [
            [
                f"{row['temperature']:g}",
                row["mode"],
                str(row["streams"]),
                "" if row["acceptance"] is None else f"{row['acceptance']:.1%}",
                f"{row['tokens_per_call']:.2f}",
                *_speed_cells(row),
                f"{row['distinct_bigrams']:.3f}",
                "" if row["temperature"] else f"{row['same_texts']:.0%}",
            ]
            for row in result["lossless"]
        ]
        parts.append(markdown([*header, "distinct bigrams", "same texts as S = 1"], cells))
    return "\n\n".join(parts)


def _speed_cells(row: dict[str, Any]) -> list[str]:
    if "tokens_per_second" not in row:
        return ["", ""]
    return [f"{row['tokens_per_second']:,.0f}", f"{row['speed_over_s1']:.2f}"]


def check(args: argparse.Namespace, lm: LanguageModel, judge: LanguageModel) -> None:
    """Raises UserError if the judge cannot score what the model writes, or if a number makes no sense."""
    for path, model in ((args.run, lm), (args.judge, judge)):
        if not model.config.has_orders:
            raise UserError(f"{path}: a denoiser (model.kind) has no modes of decoding and no likelihood of a text")
    assert lm.tokenizer is not None and judge.tokenizer is not None
    if lm.tokenizer.hash != judge.tokenizer.hash:
        raise UserError(
            f"--judge={args.judge}: its tokenizer is not that of {args.run}; train both on the same text with the same"
            " config.data, or set config.data.tokenizer of one to the folder of the other's tokenizer"
        )
    longest = min(lm.config.max_length, judge.config.max_length)
    args.length = longest if args.length is None else args.length
    if not 2 <= args.length <= longest:
        raise UserError(f"--length={args.length}: must be in 2 .. {longest}, the max_length of model and judge")
    if not 1 <= args.prompt < args.length:
        raise UserError(f"--prompt={args.prompt}: must be in 1 .. {args.length - 1}, below the length")
    least = {"texts": 2, "batch": 1, "turns": 0, "seed": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name}={getattr(args, name)}: must be at least {low}")
    if min(args.streams) < 1:
        raise UserError(f"--streams={min(args.streams)}: must be at least 1")


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, texts first and speeds last."""
    lm, judging = load(args.run), load(args.judge)
    check(args, lm, judging)
    judge = OwnJudge.of(judging, str(args.judge), "armd", args.batch)
    asked = [Case(lm, mode, streams) for mode in args.modes for streams in args.streams]
    base = Case(lm, "strided", 1)
    cases = [base, *(case for case in asked if (case.mode, case.streams) != (base.mode, base.streams))]
    found = [quality(case, judge, args) for case in tqdm(cases, "texts", disable=args.json, leave=False)]
    rows, written_BN = [row for row, _ in found], found[0][1]
    reference, _ = quality(Case(judging, "strided", 1), judge, args)
    tried: list[dict[str, Any]] = []
    if args.turns:
        add_speeds(rows, cases, args)
        tried = lossless(lm, written_BN, args) if "lossless" in args.modes else []
    asked_for = {name: value for name, value in vars(args).items() if name not in ("json", "results")}
    return machine(hugging_face=False) | {
        "commit": commit(),
        "arguments": asked_for | {"run": str(args.run), "judge": str(args.judge)},
        "modes": rows,
        "judge": reference,
        "lossless": tried,
    }


def main() -> int:
    """Runs the benchmark and prints it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=pathlib.Path, required=True, help="the model: a training run or an export")
    add("--judge", type=pathlib.Path, required=True, help="another one with the same tokenizer, which scores the texts")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of streams S")
    add("--length", type=int, help="tokens of a text; default: the largest max_length that model and judge both have")
    add("--texts", type=int, default=128, help="texts of each case that are scored")
    add("--batch", type=int, default=8, help="texts that are written at once, when they are scored and when timed")
    add("--temperature", type=float, default=1.0, help="of the table of modes")
    add("--temperatures", type=float, nargs="+", default=[1.0, 0.0], help="of the table of lossless decoding")
    add("--max-entropy", type=float, default=1.0, help="of confident decoding, in nats")
    add("--prompt", type=int, default=8, help="tokens that lossless decoding continues in its own table")
    add("--turns", type=int, default=9, help="of the measurements of speed; 0: leave them out")
    add("--seed", type=int, default=0)
    add("--results", type=pathlib.Path, help="a file for the JSON object, which experiments/pictures/modes.py draws")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    try:
        if args.results:  # what cannot be written is told before, and not after, the work
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.touch()
        result = benchmark(args)
        if args.results:
            args.results.write_text(json.dumps(result, indent=2) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print_json(result)
        return 0
    print_versions(result)
    drawn = f"{args.texts} texts of {args.length} tokens, seeds from {args.seed}, temperature {args.temperature:g}"
    print(f"{drawn}; confident: at most {args.max_entropy:g} nats; batch {args.batch}, {args.turns} turns\n")
    print(as_markdown(result))
    print(f"\nCommand: `{shlex.join(['python', *sys.argv])}`. Commit {result['commit']}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

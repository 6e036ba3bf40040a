"""Trainings that benchmarks compare: one loop for every model, its learning curve, and a file of finished trainings.

Whatever is trained here gets the batches of `armd_jax.data.loader` in their order, is timed in the same way, and is
evaluated on the same held-out rows. `learning.py` and `ablations.py` make their tables from these trainings.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from common import machine
from ml_collections import ConfigDict
from tqdm import tqdm

from armd_jax import config as configs
from armd_jax import experiment_file, files, typed
from armd_jax.config import Config
from armd_jax.core import order as orders
from armd_jax.core import parameters
from armd_jax.core.order import Order
from armd_jax.data import loader
from armd_jax.data.packing import PreparedData
from armd_jax.errors import UserError
from armd_jax.evaluation import perplexity
from armd_jax.inference.language_model import LanguageModel
from armd_jax.training import placement, run_data, sharding, step
from armd_jax.training import state as states
from armd_jax.training.validation import Validation

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUARTERS = 4

# Config changes that make three models of one experiment file.
AUTOREGRESSIVE = (
    "model.two_stream_layers=0",
    "model.aggregator=shift",
    "model.residual_init=unscaled",  # with zeros, which ARMD learns faster with, it learns more slowly
    "order.kind=left_to_right",
    "order.sbp_steps=0",
)
IDENTITY_ORDER = ("order.kind=left_to_right", "order.sbp_steps=0")
CURRICULUM = ()
DENOISER = ("model.kind=denoiser", "order.sbp_steps=0")
ADAMW = ("optimizer.kind=adamw",)


# --- what is trained ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to train at several learning rates and with several seeds.

    name: for tables and progress bars. config: everything except learning rate and seed. setting: a digest of all that
    decides the result, except learning rate and seed. make: builds the learner from a config. scores: what is measured
    after training, by name; None: nothing.
    """

    name: str
    config: Config
    setting: str
    make: Callable[[Config], "Learner"]
    scores: Callable[["Learner"], dict[str, float]] | None = None


class Learner(Protocol):
    """A model in training. `num_parameters` counts what can be learned, without rows that only pad the vocabulary."""

    num_parameters: int

    def update(self, tokens_BN: np.ndarray) -> None:
        """Makes one update and returns when it is finished."""

    def held_out(self) -> float:
        """Nats per token on the validation split."""


class OurLearner:
    """A model of this package, trained with the training step of `armd train`."""

    def __init__(self, config: Config, data: PreparedData) -> None:
        self._mesh = sharding.make_mesh(config.mesh)
        self._batch_size = config.training.batch_size
        self._here = sharding.rows_here(self._mesh, self._batch_size)
        self._step = step.make_train_step(placement.for_training(config, self._mesh))
        self._validation = Validation(placement.for_evaluation(config, self._mesh), data)
        self._model = config.model
        self.state = states.create(config, self._mesh)
        self.num_parameters = parameters.count(config.model)

    def update(self, tokens_BN: np.ndarray) -> None:
        """Makes one update and returns when it is finished."""
        tokens = sharding.global_rows(self._mesh, self._batch_size, self._here, tokens_BN)
        self.state, metrics = self._step(self.state, tokens)
        jax.block_until_ready((self.state, metrics))

    def held_out(self) -> float:
        """Nats per token on the validation split, left to right, of the average of the weights if there is one."""
        return self._validation(self.state.eval_params)["eval/nll"]

    def bits_under_orders(self, data: PreparedData, split: str, streams: Sequence[int]) -> dict[str, float]:
        """Bits per byte of a split: left to right, in strided orders, and in uniformly random orders."""
        lm = LanguageModel(self._model, self.state.eval_params, data.tokenizer)
        made: dict[str, perplexity.MakeOrder] = {"left to right": _strided_order(1)}
        made |= {f"S = {count}": _strided_order(count) for count in streams if data.length % count == 0}
        made["random"] = orders.uniform
        counts = data.counts(split)
        tasks = {name: perplexity.under_order(order) for name, order in made.items()}
        nats = {name: perplexity.total_nats(lm, data, split, task) for name, task in tasks.items()}
        return {name: value / math.log(2) / counts.bytes for name, value in nats.items()}


@functools.cache  # the same function for the same number, so that its evaluation is compiled once
def _strided_order(streams: int) -> perplexity.MakeOrder:
    def make(key: jax.Array, batch: int, length: int) -> Order:
        del key
        return orders.strided(batch, length, streams)

    return make


# --- configs --------------------------------------------------------------------------------------------------------


def quickstart(smoke: bool) -> ConfigDict:
    """The quickstart's config, or its smoke form, with evaluations on the whole validation split."""
    values = experiment_file.load_config_file(f"{ROOT / 'experiments' / 'quickstart.py'}{':smoke' if smoke else ''}")
    values.training.eval_batches = 0
    return values


def as_config_dict(config: Config) -> ConfigDict:
    """The config in the form that fields can be set in."""
    return ConfigDict(dataclasses.asdict(config))


def with_vocabulary(config: Config, data: PreparedData) -> Config:
    """The config with the vocabulary size of the prepared data."""
    return run_data.with_vocabulary(config, data.tokenizer)


def scaled(values: ConfigDict, steps: int) -> ConfigDict:
    """The experiment with this many steps: warm-up and the phases of its curriculum keep their share of them."""
    values = values.copy_and_resolve_references()
    factor = steps / values.training.num_steps
    values.training.num_steps = steps
    values.optimizer.warmup_steps = round(values.optimizer.warmup_steps * factor)
    for name in ("ar_steps", "permute_steps", "sbp_steps"):
        values.order[name] = round(values.order[name] * factor)
    return values


def with_overrides(values: ConfigDict, overrides: Iterable[str]) -> Config:
    """The checked config with `section.field=value` texts applied. Raises UserError if a field or a value is wrong."""
    values = values.copy_and_resolve_references()
    for word in overrides:
        name, _, text = word.partition("=")
        experiment_file.set_field(values, name, text)
    return configs.from_config_dict(values)


def setting_of(model: str, facts: dict[str, Any], data: PreparedData) -> str:
    """A digest of what decides the result of a training, beside the learning rate and the seed."""
    text = json.dumps([model, facts, data.digest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def our_case(name: str, config: Config, data: PreparedData, streams: Sequence[int] = (), split: str = "valid") -> Case:
    """A config of this package as a case. With streams, bits per byte of the split under orders are measured too."""
    facts = dataclasses.asdict(config)
    del facts["optimizer"]["learning_rate"], facts["training"]["seed"], facts["data"]["cache_dir"]
    scores = None
    if streams:
        facts["scored"] = [split, *streams]

        def scores(learner: Learner) -> dict[str, float]:
            assert isinstance(learner, OurLearner)
            return learner.bits_under_orders(data, split, streams)

    return Case(name, config, setting_of("armd", facts, data), lambda one: OurLearner(one, data), scores)


# --- results --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation. seconds: of the training steps up to it, without compilation and evaluations. nats: per token."""

    step: int
    seconds: float
    nats: float | None  # None if it was not finite


@dataclasses.dataclass(frozen=True)
class Training:
    """A finished training.

    batches: a digest of all tokens in the order in which they were trained on. scores: see `Case`.
    """

    setting: str
    name: str
    learning_rate: float
    seed: int
    steps: int
    num_parameters: int
    curve: tuple[Point, ...]
    tokens_per_second: float  # from the median time of a step
    batches: str
    hardware: str
    commit: str
    scores: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def final(self) -> float:
        """Held-out nats per token at the end; infinite if the training diverged."""
        return self.nats_at(1.0)

    def nats_at(self, part: float) -> float:
        """Held-out nats per token when this part of the steps was done, which has to be a multiple of a quarter."""
        (found,) = (point.nats for point in self.curve if point.step == round(part * self.steps))
        return math.inf if found is None else found


class Results:
    """Finished trainings, kept in a JSON-lines file if there is one, so that an interrupted table is continued."""

    def __init__(self, path: pathlib.Path | None) -> None:
        self._path = path
        self.trainings: list[Training] = []
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.drop_partial_line(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be used as a file of results: {error}") from error
            rows = files.read_json_lines(path)
            self.trainings = [typed.build(Training, row, f"{path}:{number}") for number, row in enumerate(rows, 1)]

    def add(self, training: Training) -> None:
        """Keeps a finished training."""
        self.trainings.append(training)
        if self._path is not None:
            files.append_json_line(self._path, json.loads(typed.to_json(training)))

    def of(self, case: Case, seed: int | None = None, rate: float | None = None) -> list[Training]:
        """The finished trainings of a case, all or those with this seed and this learning rate."""
        return [
            training
            for training in self.trainings
            if training.setting == case.setting
            and (seed is None or training.seed == seed)
            and (rate is None or math.isclose(training.learning_rate, rate))
        ]

    def best_rate(self, case: Case, seed: int) -> float:
        """The learning rate with the least final held-out loss among all finished trainings of the seed."""
        return min(self.of(case, seed), key=lambda training: training.final).learning_rate

    def at_best_rate(self, case: Case, seeds: Sequence[int]) -> list[Training]:
        """One training per seed at the best rate of the first seed; none if the case has not been trained."""
        if not self.of(case, seeds[0]):
            return []
        rate = self.best_rate(case, seeds[0])
        return [found[0] for seed in seeds if (found := self.of(case, seed, rate))]


def complete(
    results: Results,
    case: Case,
    rates: Sequence[float],
    seeds: Sequence[int],
    data: PreparedData,
    evaluations: int,
    progress: bool = True,
    label: str = "",
) -> None:
    """Trains what the results lack: every rate with the first seed, then the best rate with the other seeds.

    label: stands before the name of the case in the progress bar.
    """

    def train_missing(rate: float, seed: int) -> None:
        if not results.of(case, seed, rate):
            results.add(train(case, rate, seed, data, evaluations, progress, label))

    for rate in rates:
        train_missing(rate, seeds[0])
    best = results.best_rate(case, seeds[0])
    for seed in seeds[1:]:
        train_missing(best, seed)


# --- the loop -------------------------------------------------------------------------------------------------------


def evaluation_steps(steps: int, count: int) -> list[int]:
    """`count` evenly spaced steps up to the last one; every quarter is among them."""
    if count % QUARTERS:
        raise UserError(f"the number of evaluations is {count}: must be a multiple of {QUARTERS}")
    if steps < QUARTERS:
        raise UserError(f"--steps={steps}: must be at least {QUARTERS}")
    return sorted({round(steps * number / count) for number in range(1, count + 1)} - {0})


def train(
    case: Case,
    rate: float,
    seed: int,
    data: PreparedData,
    evaluations: int,
    progress: bool = True,
    label: str = "",
) -> Training:
    """Trains a case at one learning rate with one seed, and evaluates it at this many evenly spaced steps."""
    config = dataclasses.replace(
        case.config,
        optimizer=dataclasses.replace(case.config.optimizer, learning_rate=rate),
        training=dataclasses.replace(case.config.training, seed=seed),
    )
    steps, batch_size = config.training.num_steps, config.training.batch_size
    wanted = evaluation_steps(steps, evaluations)
    learner = case.make(config)
    digest = hashlib.sha256()
    seconds: list[float] = []
    curve: list[tuple[int, float]] = []
    bar = tqdm(
        total=steps * batch_size * data.length,
        desc=f"{label + ': ' if label else ''}{case.name}, rate {rate:g}, seed {seed}",
        unit="token",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
    with bar, loader.train_batches(data, batch_size, seed) as batches:
        for number, tokens_BN in batches:
            digest.update(np.ascontiguousarray(tokens_BN, np.int32))
            start = time.perf_counter()
            learner.update(tokens_BN)
            seconds.append(time.perf_counter() - start)
            bar.update(tokens_BN.size)
            if number + 1 in wanted:
                curve.append((number + 1, learner.held_out()))
                bar.set_postfix_str(f"held-out {curve[-1][1]:.3f} nats")
            if number + 1 == steps:
                break
    usual = statistics.median(seconds)
    seconds[0] = usual  # the first step includes compilation
    facts = machine(hugging_face=False)
    return Training(
        setting=case.setting,
        name=case.name,
        learning_rate=rate,
        seed=seed,
        steps=steps,
        num_parameters=learner.num_parameters,
        curve=tuple(Point(done, sum(seconds[:done]), nats if math.isfinite(nats) else None) for done, nats in curve),
        tokens_per_second=batch_size * data.length / usual,
        batches=digest.hexdigest()[:16],
        hardware=f"{facts['machine']}, {facts['device']}",
        commit=commit(),
        scores=case.scores(learner) if case.scores else {},
    )


@functools.cache
def commit() -> str:
    """The commit of the source code, with `-dirty` if files were changed since; `unknown` outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- figures --------------------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; no error if there is only one value."""
    if len(values) < 2:
        return statistics.fmean(values), None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard error as text; `diverged` if a value is not finite, and nothing if there is none."""
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def perplexity_ratios(ours: Sequence[Training], theirs: Sequence[Training]) -> list[float]:
    """Ratios of the final held-out perplexities, seed by seed: both sides saw the same batches there."""
    by_seed = {training.seed: training for training in theirs}
    return [
        math.exp(training.final - by_seed[training.seed].final)
        for training in ours
        if training.seed in by_seed and math.isfinite(training.final) and math.isfinite(by_seed[training.seed].final)
    ]


def reached(training: Training, nats: float) -> tuple[float, float] | None:
    """(steps, seconds) after which the held-out loss was down to `nats`; None if it never was.

    Interpolated linearly between two evaluations. If the first evaluation is below already, its own step counts.
    """
    before: Point | None = None
    for point in training.curve:
        if point.nats is not None and point.nats <= nats:
            if before is None or before.nats is None:
                return float(point.step), point.seconds
            part = (before.nats - nats) / (before.nats - point.nats)
            return (
                before.step + part * (point.step - before.step),
                before.seconds + part * (point.seconds - before.seconds),
            )
        before = point
    return None


def at_an_edge(rates: Sequence[float], best: float) -> bool:
    """Whether the best of at least two rates is the smallest or the largest, so that a better one may lie outside."""
    return len(rates) > 1 and (best <= min(rates) or best >= max(rates))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rates_table(results: Results, cases: Sequence[Case], seed: int) -> str:
    """The final held-out nats per token of every case at every learning rate that was tried with the first seed."""
    tried = {case.name: {one.learning_rate: one.final for one in results.of(case, seed)} for case in cases}
    rates = sorted({rate for found in tried.values() for rate in found})
    rows = []
    for name, found in tried.items():
        best = min(found, key=lambda rate: found[rate], default=None)
        cells = [shown([found[rate]]) if rate in found else "" for rate in rates]
        rows.append([name, *(f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True))])
    return markdown(["learning rate", *(f"{rate:g}" for rate in rates)], rows)


def edge_notes(results: Results, cases: Sequence[Case], seed: int) -> list[str]:
    """One line per case whose best learning rate is the smallest or the largest that was tried."""
    notes = []
    for case in cases:
        rates = [training.learning_rate for training in results.of(case, seed)]
        if rates and at_an_edge(rates, best := results.best_rate(case, seed)):
            notes.append(f"{case.name}: the best rate, {best:g}, is at an edge of those tried; try more with --rates.")
    return notes


def provenance(trainings: Iterable[Training], command: Sequence[str]) -> list[str]:
    """Lines for below a table: command, seeds, hardware and commits."""
    trainings = list(trainings)
    each = {
        "Seeds": sorted({training.seed for training in trainings}),
        "Hardware": sorted({training.hardware for training in trainings}),
        "Commit": sorted({training.commit for training in trainings}),
    }
    lines = [f"Command: `{shlex.join(command)}`."]
    return lines + [f"{name}: {', '.join(map(str, values))}." for name, values in each.items()]


# --- flags ----------------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, results_flag: str) -> None:
    """The flags that tables of trainings share."""
    parser.add_argument("--steps", type=int, help="updates per training")
    parser.add_argument("--rates", type=numbers(float), help="learning rates to try, such as 1e-3,2e-3,4e-3")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds at the best rate: 0, 1, ... (default 3)")
    parser.add_argument(
        "--only", type=words, default=(), help="train only these; others are shown if they are finished"
    )
    parser.add_argument(
        results_flag,
        dest="results",
        type=pathlib.Path,
        help="a .jsonl file that finished trainings are appended to and taken from",
    )
    parser.add_argument(
        "--data-dir",
        type=pathlib.Path,
        default=ROOT / "runs" / "benchmarks",
        help="where prepared data are kept (default: runs/benchmarks)",
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few steps, one rate, one seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def words(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(kind: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """A parser of comma-separated numbers."""

    def parse(text: str) -> tuple[float, ...]:
        return tuple(kind(part) for part in words(text))

    return parse


def override_words(given: Sequence[str]) -> list[str]:
    """`section.field=value` of command-line words `--config.section.field=value`. Raises UserError at other words."""
    for word in given:
        if not word.startswith("--config.") or "=" not in word:
            raise UserError(f"unknown argument {word!r}; fields are set with --config.section.field=value")
    return [word.removeprefix("--config.") for word in given]


def check_flags(args: argparse.Namespace, known: Sequence[str]) -> None:
    """Raises UserError if --only names something unknown, or a number cannot be used."""
    if unknown := [name for name in args.only if name not in known]:
        raise UserError(f"--only={unknown[0]}: not known; known: {', '.join(known)}")
    if args.rates is not None and (not args.rates or not all(rate > 0 for rate in args.rates)):
        raise UserError("--rates: must be one or more numbers above 0")
    if args.seeds < 1:
        raise UserError(f"--seeds={args.seeds}: must be at least 1")
    if args.steps is not None and args.steps < QUARTERS:
        raise UserError(f"--steps={args.steps}: must be at least {QUARTERS}")


def prepare(config: Config, folder: pathlib.Path, progress: bool) -> tuple[PreparedData, Config]:
    """The prepared data of a config, kept in `folder`, and the config with its vocabulary size."""
    folder.mkdir(parents=True, exist_ok=True)
    return run_data.prepare(config, folder, progress=progress)

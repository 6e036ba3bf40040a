"""A sweep as its folder tells it: members, how far each is, their figures and their curves.

Read are `sweep.json`, and of every member `member.json`, `config.json`, `metrics.jsonl`, `eval.json`, `suites.json` and
`generation.json`. Every number in them is a *figure*, named by its dotted path, the name of the file first:

    metrics.eval/nll                              the last value in metrics.jsonl
    eval.price.4.independence_gap                 a number of eval.json
    generation.entries[text=test split].entropy_nats     of an item of a list, known by its settings, or by its place
    likelihood.perplexity_per_token               from left to right, or the ELBO if there is no exact likelihood
    speed.seconds, speed.tokens_per_second        of training, see `Member.seconds`
    cost.steps, cost.tokens, cost.flops, cost.ar_flops, cost.weights              from config.json

A number of a list may also be named by some of the settings of its item, if they fit no other: `generation.entries` has
`[mode=strided,streams=2,temperature=1.0]`, which `[streams=2]` may stand for.
"""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from armd_jax import config as configs
from armd_jax import files, typed
from armd_jax.config import Config
from armd_jax.core import flops
from armd_jax.errors import UserError, nearest, shown
from armd_jax.evaluation.results import Score
from armd_jax.report import sweep_paths as paths

Status = Literal["finished", "failed", "under way", "not begun"]

FILES = ("eval", "suites", "generation")  # .json, beside metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the training of a member takes.

    steps: of the whole training. tokens_per_step: of a batch. flops_per_token: model FLOPs of training, both streams of
    an ARMD. ar_flops_per_token: those of an autoregressive model of the same size (`core.flops`). weights: in matrices.
    """

    steps: int
    tokens_per_step: int
    flops_per_token: float
    ar_flops_per_token: float
    weights: int

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of a step of training."""
        return self.tokens_per_step * self.flops_per_token

    def figures(self) -> dict[str, float]:
        """The figures of the whole training, by their dotted names."""
        tokens = self.steps * self.tokens_per_step
        return {
            "cost.steps": self.steps,
            "cost.tokens": tokens,
            "cost.flops": self.flops_per_step * self.steps,
            "cost.ar_flops": self.ar_flops_per_token * tokens,
            "cost.weights": self.weights,
        }


@dataclasses.dataclass(frozen=True)
class Member:
    """One training of a sweep.

    row: what members that differ only in the seed share. seed: that of sweep.json, or of the config if the
    sweep has no seeds. values: by axis. reason: why it is not finished, in one line.
    figures: numbers by dotted path; a number that is not finite is not there. metrics: the rows of metrics.jsonl.
    documents: the parsed JSON files by the name of the file. cost: None if there is no config.json.
    """

    name: str
    row: str
    seed: int | None
    values: Mapping[str, Any]
    status: Status
    reason: str
    figures: Mapping[str, float]
    metrics: Sequence[Mapping[str, Any]]
    documents: Mapping[str, Any]
    cost: Cost | None

    @property
    def finished(self) -> bool:
        """Whether its figures count."""
        match self.status:
            case "finished":
                return True
            case "failed" | "under way" | "not begun":
                return False

    @property
    def bounds(self) -> bool:
        """Whether its held-out loss only bounds the likelihood from above."""
        return any("eval/nll_upper_bound" in row for row in self.metrics)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row of metrics.jsonl that has a finite value of this name, by step."""
        found = [(row["step"], paths.number(row.get(name))) for row in self.metrics]
        return [(step, value) for step, value in found if value is not None]

    def seconds(self) -> dict[int, float]:
        """Seconds of training up to the rows of metrics.jsonl, by step; empty if the rates are not known.

        Made of `train/tokens_per_second`, so compilation, evaluations, saving and times in which nothing ran are not in
        it. Steps up to a row without a rate, as the first of a process, count as the next that has one.
        """
        steps = sorted({row["step"] for row in self.metrics})
        rates = {step: rate for step, rate in self.curve("train/tokens_per_second") if rate > 0}
        if self.cost is None or not rates:
            return {}
        rate = rates[max(rates)]
        for step in reversed(steps):
            rate = rates.setdefault(step, rate)
        found: dict[int, float] = {}
        elapsed = 0.0
        for before, step in zip([0, *steps], steps, strict=False):
            elapsed += (step - before) * self.cost.tokens_per_step / rates[step]
            found[step] = elapsed
        return found


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All members, in the sequence of sweep.json. name: that of the sweep file. axes: the names of `Member.values`."""

    name: str
    axes: tuple[str, ...]
    members: tuple[Member, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """Every row once, in the sequence of its first member."""
        return tuple(dict.fromkeys(member.row for member in self.members))

    def of_row(self, row: str) -> list[Member]:
        """All members of a row."""
        return [member for member in self.members if member.row == row]

    def finished(self, row: str) -> list[Member]:
        """The members of a row whose figures count."""
        return [member for member in self.of_row(row) if member.finished]

    def values(self, row: str) -> Mapping[str, Any]:
        """The values of the axes in a row."""
        return self.of_row(row)[0].values

    def of_status(self, status: Status) -> list[Member]:
        """All members that are so far."""
        return [member for member in self.members if member.status == status]


def load(folder: pathlib.Path) -> Sweep:
    """Reads the folder of a sweep. Raises UserError if it is none or if one of its files is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    file = folder / "sweep.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: is not the folder of a sweep (it has no sweep.json), as armd sweep --out=DIR makes it"
        )
    record = files.read_json(file)
    try:
        axes = tuple(_typed(axis, str) for axis in _typed(record["axes"], list))
        name = pathlib.PurePath(_typed(record["config"], str)).stem
        entries = [_entry(_typed(one, dict), axes) for one in _typed(record["members"], list)]
    except (KeyError, TypeError, UserError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}: not what armd sweep writes: {reason}") from error
    for keys in ([entry.name for entry in entries], [f"{entry.row}, seed {entry.seed}" for entry in entries]):
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"{file}: has two members {shown(twice[0])}")
    return Sweep(name, axes, tuple(_member(folder / "members" / entry.name, entry) for entry in entries))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What sweep.json says of a member. after: the commands that follow the training, if it says which."""

    name: str
    row: str
    seed: int | None
    values: Mapping[str, Any]
    after: tuple[str, ...]


def _entry(record: Mapping[str, Any], axes: Sequence[str]) -> _Entry:
    """Raises KeyError, TypeError or UserError if the record is none."""
    name, row, values = _typed(record["name"], str), _typed(record["row"], str), _typed(record["values"], dict)
    typed.check_text(f"{name}{row}", "name")
    if not name or name in (".", "..") or pathlib.PurePath(name).name != name or "\0" in name:
        raise TypeError(f"{shown(name)} is not the name of a folder")
    return _Entry(
        name=name,
        row=row,
        seed=None if record.get("seed") is None else _typed(record["seed"], int),
        values={axis: values.get(axis) for axis in axes},
        after=tuple(_typed(command, str) for command in _typed(record.get("after", []), list)),
    )


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, got {shown(value)}")
    return value


def _member(run: pathlib.Path, entry: _Entry) -> Member:
    metrics = _metrics(run / "metrics.jsonl")
    documents = {stem: files.read_json(file) for stem in FILES if (file := run / f"{stem}.json").is_file()}
    config = configs.read(run) if (run / "config.json").is_file() else None
    cost = _cost(config) if config else None
    seed = config.training.seed if config and entry.seed is None else entry.seed
    status, reason = _status(run, entry.after, metrics, cost)
    try:
        figures = dict(_figures(metrics, documents, cost))
    except RecursionError as error:
        raise UserError(f"{run}: one of its JSON files is nested too deeply") from error
    member = Member(entry.name, entry.row, seed, entry.values, status, reason, figures, metrics, documents, cost)
    return dataclasses.replace(member, figures={**figures, **_speed(member)})


def _speed(member: Member) -> dict[str, float]:
    """What the training took; nothing if the rates are not known."""
    seconds = member.seconds()
    last = max(seconds, default=0)
    if member.cost is None or not last:
        return {}
    rate = last * member.cost.tokens_per_step / seconds[last]
    return {"speed.seconds": seconds[last], "speed.tokens_per_second": rate}


def _metrics(file: pathlib.Path) -> list[dict[str, Any]]:
    lines = file.read_bytes().count(b"\n") if file.is_file() else 0
    rows = files.read_json_lines(file)
    if lines > len(rows):  # a last line without an end is one that is being written
        raise UserError(f"{file}: line {len(rows) + 1} of {lines} is damaged")
    for place, row in enumerate(rows, 1):
        if type(row.get("step")) is not int or not 0 <= row["step"] < paths.LARGEST:
            raise UserError(f"{file}: line {place} has no step")
    return rows


def _cost(config: Config) -> Cost:
    return Cost(
        steps=config.training.num_steps,
        tokens_per_step=config.training.batch_size * config.model.max_length,
        flops_per_token=flops.training_flops_per_token(config.model).total,
        ar_flops_per_token=flops.ar_training_flops_per_token(config.model),
        weights=flops.ar_parameters(config.model),
    )


def _status(
    run: pathlib.Path, after: Sequence[str], metrics: Sequence[Mapping[str, Any]], cost: Cost | None
) -> tuple[Status, str]:
    """How far a member is, and why it is not finished."""
    file = run / "member.json"
    if not file.is_file():
        return (
            ("under way", "nothing of it is done, as far as armd sweep has noted")
            if run.is_dir()
            else ("not begun", "")
        )
    record = files.read_json(file)
    try:
        status, done = record["status"], [_typed(task, str) for task in record["done"]]
        error = " ".join(_typed(record.get("error", ""), str).split())
        left = [task for task in ["train", *after] if task not in done]
    except (KeyError, TypeError) as wrong:
        raise UserError(f"{file}: not what armd sweep writes: status, done or error is missing or wrong") from wrong
    match status:
        case "failed":
            return "failed", error or "no reason is known"
        case "finished" if left:
            return "under way", f"{left[0]} is not done"
        case "finished" if not (run / "metrics.jsonl").is_file():
            return "under way", "metrics.jsonl is missing"
        case "finished" if cost and metrics and metrics[-1]["step"] < cost.steps:
            return "under way", f"metrics.jsonl ends at step {metrics[-1]['step']:,} of {cost.steps:,}"
        case "finished":
            return "finished", ""
        case _:
            raise UserError(f"{file}: status={shown(status)}: expected finished or failed")


def _figures(
    metrics: Sequence[Mapping[str, Any]], documents: Mapping[str, Any], cost: Cost | None
) -> Iterator[tuple[str, float]]:
    last = {name: value for row in metrics for name, value in row.items() if name != "step"}
    yield from paths.numbers(last, "metrics")
    for stem, document in documents.items():
        yield from paths.numbers(document, stem)
    evaluation = documents.get("eval")
    if isinstance(evaluation, dict):
        yield from paths.numbers(evaluation.get("left_to_right") or _score(evaluation.get("elbo")), "likelihood")
    if cost is not None:
        yield from cost.figures().items()


def _score(elbo: Any) -> Any:
    """What a bound has in common with an exact likelihood."""
    scores = [field.name for field in dataclasses.fields(Score)]
    return {name: elbo.get(name) for name in scores} if isinstance(elbo, dict) else None


def only(sweep: Sweep, patterns: Sequence[str], rows: Sequence[str]) -> Sweep:
    """The sweep without the rows that fit no pattern, as those of file names, and are not among `rows`.

    Raises UserError if a pattern fits no row.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row, pattern) for row in sweep.rows):
            raise UserError(f"--rows={shown(pattern)}: no row of the sweep fits{nearest(pattern, sweep.rows)}")
    kept = {row for pattern in patterns for row in sweep.rows if fnmatch.fnmatchcase(row, pattern)} | set(rows)
    return dataclasses.replace(sweep, members=tuple(member for member in sweep.members if member.row in kept))


def select(sweep: Sweep, wanted: Sequence[str]) -> Sweep:
    """The sweep with figures under the names that somebody wants, if these name items of lists by some settings.

    Raises UserError if such a name fits several figures, of one member or of several: they would be averaged.
    """
    found: list[dict[str, float]] = [dict(member.figures) for member in sweep.members]
    for name in wanted:
        fits: dict[str, str] = {}  # the figures that it fits, and a member of each
        for member, figures in zip(sweep.members, found, strict=True):
            for figure in [] if name in figures else paths.fitting(name, member.figures):
                fits.setdefault(figure, member.name)
                figures[name] = member.figures[figure]
        if len(fits) > 1:
            (one, first), (other, second) = list(fits.items())[:2]
            several = f"{one!r} of {first} and {other!r} of {second}"
            raise UserError(f"--metric={shown(name)}: fits {several}; give more settings")
    members = (dataclasses.replace(one, figures=figures) for one, figures in zip(sweep.members, found, strict=True))
    return dataclasses.replace(sweep, members=tuple(members))

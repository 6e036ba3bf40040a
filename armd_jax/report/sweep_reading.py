"""A sweep as its folder tells it: members, how far each is, their figures and their curves.

Read are `sweep.json`, and of every member `member.json`, `config.json`, `metrics.jsonl`, `eval.json`, `suites.json` and
`generation.json`. Every number in them is a *figure*, named by its dotted path, the name of the file first:

    metrics.eval/nll                              the last value in metrics.jsonl
    eval.strided.4.bits_per_byte                  a number of eval.json
    eval.price[streams=4].independence_gap        of an item of a list, known by its first field if that is a number
    generation.entries[0].entropy_nats            or else by its place from 0
    likelihood.perplexity_per_token               from left to right, or the ELBO if there is no exact likelihood
    speed.seconds, speed.tokens_per_second        of training, see `Member.seconds`
    cost.steps, cost.tokens, cost.flops, cost.ar_flops, cost.weights              from config.json
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from armd_jax import config as configs
from armd_jax import files
from armd_jax.core import flops
from armd_jax.errors import UserError, shown

Status = Literal["finished", "failed", "under way", "not begun"]

FILES = ("eval", "suites", "generation")  # .json, beside metrics.jsonl
_LARGEST = 1e30  # a number beyond this measures nothing, and axes cannot be divided so far


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

    def figures(self) -> dict[str, float]:
        """The figures of the whole training, by their dotted names."""
        tokens = self.steps * self.tokens_per_step
        return {
            "cost.steps": self.steps,
            "cost.tokens": tokens,
            "cost.flops": self.flops_per_token * tokens,
            "cost.ar_flops": self.ar_flops_per_token * tokens,
            "cost.weights": self.weights,
        }


@dataclasses.dataclass(frozen=True)
class Member:
    """One training of a sweep.

    row: what members that differ only in the seed share. values: by axis. reason: why it is not finished, in one line.
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
        found = [(row["step"], number(row.get(name))) for row in self.metrics]
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
        members = tuple(_member(folder, _typed(one, dict), axes) for one in _typed(record["members"], list))
    except (KeyError, TypeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}: not what armd sweep writes: {reason}") from error
    places = [(member.row, member.seed) for member in members]
    twice = [place for place in places if places.count(place) > 1] or [
        (one.name, None) for one in members if [other.name for other in members].count(one.name) > 1
    ]
    if twice:
        raise UserError(f"{file}: there are two members {shown(twice[0][0])} with the seed {twice[0][1]}")
    return Sweep(name, axes, members)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, got {shown(value)}")
    return value


def _member(folder: pathlib.Path, record: Mapping[str, Any], axes: Sequence[str]) -> Member:
    name, row, values = _typed(record["name"], str), _typed(record["row"], str), _typed(record["values"], dict)
    seed = None if record.get("seed") is None else _typed(record["seed"], int)
    if not name or name in (".", "..") or pathlib.PurePath(name).name != name or "\0" in name:
        raise TypeError(f"{shown(name)} is not the name of a folder")
    run = folder / "members" / name
    metrics = _metrics(run / "metrics.jsonl")
    documents = {stem: files.read_json(file) for stem in FILES if (file := run / f"{stem}.json").is_file()}
    cost = _cost(run) if (run / "config.json").is_file() else None
    status, reason = _status(run, record.get("after", []), metrics, cost)
    member = Member(
        name=name,
        row=row,
        seed=seed,
        values={axis: values.get(axis) for axis in axes},
        status=status,
        reason=reason,
        figures=dict(_figures(metrics, documents, cost)),
        metrics=metrics,
        documents=documents,
        cost=cost,
    )
    return dataclasses.replace(member, figures={**member.figures, **_speed(member)})


def _speed(member: Member) -> dict[str, float]:
    """What the training took; nothing if the rates are not known."""
    if member.cost is None or not (seconds := member.seconds()):
        return {}
    last = max(seconds)
    return {
        "speed.seconds": seconds[last],
        "speed.tokens_per_second": last * member.cost.tokens_per_step / seconds[last],
    }


def _metrics(file: pathlib.Path) -> list[dict[str, Any]]:
    rows = files.read_json_lines(file)
    if file.is_file() and (lines := file.read_bytes().count(b"\n")) > len(rows):
        raise UserError(f"{file}: line {len(rows) + 1} of {lines} is damaged")
    for number_, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int) or isinstance(row["step"], bool) or not 0 <= row["step"] < _LARGEST:
            raise UserError(f"{file}: line {number_} has no step")
    return rows


def _cost(run: pathlib.Path) -> Cost:
    config = configs.read(run)
    return Cost(
        steps=config.training.num_steps,
        tokens_per_step=config.training.batch_size * config.model.max_length,
        flops_per_token=flops.training_flops_per_token(config.model).total,
        ar_flops_per_token=flops.ar_training_flops_per_token(config.model),
        weights=flops.ar_parameters(config.model),
    )


def _status(
    run: pathlib.Path, after: Any, metrics: Sequence[Mapping[str, Any]], cost: Cost | None
) -> tuple[Status, str]:
    """How far a member is, and why it is not finished.

    after: the commands that follow the training, if sweep.json says which.
    """
    file = run / "member.json"
    if not file.is_file():
        return ("under way", "its training is not finished") if run.is_dir() else ("not begun", "")
    record = files.read_json(file)
    try:
        status, done = record["status"], [_typed(task, str) for task in record["done"]]
        error = " ".join(_typed(record.get("error", ""), str).split())
        left = [task for task in ["train", *_typed(after, list)] if task not in done]
    except (KeyError, TypeError) as wrong:
        raise UserError(f"{file}: not what armd sweep writes: status, done or error is missing or wrong") from wrong
    match status:
        case "failed":
            return "failed", error or "no reason is known"
        case "finished" if left:
            return "under way", f"{left[0]} is not done"
        case "finished" if cost and metrics and metrics[-1]["step"] < cost.steps:
            return "under way", f"metrics.jsonl ends at step {metrics[-1]['step']:,} of {cost.steps:,}"
        case "finished":
            return "finished", ""
        case _:
            raise UserError(f"{file}: status={shown(status)}: expected finished or failed")


def number(value: Any) -> float | None:
    """The value as it is if it is a finite number of a reasonable size, else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) and abs(value) < _LARGEST else None


def _figures(
    metrics: Sequence[Mapping[str, Any]], documents: Mapping[str, Any], cost: Cost | None
) -> Iterator[tuple[str, float]]:
    last = {name: value for row in metrics for name, value in row.items() if name != "step"}
    yield from _numbers(last, "metrics")
    for stem, document in documents.items():
        yield from _numbers(document, stem)
    evaluation = documents.get("eval")
    if isinstance(evaluation, dict):
        yield from _numbers(evaluation.get("left_to_right") or _score(evaluation.get("elbo")), "likelihood")
    if cost is not None:
        yield from cost.figures().items()


def _score(elbo: Any) -> Any:
    """What a bound has in common with an exact likelihood."""
    return {name: elbo.get(name) for name in elbo if name.startswith(("nats", "perp", "bits"))} if elbo else None


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if (found := number(value)) is not None:
        yield path, found
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{path}.{name}")
    elif isinstance(value, list):
        keys = [next(iter(item.items()), None) if isinstance(item, dict) else None for item in value]
        named = all(key is not None and type(key[1]) is int for key in keys) and len(set(keys)) == len(keys)
        for place, (key, item) in enumerate(zip(keys, value, strict=True)):
            yield from _numbers(item, f"{path}[{key[0]}={key[1]}]" if named and key else f"{path}[{place}]")

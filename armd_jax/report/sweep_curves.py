"""The curves of a row of a sweep: a loss against steps, tokens, FLOPs or seconds, of each seed and on average."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, assert_never

from armd_jax.report.sweep_reading import Member, Sweep

Against = Literal["steps", "tokens", "flops", "seconds"]
Line = tuple[list[float], list[float]]  # where on the axis, and the loss there


def lines(sweep: Sweep, row: str, metric: str, against: Against) -> list[Line]:
    """The curve of every finished member of a row, point by point at the steps from 1 that all of them have.

    metric: a name in metrics.jsonl, such as "eval/nll". Members that lack the metric, or of which the tokens, the FLOPs
    or the seconds are not known, have no line.
    """
    found = []
    for member in sweep.finished(row):
        place = _places(member, against)
        points = {step: (place(step), value) for step, value in member.curve(metric) if step > 0}
        known = {step: (x, value) for step, (x, value) in points.items() if x is not None}
        found += [known] if known else []
    steps = sorted(set.intersection(*map(set, found))) if found else []
    return [([one[step][0] for step in steps], [one[step][1] for step in steps]) for one in found if steps]


def _places(member: Member, against: Against) -> Callable[[int], float | None]:
    """Where on the axis a step of a member is; None if that is not known."""
    cost = member.cost
    match against:
        case "steps":
            return float
        case "tokens":
            return lambda step: step * cost.tokens_per_step if cost else None
        case "flops":
            return lambda step: step * cost.flops_per_step if cost else None
        case "seconds":
            return member.seconds().get
        case _:
            assert_never(against)


def mean(several: Sequence[Line]) -> Line:
    """The mean of the lines of a row, point by point, along both axes."""
    xs, ys = ([list(values) for values in zip(*(line[which] for line in several), strict=True)] for which in (0, 1))
    return [sum(values) / len(values) for values in xs], [sum(values) / len(values) for values in ys]


def thinned(line: Line, most: int) -> Line:
    """A line of at most so many points: means over neighbouring ones, at the place of the last of them."""
    xs, ys = line
    count = min(len(xs), most)
    edges = [round(part * len(xs) / count) for part in range(count + 1)] if count else []
    pairs = list(itertools.pairwise(edges))
    return [xs[end - 1] for _, end in pairs], [sum(ys[begin:end]) / (end - begin) for begin, end in pairs]

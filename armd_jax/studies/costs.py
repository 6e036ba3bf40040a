"""What the members of a sweep cost: parameters, tokens, FLOPs, and time at a rate that was measured."""

import dataclasses
from collections.abc import Sequence

from armd_jax.compilation.compile import assumed_vocabulary
from armd_jax.config import Config, ModelConfig
from armd_jax.core import flops, parameters
from armd_jax.studies.plan import Job, Plan
from armd_jax.training import goodput


@dataclasses.dataclass(frozen=True)
class Cost:
    """One member of the list.

    state: what has been done, in words. step: how far its training is. parameters, tokens, flops: of the whole
    training; FLOPs are those of the model's mathematics, see `core/flops.py`. seconds: how long what is left of the
    training takes at the rate, without the commands that follow; None: no rate is known.
    """

    name: str
    state: str
    step: int
    steps: int
    parameters: int
    tokens: int
    flops: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Rate:
    """FLOPs per second of training, evaluations, saves and compilation included. source: where it comes from."""

    flops_per_second: float | None
    source: str


def of(plan: Plan, jobs: Sequence[Job], rate: float | None) -> tuple[list[Cost], Rate]:
    """The costs of members. rate: FLOPs per second; None: as measured on the finished members of the sweep."""
    found = Rate(rate, "given by --rate") if rate is not None else _measured(plan)
    sizes: dict[ModelConfig, int] = {}
    costs = []
    for job in jobs:
        config = assumed_vocabulary(job.config)
        if config.model not in sizes:
            sizes[config.model] = parameters.count(config.model)
        whole, step = _flops(config), _step(plan, job)
        left = whole * (1 - step / config.training.num_steps)
        speed = found.flops_per_second
        costs.append(
            Cost(
                name=job.name,
                state=_state(plan, job, step),
                step=step,
                steps=config.training.num_steps,
                parameters=sizes[config.model],
                tokens=config.training.num_steps * job.tokens,
                flops=whole,
                seconds=None if speed is None else left / speed,
            )
        )
    return costs, found


def _flops(config: Config) -> float:
    tokens = config.training.num_steps * config.training.batch_size * config.model.max_length
    return flops.training_flops_per_token(config.model).total * tokens


def _step(plan: Plan, job: Job) -> int:
    if plan.folder.trained(job.name, job.config):
        return job.config.training.num_steps
    return min(plan.folder.step(job.name), job.config.training.num_steps)


def _state(plan: Plan, job: Job, step: int) -> str:
    done = plan.folder.done(job.name)
    commands = [command.text for command in job.after]
    if done.error:
        return "failed"
    if plan.folder.trained(job.name, job.config):
        left = sum(text not in done.done for text in commands)
        return f"trained, {left} of {len(commands)} commands left" if left else "finished"
    return f"step {step}" if step else "not begun"


def _measured(plan: Plan) -> Rate:
    """FLOPs of the finished members, divided by the seconds in which processes trained them, lost steps left out."""
    total = seconds = 0.0
    count = 0
    for job in plan.jobs:
        spent = goodput.of(plan.folder.events(job.name)) if plan.folder.trained(job.name, job.config) else None
        if spent is not None:
            total += _flops(assumed_vocabulary(job.config))
            seconds += spent.wall_seconds - spent.seconds["not_running"] - spent.seconds["lost"]
            count += 1
    if not seconds:
        return Rate(None, "no rate is known until a member is finished; --rate=FLOPS_PER_SECOND gives one")
    return Rate(total / seconds, f"measured on {count} finished member{'s' * (count > 1)}")


def as_text(costs: Sequence[Cost], rate: Rate, at_once: int = 1) -> str:
    """The list for people. at_once: members at a time, each of them at the rate."""
    width = max(len(cost.name) for cost in costs) + 2
    lines = [f"{'member':<{width}}{'parameters':>13}{'tokens':>14}{'FLOPs':>10}{'time left':>11}  state"]
    for cost in costs:
        lines.append(
            f"{cost.name:<{width}}{cost.parameters:>13,}{cost.tokens:>14,}{cost.flops:>10.2e}"
            f"{duration(cost.seconds):>11}  {cost.state}"
        )
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    left = max(sum(known) / at_once, *known) if known else None
    how = "one member runs at a time" if at_once == 1 else f"{at_once} members run at a time, each at the rate"
    speed = "" if rate.flops_per_second is None else f"{rate.flops_per_second:.3g} FLOPs per second, "
    lines.append(
        f"{len(costs)} members, {sum(cost.tokens for cost in costs):,} tokens,"
        f" {sum(cost.flops for cost in costs):.2e} FLOPs, {duration(left)} of training left if {how}"
        f" ({speed}{rate.source})"
    )
    return "\n".join(lines)


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds, `?` if they are not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

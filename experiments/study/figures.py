"""The rows of the study by name, their figures, and what was asked of them."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

from armd_jax.errors import UserError
from armd_jax.report import sweep_paths
from armd_jax.report.sweep_reading import Sweep
from armd_jax.report.sweep_statistics import Estimate, estimate, paired_ratio, steps_to_equal

PERPLEXITY = "likelihood.perplexity_per_token"
NATS = "likelihood.nats_per_token"
CURRICULUM = "model=ARMD-curriculum"
JUDGE = "judge=AR"
LONG = "long=MDLM"  # MDLM with more steps
MAIN = {
    "model=AR": "AR",
    "model=AR-left-path": "AR with ARMD's path from the left neighbour (M = 0)",
    "model=ARMD-identity": "ARMD, identity order",
    "model=ARMD-curriculum": "ARMD, curriculum and SBP",
    "model=MDLM": "MDLM (upper bound)",
    LONG: "MDLM, 3 x the steps (upper bound)",
}
EQUAL_FLOPS = {
    "model=AR-equal-FLOPs": "AR",
    "model=ARMD-identity": "ARMD, identity order",
    "model=ARMD-curriculum": "ARMD, curriculum and SBP",
    "model=MDLM-equal-FLOPs": "MDLM (upper bound)",
}
REFERENCE = "order=scatter-8"  # the ARMD that the variants differ from in one thing, trained for as many steps
VARIANTS = {
    "orders": {
        REFERENCE: "scatter, 8 tokens",
        "order=scatter-32": "scatter, 32",
        "order=window-8": "window, 8",
        "order=window-32": "window, 32",
        "order=reinsert-8": "reinsert, 8",
        "order=reinsert-32": "reinsert, 32",
        "order=uniform": "uniform",
    },
    "aggregators": {
        REFERENCE: "left neighbour and positional",
        "aggregator=both-neighbours": "both neighbours and positional",
        "aggregator=positional": "positional (the paper's)",
        "aggregator=mean": "mean",
        "aggregator=shift": "shift",
    },
    "two_stream_layers": {"M=0": "0", "M=1": "1 = L/4", REFERENCE: "2 = L/2", "M=4": "4 = L"},
    "strided_steps": {"SBP=0": "none", "SBP=2.5": "2.5%", REFERENCE: "20%"},
    "blocks": {REFERENCE: "none", "blocks=contiguous": "in a tenth of the steps"},
}
STREAMS = (2, 4, 8)
LEFT_UNIGRAM = 0.1  # nats per token below the frequencies of single tokens from which a model is said to use context


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that was asked for: a figure, the limit that it shall not pass, and what it was measured to be.

    bound: "≤" if the measured figure is an upper bound. undecided: why it says nothing; empty: it does. never: seeds in
    which the figure does not exist, because the loss in question was not reached.
    """

    words: str
    limit: float
    better: Literal["lower", "higher", "equal"]
    measured: Estimate | None
    bound: Literal["", "≤"] = ""
    undecided: str = ""
    never: int = 0

    def verdict(self) -> str:
        """Whether it is met; if the limit is within the 95% interval of the mean (Student's t), this is said."""
        if self.undecided:
            return f"not decided: {self.undecided}"
        if self.never:
            return f"**missed**: {self.never} of the seeds never reach it"
        if self.measured is None:
            return "not measured"
        mean, half = self.measured.mean, _half_interval(self.measured)
        near = half is not None and abs(mean - self.limit) <= half
        match self.better:
            case "lower":
                met = mean <= self.limit
            case "higher":
                met = mean >= self.limit
            case "equal":
                if half is None:
                    return "one seed: no verdict"
                return "met: within the 95% interval" if near else "**missed**"
        if self.bound and self.better == "lower" and not met:
            return "not decided: the figure is only a bound"
        words = ("met by the bound" if self.bound else "met") if met else "**missed**"
        if half is None:
            return f"{words} (one seed)"
        return f"{words}, but the limit is within the 95% interval" if near else words


def _half_interval(value: Estimate) -> float | None:
    """Half of the 95% interval of a mean over seeds; None from a single one."""
    return None if value.error is None else float(stats.t.ppf(0.975, value.seeds - 1)) * value.error


def figure(sweep: Sweep, row: str, name: str) -> dict[int | None, float]:
    """A figure of the members of a row, by seed. The name may name items of lists by some of their settings."""
    found: dict[int | None, float] = {}
    for member in sweep.finished(row):
        fitting = [name] if name in member.figures else sweep_paths.fitting(name, member.figures)
        if len(fitting) > 1:
            raise UserError(f"{member.name}: {name} may be {fitting[0]} or {fitting[1]}")
        if fitting:
            found[member.seed] = member.figures[fitting[0]]
    return found


def generated(what: str, streams: int, mode: str = "strided", temperature: float = 1.0) -> str:
    """The name of a figure of generated texts."""
    return f"generation.entries[mode={mode},streams={streams},temperature={temperature}].{what}"


def of_real_text(sweep: Sweep, what: str) -> float | None:
    """A figure of the texts of the test split, of the largest number of them that was judged."""
    name = f"generation.entries[text=test split].{what}"
    for member in sweep.finished(CURRICULUM)[:1]:
        if fitting := sweep_paths.fitting(name, member.figures):
            most = max(fitting, key=lambda one: int((re.findall(r"samples=(\d+)", one) or ["0"])[0]))
            return member.figures[most]
    return None


def ratio(sweep: Sweep, row: str, base: str, name: str = PERPLEXITY) -> Estimate | None:
    return paired_ratio(figure(sweep, row, name), figure(sweep, base, name))


def generated_ratio(sweep: Sweep, streams: int, mode: str = "strided") -> Estimate | None:
    what = "generative_perplexity"
    one, several = (figure(sweep, CURRICULUM, generated(what, s, m)) for s, m in ((1, "strided"), (streams, mode)))
    return paired_ratio(several, one)


def entropy_change(sweep: Sweep, streams: int, mode: str = "strided") -> Estimate | None:
    """Entropy of the texts of several streams minus that of one stream, nats."""
    one, several = (
        figure(sweep, CURRICULUM, generated("entropy_nats", s, m)) for s, m in ((1, "strided"), (streams, mode))
    )
    return estimate([several[seed] - one[seed] for seed in several if seed in one])


def _reached(sweep: Sweep, row: str, baseline: str, name: str) -> Claim:
    """After which share of the baseline's steps a row has its final held-out loss."""
    found = steps_to_equal(sweep, row, baseline)
    shares = [one.steps / one.baseline_steps for one in found if one.steps is not None]
    return Claim(
        words=f"steps of ARMD under the curriculum until the final held-out loss of {name} / the latter's steps",
        limit=1 / 3,
        better="lower",
        measured=estimate(shares),
        bound="≤" if any(one.at_most for one in found) else "",
        undecided=_still_unigram(sweep, baseline),
        never=len(found) - len(shares),
    )


def _still_unigram(sweep: Sweep, row: str) -> str:
    """What there is to say of an MDLM that does not use the context yet; empty if it does."""
    losses = figure(sweep, row, NATS).values()
    unigram = figure(sweep, row, "eval.unigram.nats_per_token").values()
    if losses and unigram and min(losses) > max(unigram) - LEFT_UNIGRAM:
        return "MDLM has not learned more than the frequencies of single tokens"
    return ""


def claims(sweep: Sweep) -> dict[str, Claim]:
    """What the study was asked to find out, and what it found. The names serve texts with figures in them."""
    identity, curriculum, ar, mdlm = "model=ARMD-identity", CURRICULUM, "model=AR", "model=MDLM"
    return {
        "identity": Claim("perplexity of ARMD in the identity order / AR", 0.98, "lower", ratio(sweep, identity, ar)),
        "curriculum": Claim(
            "perplexity of ARMD under the curriculum with SBP / AR", 1.0, "lower", ratio(sweep, curriculum, ar)
        ),
        **{
            key: Claim(words, 1.2, "higher", ratio(sweep, row, ar), bound="≤", undecided=_still_unigram(sweep, row))
            for key, row, words in (
                ("mdlm", mdlm, "perplexity of MDLM / AR"),
                ("mdlm_long", LONG, "perplexity of MDLM with three times the steps / AR"),
            )
        },
        "two": Claim("generative perplexity, S = 2 / S = 1", 1.04, "lower", generated_ratio(sweep, 2)),
        "four": Claim("generative perplexity, S = 4 / S = 1", 1.08, "lower", generated_ratio(sweep, 4)),
        "entropy_two": Claim(
            "entropy, S = 2 against S = 1, nats of difference", 0.05, "lower", _size(entropy_change(sweep, 2))
        ),
        "entropy_four": Claim(
            "entropy, S = 4 against S = 1, nats of difference", 0.05, "lower", _size(entropy_change(sweep, 4))
        ),
        "lossless": Claim(
            "generative perplexity, lossless / S = 1", 1.0, "equal", generated_ratio(sweep, 2, "lossless")
        ),
        "reach": _reached(sweep, curriculum, mdlm, "MDLM"),
        "reach_long": _reached(sweep, curriculum, LONG, "MDLM with three times the steps"),
    }


def _size(change: Estimate | None) -> Estimate | None:
    return None if change is None else dataclasses.replace(change, mean=abs(change.mean))


def power_law(sizes: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """(a, b) of the least-squares fit loss = a size^-b in logarithms."""
    slope, start = np.polyfit(np.log(sizes), np.log(losses), 1)
    return math.exp(start), -float(slope)


def widths(sweep: Sweep, kind: str) -> list[tuple[float, float, float]]:
    """(parameters, FLOPs of the training, held-out nats per token) of a kind of model at every size."""
    found = []
    for row in sweep.rows:
        if row.startswith("size=") and row.endswith(f"-{kind}"):
            for member in sweep.finished(row):
                assert member.cost is not None
                work = member.cost.figures()["cost.flops"]
                found.append((member.figures["parameters"], work, member.figures[NATS]))
    return sorted(found)

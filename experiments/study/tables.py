"""Every table and figure of speech on the study's page, from the figures of its members."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from armd_jax.errors import UserError
from armd_jax.report import sweep_paths, sweep_text
from armd_jax.report.sweep_reading import Member, Sweep
from armd_jax.report.sweep_statistics import Estimate, by_seed, estimate, paired_ratio, steps_to_equal

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
        words = "met" if met else "**missed**"
        if half is None:
            return f"{words} (one seed)"
        return f"{words}, but the limit is within the 95% interval" if near else words


def _half_interval(value: Estimate) -> float | None:
    """Half of the 95% interval of a mean over seeds; None from a single one."""
    return None if value.error is None else float(stats.t.ppf(0.975, value.seeds - 1)) * value.error


def named(measured: Mapping[str, Any], sweep: Sweep) -> dict[str, str]:
    """What the names in template.md stand for."""
    seconds, text = measured["seconds"], measured["text"]
    judge = sweep.finished(JUDGE)
    found = {
        "hardware": f"{measured['cores']} {measured['machine']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in measured["versions"].items()),
        "hours": "an unknown time" if seconds is None else f"{seconds // 3600} h {seconds % 3600 // 60} min",
        "members": _members(len(sweep.members), measured["planned"]),
        "short": _steps(sweep, REFERENCE),
        "steps": _steps(sweep, CURRICULUM),
        "held_out": _held_out(),
        "text": "an unknown text" if text is None else _text(text),
        "judge": _described(sweep, judge[0]) if judge else "an AR model of the main rows",
        "claims": claims_table(claims(sweep)),
        "equal_steps": main_table(sweep, MAIN),
        "equal_flops": main_table(sweep, EQUAL_FLOPS),
        "reach": reach_table(sweep),
        "generation": generation_table(sweep, CURRICULUM),
        "lossless": lossless_table(sweep),
        "sizes": sizes_table(sweep),
        "rates": rates_table(sweep),
        "starts": starts_table(sweep),
        "price": price_table(sweep),
    }
    return found | {name: variants_table(sweep, rows) for name, rows in VARIANTS.items()}


def _steps(sweep: Sweep, row: str) -> str:
    """The steps that a row is trained for."""
    for member in sweep.finished(row):
        assert member.cost is not None
        return f"{member.cost.steps:,}"
    return "(not trained yet)"


def _held_out() -> str:
    """Percent of the documents that each held-out split has."""
    import study

    data = study.base(study.FORMS[""]).data
    assert data.valid_fraction == data.test_fraction
    return f"{100 * data.valid_fraction:g}"


def _members(finished: int, planned: int) -> str:
    if finished == planned:
        return f"all {planned} trainings"
    return f"{finished} of {planned} trainings, those that are finished so far (the others are in no table),"


def _text(text: Mapping[str, Any]) -> str:
    return (
        f"`{text['name']}`, {text['documents']:,} documents to train on, {text['bytes'] / 1e6:,.0f} MB, or"
        f" {text['tokens'] / 1e6:.1f} million tokens of a sentencepiece vocabulary of {text['vocabulary']:,}"
    )


def _described(sweep: Sweep, judge: Member) -> str:
    assert judge.cost is not None
    return (
        f"an AR model of {judge.figures['parameters'] / 1e6:.1f}M parameters that was trained on"
        f" {judge.cost.figures()['cost.tokens'] / 1e6:.1f} million tokens (test perplexity"
        f" {judge.figures[PERPLEXITY]:.1f})"
    )


# --- figures --------------------------------------------------------------------------------------------------------


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


def _ratio(sweep: Sweep, row: str, base: str, name: str = PERPLEXITY) -> Estimate | None:
    return paired_ratio(figure(sweep, row, name), figure(sweep, base, name))


def _generated_ratio(sweep: Sweep, streams: int, mode: str = "strided") -> Estimate | None:
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


def claims(sweep: Sweep) -> list[Claim]:
    """What the study was asked to find out, and what it found."""
    identity, curriculum, ar, mdlm = "model=ARMD-identity", CURRICULUM, "model=AR", "model=MDLM"
    return [
        Claim("perplexity of ARMD in the identity order / AR", 0.98, "lower", _ratio(sweep, identity, ar)),
        Claim("perplexity of ARMD under the curriculum with SBP / AR", 1.0, "lower", _ratio(sweep, curriculum, ar)),
        *(
            Claim(words, 1.2, "higher", _ratio(sweep, row, ar), bound="≤", undecided=_still_unigram(sweep, row))
            for row, words in (
                (mdlm, "perplexity of MDLM / AR"),
                (LONG, "perplexity of MDLM with three times the steps / AR"),
            )
        ),
        Claim("generative perplexity, S = 2 / S = 1", 1.04, "lower", _generated_ratio(sweep, 2)),
        Claim("generative perplexity, S = 4 / S = 1", 1.08, "lower", _generated_ratio(sweep, 4)),
        Claim("entropy, S = 2 against S = 1, nats of difference", 0.05, "lower", _size(entropy_change(sweep, 2))),
        Claim("entropy, S = 4 against S = 1, nats of difference", 0.05, "lower", _size(entropy_change(sweep, 4))),
        Claim("generative perplexity, lossless / S = 1", 1.0, "equal", _generated_ratio(sweep, 2, "lossless")),
        _reached(sweep, curriculum, mdlm, "MDLM"),
        _reached(sweep, curriculum, LONG, "MDLM with three times the steps"),
    ]


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


# --- tables ---------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a sentence if it has no rows."""
    rows = list(rows)
    assert all(len(cells) == len(header) for cells in rows), header
    return sweep_text.markdown_table(header, rows) if rows else "(No finished training has these figures.)"


def shown(value: Estimate | None, digits: int = 3) -> str:
    """A mean, with its standard error if there are several seeds."""
    if value is None:
        return ""
    error = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return f"{value.mean:,.{digits}f}{error}"


def claims_table(found: Sequence[Claim]) -> str:
    """Asked, measured, and whether it is met."""
    signs = {"lower": "≤", "higher": "≥", "equal": "="}
    return markdown(
        ["", "asked", "measured", "seeds", ""],
        [
            [
                claim.words,
                f"{signs[claim.better]} {claim.limit:.2f}",
                f"{claim.bound} {shown(claim.measured)}".strip() if claim.measured else "",
                str(claim.measured.seeds if claim.measured else 0),
                claim.verdict(),
            ]
            for claim in found
        ],
    )


def _present(sweep: Sweep, rows: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(row, name) for row, name in rows.items() if sweep.finished(row)]


def main_table(sweep: Sweep, rows: Mapping[str, str]) -> str:
    """Test likelihood of the main rows; ratios are to the first of them, seed by seed."""
    base = next(iter(rows))
    cells = []
    for row, name in _present(sweep, rows):
        cost = sweep.finished(row)[0].cost
        assert cost is not None
        all_of = cost.figures()
        cells.append(
            [
                name,
                f"{sweep.finished(row)[0].figures['parameters']:,.0f}",
                f"{cost.steps:,}",
                f"{all_of['cost.tokens'] / 1e6:.2f}",
                f"{all_of['cost.flops'] / 1e12:.1f}",
                shown(estimate(figure(sweep, row, NATS).values())),
                shown(estimate(figure(sweep, row, PERPLEXITY).values()), 1),
                shown(_ratio(sweep, row, base)),
                shown(estimate(figure(sweep, row, "likelihood.bits_per_byte").values())),
                str(len(sweep.finished(row))),
            ]
        )
    for nats in list(figure(sweep, next(reversed(rows)), "eval.unigram.nats_per_token").values())[:1]:
        cells.append(["frequencies of single tokens", *[""] * 4, f"{nats:.3f}", f"{math.exp(nats):,.1f}", *[""] * 3])
    header = ["", "parameters", "steps", "million tokens", "TFLOPs", "nats per token", "perplexity", "perplexity / AR"]
    return markdown([*header, "bits per byte", "seeds"], cells)


def reach_table(sweep: Sweep) -> str:
    """When each model has the final held-out loss of others."""
    cells = []
    for row, name in _present(sweep, MAIN):
        shares = []
        for other in ("model=MDLM", LONG, "model=AR"):
            found = steps_to_equal(sweep, row, other)
            steps = [one.steps for one in found if one.steps is not None]
            never = len(found) - len(steps)
            first = "at most " if any(one.at_most for one in found) else ""
            text = first + shown(estimate(steps), 0) if steps else ""
            shares.append("never" if never and not steps else f"{text} ({never} never)" if never else text)
        cells.append([name, *shares])
    return markdown(["steps until the final held-out loss of", "MDLM", "MDLM, 3 x the steps", "AR"], cells)


def variants_table(sweep: Sweep, rows: Mapping[str, str]) -> str:
    """Variants of ARMD: likelihood left to right, in streams and in random orders."""
    cells = [
        [
            name,
            shown(estimate(figure(sweep, row, NATS).values())),
            shown(_ratio(sweep, row, REFERENCE)),
            *(shown(estimate(figure(sweep, row, f"eval.strided.{s}.nats_per_token").values())) for s in STREAMS),
            shown(estimate(figure(sweep, row, "eval.random_orders.nats_per_token").values())),
        ]
        for row, name in _present(sweep, rows)
    ]
    header = [
        "",
        "left to right",
        "perplexity / the default's",
        *(f"S = {count}" for count in STREAMS),
        "random orders",
    ]
    return markdown(header, cells)


def price_table(sweep: Sweep) -> str:
    """What streams cost in likelihood, taken apart."""
    cells = []
    for row, name in _present(sweep, {"SBP=0": "no SBP", "SBP=2.5": "SBP 2.5%", REFERENCE: "SBP 20%"}):
        for streams in STREAMS:
            parts = [
                estimate(figure(sweep, row, f"eval.price.{streams}.{part}").values())
                for part in ("independence_gap", "order_cost_per_stream")
            ]
            cells.append([name, str(streams), shown(parts[0], 4), shown(parts[1], 2)])
    return markdown(["", "S", "independence gap, nats per token", "cost of the order, nats per further stream"], cells)


def generation_table(sweep: Sweep, row: str) -> str:
    """Texts of the main ARMD, in streams and losslessly."""
    cells = []
    for mode, streams in (("strided", 1), ("strided", 2), ("strided", 4), ("strided", 8), ("lossless", 2)):
        values = {
            what: figure(sweep, row, generated(what, streams, mode))
            for what in ("generative_perplexity", "entropy_nats", "distinct_2", "calls_per_token", "tokens_per_second")
        }
        if values["generative_perplexity"]:
            perplexity, entropy, distinct, calls, speed = (estimate(found.values()) for found in values.values())
            cells.append(
                [
                    f"{mode}, S = {streams}",
                    shown(perplexity, 1),
                    "1" if (mode, streams) == ("strided", 1) else shown(_generated_ratio(sweep, streams, mode)),
                    shown(entropy),
                    shown(distinct),
                    shown(calls),
                    shown(speed, 0),
                ]
            )
    header = ["", "generative perplexity", "/ S = 1", "entropy, nats", "distinct pairs", "calls per token", "tokens/s"]
    return markdown(header, cells)


def lossless_table(sweep: Sweep) -> str:
    """Lossless decoding with and without contiguous blocks in training."""
    cells = []
    for row, name in _present(sweep, VARIANTS["blocks"]):
        for streams in (2, 4):
            calls, perplexity = (
                estimate(figure(sweep, row, generated(what, streams, "lossless")).values())
                for what in ("calls_per_token", "generative_perplexity")
            )
            if calls is not None:
                cells.append([name, str(streams), shown(calls), shown(perplexity, 1)])
    return markdown(["contiguous blocks", "S", "calls per token", "generative perplexity"], cells)


def sizes_table(sweep: Sweep) -> str:
    """Models of several widths, and a power law through each kind."""
    cells = []
    kinds = {"AR": "AR", "ARMD-identity": "ARMD, identity order"}
    for kind, name in kinds.items():
        found = widths(sweep, kind)
        for size, work, nats in found:
            cells.append([name, f"{size / 1e6:.2f}", f"{work / 1e12:.1f}", f"{nats:.3f}", ""])
        if len(found) > 2:
            _, exponent = power_law([one[0] for one in found], [one[2] for one in found])
            cells[-1][-1] = f"{exponent:.3f}"
    return markdown(["", "million parameters", "TFLOPs", "nats per token", "exponent of the fit"], cells)


def rates_table(sweep: Sweep) -> str:
    """Held-out loss at every learning rate that was tried; the rows of `size` have the chosen ones."""
    import study

    cells = []
    for kind, several in study.RATES.items():
        words = []
        for rate in several:
            row = f"size=192-{kind}" if rate == study.BEST[kind] else f"rate={kind}-{rate:g}"
            loss = by_seed(sweep, row, "metrics.eval/nll")
            mark = "**" if rate == study.BEST[kind] else ""
            words += [f"{rate:g}: {mark}{value:.3f}{mark}" for value in loss.values()]
        if words:
            cells.append([kind, ", ".join(words)])
    return markdown(["", "held-out nats per token by learning rate; the chosen one is bold"], cells)


def starts_table(sweep: Sweep) -> str:
    """Parametrisations that were not taken, beside those that were."""
    rows = {
        "size=192-AR": "AR as it is",
        "start=AR-zero": "AR, residual projections start at 0",
        "start=AR-embedding-1": "AR, vectors of tokens learn at the rate of the others",
        "size=192-ARMD-identity": "ARMD in the identity order as it is",
        "start=ARMD-unscaled": "ARMD, residual projections start unscaled",
        "size=192-MDLM": "MDLM as it is",
        "start=MDLM-unscaled": "MDLM, residual projections start unscaled",
    }
    cells = [
        [name, shown(estimate(by_seed(sweep, row, "metrics.eval/nll").values()))] for row, name in _present(sweep, rows)
    ]
    return markdown(["", "held-out nats per token"], cells)

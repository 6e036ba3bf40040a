"""Every table and figure of speech on the study's page, from the figures of its members."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from armd_jax.report import sweep_paths
from armd_jax.report.sweep_reading import Sweep
from armd_jax.report.sweep_statistics import Estimate, by_seed, estimate, paired_ratio, steps_to_equal

PERPLEXITY = "likelihood.perplexity_per_token"
NATS = "likelihood.nats_per_token"
MAIN = {
    "model=AR": "AR",
    "model=ARMD-identity": "ARMD, identity order",
    "model=ARMD-curriculum": "ARMD, curriculum and SBP",
    "model=MDLM": "MDLM (upper bound)",
}
EQUAL_FLOPS = {
    "model=AR-equal-FLOPs": "AR",
    "model=ARMD-identity": "ARMD, identity order",
    "model=ARMD-curriculum": "ARMD, curriculum and SBP",
    "model=MDLM-equal-FLOPs": "MDLM (upper bound)",
}
CURRICULUM = "model=ARMD-curriculum"
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


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that was asked for: a figure, the limit that it shall not pass, and what it was measured to be."""

    words: str
    limit: float
    better: Literal["lower", "higher", "equal"]
    measured: Estimate | None

    def verdict(self) -> str:
        """Whether it is met; within a standard error of the limit, this is said."""
        if self.measured is None:
            return "not measured"
        mean, error = self.measured.mean, self.measured.error or 0.0
        near = abs(mean - self.limit) <= error
        match self.better:
            case "lower":
                met = mean <= self.limit
            case "higher":
                met = mean >= self.limit
            case "equal":
                return "met, within a standard error" if near else "met within two" if _twice(self) else "**missed**"
        return f"{'met' if met else '**missed**'}{', but within a standard error of the limit' if near else ''}"


def _twice(claim: Claim) -> bool:
    assert claim.measured is not None
    return abs(claim.measured.mean - claim.limit) <= 2 * (claim.measured.error or 0.0)


def named(measured: Mapping[str, Any], sweep: Sweep) -> dict[str, str]:
    """What the names in template.md stand for."""
    seconds = measured["seconds"]
    found = {
        "hardware": f"{measured['cores']} {measured['machine']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in measured["versions"].items()),
        "hours": "an unknown time" if seconds is None else f"{seconds // 3600} h {seconds % 3600 // 60} min",
        "members": str(len(sweep.members)),
        "claims": claims_table(claims(sweep)),
        "equal_steps": main_table(sweep, MAIN),
        "equal_flops": main_table(sweep, EQUAL_FLOPS),
        "reach": reach_table(sweep),
        "generation": generation_table(sweep, CURRICULUM),
        "lossless": lossless_table(sweep),
        "sizes": sizes_table(sweep),
        "rates": rates_table(sweep),
        "price": price_table(sweep),
    }
    return found | {name: variants_table(sweep, rows) for name, rows in VARIANTS.items()}


# --- figures --------------------------------------------------------------------------------------------------------


def figure(sweep: Sweep, row: str, name: str) -> dict[int | None, float]:
    """A figure of the members of a row, by seed. The name may name items of lists by some of their settings."""
    found: dict[int | None, float] = {}
    for member in sweep.finished(row):
        fitting = [name] if name in member.figures else sweep_paths.fitting(name, member.figures)
        if len(fitting) == 1:
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


def _reached(sweep: Sweep, row: str, baseline: str) -> Estimate | None:
    """The share of the baseline's steps after which a row has reached its final loss."""
    found = steps_to_equal(sweep, row, baseline)
    if not found or any(one.steps is None for one in found):
        return None
    return estimate([one.steps / one.baseline_steps for one in found if one.steps is not None])


def claims(sweep: Sweep) -> list[Claim]:
    """What the study was asked to find out, and what it found."""
    identity, curriculum, ar, mdlm = "model=ARMD-identity", CURRICULUM, "model=AR", "model=MDLM"
    return [
        Claim("perplexity of ARMD in the identity order / AR", 0.98, "lower", _ratio(sweep, identity, ar)),
        Claim("perplexity of ARMD under the curriculum with SBP / AR", 1.0, "lower", _ratio(sweep, curriculum, ar)),
        Claim("perplexity of MDLM (an upper bound) / AR", 1.2, "higher", _ratio(sweep, mdlm, ar)),
        Claim("generative perplexity, S = 2 / S = 1", 1.04, "lower", _generated_ratio(sweep, 2)),
        Claim("generative perplexity, S = 4 / S = 1", 1.08, "lower", _generated_ratio(sweep, 4)),
        Claim("entropy, S = 2 minus S = 1, nats, within 0.05", 0.05, "lower", _size(entropy_change(sweep, 2))),
        Claim("entropy, S = 4 minus S = 1, nats, within 0.05", 0.05, "lower", _size(entropy_change(sweep, 4))),
        Claim("generative perplexity, lossless / S = 1", 1.0, "equal", _generated_ratio(sweep, 2, "lossless")),
        Claim("steps of ARMD until MDLM's final loss / MDLM's", 1 / 3, "lower", _reached(sweep, curriculum, mdlm)),
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
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if not lines:
        return "(Not trained in this form of the study.)"
    return "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines])


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
                shown(claim.measured),
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
            ]
        )
    header = [
        "",
        "steps",
        "million tokens",
        "TFLOPs",
        "nats per token",
        "perplexity",
        "perplexity / AR",
        "bits per byte",
    ]
    return markdown(header, cells)


def reach_table(sweep: Sweep) -> str:
    """When each model has the final held-out loss of others."""
    cells = []
    for row, name in _present(sweep, MAIN):
        shares = []
        for other in ("model=MDLM", "model=AR"):
            found = steps_to_equal(sweep, row, other)
            steps = [one.steps for one in found if one.steps is not None]
            never = len(found) - len(steps)
            first = "at most " if any(one.at_most for one in found) else ""
            text = first + shown(estimate(steps), 0) if steps else ""
            shares.append("never" if never and not steps else f"{text} ({never} never)" if never else text)
        cells.append([name, *shares])
    return markdown(["steps until the final held-out loss of", "MDLM", "AR"], cells)


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
    return markdown(["", "S", "independence gap, nats per token", "cold start, nats per further stream"], cells)


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

"""Every table and figure of speech on the study's page, from the figures of its members."""

import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from figures import (
    CURRICULUM,
    EQUAL_FLOPS,
    JUDGE,
    LONG,
    MAIN,
    NATS,
    PERPLEXITY,
    REFERENCE,
    STREAMS,
    VARIANTS,
    Claim,
    claims,
    figure,
    generated,
    generated_ratio,
    power_law,
    ratio,
    widths,
)

from armd_jax.report import sweep_text
from armd_jax.report.sweep_reading import Member, Sweep
from armd_jax.report.sweep_statistics import Estimate, by_seed, estimate, steps_to_equal

# Ratios of perplexities that conclusions may name, beside those of the claims.
RATIOS = {
    "ratio_left_path": ("model=AR-left-path", "model=AR"),
    "ratio_flops_identity": ("model=ARMD-identity", "model=AR-equal-FLOPs"),
    "ratio_flops_curriculum": (CURRICULUM, "model=AR-equal-FLOPs"),
    "ratio_rest": ("model=ARMD-identity", "model=AR-left-path"),
    "ratio_uniform": ("order=uniform", REFERENCE),
    "ratio_positional": ("aggregator=positional", REFERENCE),
    "ratio_both": ("aggregator=both-neighbours", REFERENCE),
    "ratio_all_layers": ("M=4", REFERENCE),
    "ratio_no_sbp": ("SBP=0", REFERENCE),
    "ratio_blocks": ("blocks=contiguous", REFERENCE),
    "ratio_half_AR": ("rate=AR-0.012-whole", "model=AR"),
    "ratio_half_ARMD": ("rate=ARMD-identity-0.012-whole", "model=ARMD-identity"),
}


def named(measured: Mapping[str, Any], sweep: Sweep) -> dict[str, str]:
    """What the names in template.md stand for."""
    seconds, text = measured["seconds"], measured["text"]
    judge = sweep.finished(JUDGE)
    found = {
        "hardware": measured["hardware"],
        "jobs": str(measured["jobs"] or "not known"),
        "parameters": _parameters(sweep),
        "versions": ", ".join(f"{name} {version}" for name, version in measured["versions"].items()),
        "hours": "an unknown time" if seconds is None else _time(seconds),
        "members": _members(len(sweep.members), measured["planned"]),
        "short": _steps(sweep, REFERENCE),
        "steps": _steps(sweep, CURRICULUM),
        "held_out": _held_out(),
        "text": "an unknown text" if text is None else _text(text),
        "judge": _described(sweep, judge[0]) if judge else "an AR model of the main rows",
        "claims": claims_table(claims(sweep).values()),
        **{f"claim_{key}": _claimed(claim) for key, claim in claims(sweep).items()},
        **{name: shown(ratio(sweep, row, base)) for name, (row, base) in RATIOS.items()},
        "full_size": full_size_table(),
        "equal_steps": main_table(sweep, MAIN),
        "equal_flops": main_table(sweep, EQUAL_FLOPS),
        "reach": reach_table(sweep),
        "generation": generation_table(sweep, CURRICULUM),
        "lossless": lossless_table(sweep),
        "sizes": sizes_table(sweep),
        "rates": rates_table(sweep),
        "whole_rates": rates_table(sweep, whole=True),
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


def _parameters(sweep: Sweep) -> str:
    """Millions of parameters of the main rows."""
    sizes = {f"{member.figures['parameters'] / 1e6:.1f}" for row in MAIN for member in sweep.finished(row)}
    return " to ".join(sorted(sizes, key=float)[:: max(len(sizes) - 1, 1)])


def _held_out() -> str:
    """Percent of the documents that each held-out split has."""
    import study

    data = study.base(study.FORMS[""]).data
    assert data.valid_fraction == data.test_fraction
    return f"{100 * data.valid_fraction:g}"


def _time(seconds: float) -> str:
    """To the nearest minute."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


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


def _claimed(claim: Claim) -> str:
    return f"{claim.bound} {shown(claim.measured)}".strip() if claim.measured else ""


def claims_table(found: Iterable[Claim]) -> str:
    """Asked, measured, and whether it is met."""
    signs = {"lower": "≤", "higher": "≥", "equal": "="}
    return markdown(
        ["", "asked", "measured", "seeds", ""],
        [
            [
                claim.words,
                f"{signs[claim.better]} {claim.limit:.2f}",
                _claimed(claim),
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
                shown(ratio(sweep, row, base)),
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
            shown(ratio(sweep, row, REFERENCE)),
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
                    "1" if (mode, streams) == ("strided", 1) else shown(generated_ratio(sweep, streams, mode)),
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


def rate_losses(sweep: Sweep, kind: str, whole: bool = False) -> dict[float, float]:
    """Held-out nats per token of a kind of model by learning rate, of seed 0.

    The rows of `size` have the chosen rate. whole: of trainings as long as the main rows, which have it there.
    """
    import study

    chosen, end = ("model=", "-whole") if whole else ("size=192-", "")
    losses = {}
    for rate in study.RATES[kind]:
        row = f"{chosen}{kind}" if rate == study.BEST[kind] else f"rate={kind}-{rate:g}{end}"
        found = by_seed(sweep, row, "metrics.eval/nll")
        if 0 in found:
            losses[rate] = found[0]
    return losses


def rates_table(sweep: Sweep, whole: bool = False) -> str:
    """Held-out loss at every learning rate that was tried, and whether the chosen one is the best of them."""
    import study

    cells = []
    for kind in study.HALVED if whole else study.RATES:
        losses, chosen = rate_losses(sweep, kind, whole), study.BEST[kind]
        marks = {rate: "**" if rate == chosen else "" for rate in losses}
        words = [f"{rate:g}: {marks[rate]}{loss:.3f}{marks[rate]}" for rate, loss in losses.items()]
        if words:
            best = min(losses, key=losses.__getitem__)
            gain = losses.get(chosen, math.nan) - losses[best]
            cells.append([kind, ", ".join(words), "the chosen one" if best == chosen else f"{best:g}, by {gain:.3f}"])
    return markdown(["", "held-out nats per token by learning rate; the chosen one is bold", "best"], cells)


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


def full_size_table() -> str:
    """What the presets are said to cost on TPUs by launch/PROOF.md, which `armd compile` measured."""
    lines = (pathlib.Path(__file__).resolve().parents[2] / "launch/PROOF.md").read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| preset | slice |"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(bool, lines[start:])]
    header, _, *rows = table
    wanted = [header.index(name) for name in ("preset", "slice", "chip-hours, bound to published efficiency")]
    return markdown(["preset", "", "chip-hours"], [[row[at] for at in wanted] for row in rows])

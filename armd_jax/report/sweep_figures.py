"""What is known of a figure by its name: whether less or more of it is better, and whether it is one of speed.

The names are the dotted paths of `sweep_reading`.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from armd_jax.errors import UserError, shown
from armd_jax.report.sweep_reading import Member, Sweep
from armd_jax.training.run_log import SPEED

Bound = Literal["", "≤", "≥"]
Better = Literal["lower", "higher", "neither"]
Table = Literal["training and likelihood", "suites", "generation"]

# The last part of a path is cut into words. Properties of the text, and errors of figures, are neither. So are figures
# of drawn texts of which a good one alone is no merit: a text that repeats itself is likely.
_NEITHER = {"error", "least", "learning", "norm", "spread", "generative", "repetition"}
_TEXT_ALONE = ("eval.unigram", "eval.xz_bits_per_byte")
_LOWER = {"nll", "loss", "nats", "perplexity", "ppl", "bits", "gap", "cost", "seconds", "calls", "cold"}
_HIGHER = {"accuracy", "acc", "mauve", "distinct", "mfu", "second"}
_DOTS = re.compile(r"\.(?![^[]*\])")  # those that are not inside brackets
_WORDS = {
    "metrics.eval/nll": "held-out loss (nats per token)",
    "metrics.train/nll": "training loss (nats per token)",
}
_MOST = 12  # columns of a table that nobody asked for
# Of texts that a model drew: the two figures that only say something together, at the temperature that changes nothing.
_DRAWN = re.compile(r"generation\..*\btemperature=1(\.0)?\b.*\.(generative_perplexity|entropy_nats)")


def table_of(figure: str) -> Table:
    """The table that a figure is a column of."""
    match figure.partition(".")[0]:
        case "suites":
            return "suites"
        case "generation":
            return "generation"
        case _:
            return "training and likelihood"


def better(figure: str) -> Better:
    """Whether a lower or a higher value is the better one."""
    words = set(re.split(r"[^a-z]+", figure.rpartition(".")[2].lower()))
    if words & _NEITHER or "entropy" in words or figure.startswith((*_TEXT_ALONE, "cost.")):
        return "neither"
    if words & _HIGHER:
        return "higher"
    return "lower" if words & _LOWER else "neither"


def of_speed(figure: str) -> bool:
    """Whether a figure differs between two runs that are equal to the last bit, because it measures time."""
    name = figure.rpartition(".")[2]
    return figure.removeprefix("metrics.") in SPEED or bool({"second", "seconds"} & set(name.split("_")))


def bound(member: Member, figure: str) -> Bound:
    """Whether a member's figure only bounds the true one: "≤" if that is at most as high, "≥" if it is at least so."""
    if figure.endswith(".nll_at_least"):
        return "≥"
    return "≤" if figure.endswith(".nll_at_most") or _bounds_the_loss(member, figure) else ""


def bound_of_row(sweep: Sweep, row: str, figure: str) -> Bound:
    """The same of a row: that of the first of its finished members whose figure is a bound."""
    found = (bound(one, figure) for one in sweep.finished(row) if figure in one.figures)
    return next(filter(None, found), "")


def _bounds_the_loss(member: Member, figure: str) -> bool:
    if figure.startswith(("metrics.eval/nll", "metrics.eval/perplexity")):
        return member.bounds
    if better(figure) != "lower":
        return False
    if figure.startswith("suites."):
        return _is_bound(member.documents.get("suites"))
    evaluation = member.documents.get("eval")
    exact = isinstance(evaluation, dict) and evaluation.get("left_to_right") is not None
    return figure.startswith("eval.elbo.") or (figure.startswith("likelihood.") and not exact)


def _is_bound(suites: Any) -> bool:
    """Whether suites.json says that its figures are bounds: it is one model's, so all of them are or none."""
    figures = suites.get("figures") if isinstance(suites, dict) else None
    return isinstance(figures, list) and any(isinstance(one, dict) and one.get("bound") is True for one in figures)


def words(figure: str) -> str:
    """The figure for people: `eval.strided.4.bits_per_byte` is "strided 4, bits per byte", and brackets are rounded."""
    if figure in _WORDS:
        return _WORDS[figure]
    file, _, rest = figure.partition(".")
    parts = [part.replace("_", " ") for part in _DOTS.split(rest)] if rest else [file]
    head = " ".join(parts[:-1]) if file == "eval" else " ".join([file, *parts[:-1]])
    text = f"{head}, {parts[-1]}" if head else parts[-1]
    return re.sub(r"\[([^]]*)\]", lambda found: f" ({found[1].replace(',', ', ')})", text)


def known(members: Collection[Member]) -> list[str]:
    """Every figure that a member has, in the sequence in which files name them."""
    return list(dict.fromkeys(figure for member in members for figure in member.figures))


def chosen(sweep: Sweep, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of the table: the figures that are wanted, by default those that compare models.

    Raises UserError if no finished member has a wanted figure.
    """
    names = known([member for member in sweep.members if member.finished])
    if not names:
        raise UserError(
            "the finished members of the sweep have no figures: there is neither config.json nor metrics.jsonl"
        )
    usual = _usual(sweep, names) or tuple(names[:1])
    for figure in wanted:
        if figure not in names:
            close = difflib.get_close_matches(figure[:200], names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known, among others: {', '.join(usual)}"
            raise UserError(f"--metric={shown(figure)}: no finished member has it; {hint}")
    return tuple(dict.fromkeys(wanted)) or usual


def _usual(sweep: Sweep, names: Sequence[str]) -> tuple[str, ...]:
    unit = "bits_per_byte" if "likelihood.bits_per_byte" in names else "nats_per_token"
    documents = [member.documents.get("eval") for member in sweep.members if member.finished]
    all_exact = all(one.get("left_to_right") for one in documents if isinstance(one, dict))
    score = "eval.left_to_right" if all_exact else "likelihood"
    found = ["metrics.eval/nll", f"{score}.perplexity_per_token", f"{score}.{unit}"]
    found += sorted((name for name in names if re.fullmatch(rf"eval\.strided\.\d+\.{unit}", name)), key=_streams)
    found += [f"eval.random_orders.{unit}"]
    found += [f"eval.elbo.{unit}"] if all_exact else []
    suites = [name for name in names if re.fullmatch(r"suites\..*(\.score\.perplexity|\.accuracy)", name)]
    drawn = [name for name in names if _DRAWN.fullmatch(name) and "[text=" not in name]
    return tuple(name for some in (found, suites, drawn) for name in [one for one in some if one in names][:_MOST])


def _streams(figure: str) -> int:
    return int(figure.split(".")[2])

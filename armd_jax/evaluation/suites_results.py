"""The results of `armd eval --suite`, and the file `suites.json` in a run's folder that holds them."""

import dataclasses
import pathlib
from typing import assert_never

from armd_jax import typed
from armd_jax.evaluation import results
from armd_jax.evaluation.results import formatted
from armd_jax.names import Split, SuiteProtocol, SuiteSet

FILE = "suites.json"
_RAW: tuple[SuiteSet, ...] = ("wikitext2", "wikitext103")  # sets whose published figures are of a form without `<unk>`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """Nats of some tokens. standard_error: of nats per token, over the draws of a bound; None if it is not known."""

    nats: float
    tokens: int
    nats_per_token: float
    perplexity: float | None
    standard_error: float | None = typed.field(None, absent_if_none=True)


def counted(nats: float, tokens: int, standard_error: float | None = None) -> Counted | None:
    """The figure of these nats; None if there are no tokens."""
    if not tokens:
        return None
    return Counted(
        nats=nats,
        tokens=tokens,
        nats_per_token=nats / tokens,
        perplexity=results.perplexity(nats / tokens),
        standard_error=standard_error,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One split of one set in one protocol.

    published: whether the published code of the protocol measures this split of this set.
    source: the files that were read. records, words, bytes: what they hold, before detokenising; words are stretches
        between spaces, and one end for each record. unknown: how often `<unk>` stands for a word. The published figures
        of WikiText are of its raw form, which has none; those of PTB are of a form that has it.
    tokenized: of LAMBADA, whether most passages are in the original, tokenised form rather than in the one that OpenAI
        published; None for another set, and in files of earlier versions.
    text_tokens: tokens of the text, an end-of-text behind every record included.
    chunk: tokens of a chunk, with those that the protocol adds. added: how many those are. chunks: whole chunks.
    dropped: tokens of the text behind the last whole chunk, which the protocol drops.
    limited: whether `--limit-rows` ended the reading, so that none of these sizes is that of the whole set.
    bound: whether figures are bounds (ELBO), as those of a denoiser. draws: of the bound; 1 for exact figures.
    score: the protocol's figure: all tokens of all whole chunks. None if no chunk is whole.
    given_first: the same without the first token of each chunk, which the protocol's autoregressive models are given;
        None if the protocol does not add it, or for a bound, which is one of whole chunks only.
    every_token: every token of the text once, the last chunk included and what the protocol adds left out; None for a
        bound of chunks to which something is added.
    perplexity_per_word: of `every_token`, divided among the words.
    """

    protocol: SuiteProtocol
    set: SuiteSet
    split: Split
    published: bool
    source: str
    records: int
    words: int
    bytes: int
    unknown: int
    text_tokens: int
    chunk: int
    added: int
    chunks: int
    dropped: int
    limited: bool
    bound: bool
    draws: int
    score: Counted | None
    given_first: Counted | None = typed.field(None, absent_if_none=True)
    every_token: Counted | None = typed.field(None, absent_if_none=True)
    perplexity_per_word: float | None = typed.field(None, absent_if_none=True)
    tokenized: bool | None = typed.field(None, absent_if_none=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWord:
    """How well the last words of LAMBADA's passages are told from what stands before them.

    tokenized: whether the passages are in the original, tokenised form (spaces before punctuation) rather than in the
        one that OpenAI published. passages: how many. cut: those that are longer than the model's rows and lost their
        beginning.
    correct: passages all of whose last word's tokens are the likeliest ones. accuracy: their share; standard_error: of
        it. tokens: of all last words. perplexity_per_word, perplexity_per_token: of the last words.
    """

    source: str
    tokenized: bool
    passages: int
    cut: int
    correct: int
    accuracy: float
    standard_error: float
    tokens: int
    perplexity_per_word: float | None
    perplexity_per_token: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing:
    """A split of a set that was not found."""

    protocol: SuiteProtocol
    set: SuiteSet
    split: Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suites:
    """Everything that one `armd eval --suite` measured, as `suites.json` holds it.

    length: the model's max_length, which chunks have. documents_apart: whether documents of a chunk are kept apart, as
    the model was trained with `data.reset=document`; the protocols know no such thing. limit_rows: chunks of each set
    (and passages of LAMBADA) at most; None: all. ema: whether the average of the weights was asked for rather than the
    raw ones; None if a file does not say.
    """

    length: int
    documents_apart: bool
    seed: int
    limit_rows: int | None = typed.field(None, absent_if_none=True)
    figures: tuple[Figure, ...]
    last_word: LastWord | None = typed.field(None, absent_if_none=True)
    missing: tuple[Missing, ...] = ()
    ema: bool | None = typed.field(None, absent_if_none=True)


# Zero-shot perplexities that papers report, for models trained on OpenWebText with GPT-2's vocabulary in rows of 1,024:
# Karami & Ghodsi (2026), whose tables quote the others. They do not say which split of WikiText-2 was taken.
PUBLISHED_SETS: tuple[SuiteSet, ...] = ("lambada", "wikitext2", "ptb", "wikitext103", "lm1b")
PUBLISHED = {
    "GPT-2, small": (45.04, 42.43, 138.43, 41.60, 75.20),
    "SEDD, small (bound)": (50.92, 41.84, 114.24, 40.62, 79.29),
    "RADD, small (bound)": (51.70, 39.98, 107.85, 37.98, 72.99),
    "ARMD 180K, small": (44.66, 36.25, 130.31, 35.66, 53.18),
    "ARMD 400K, small": (45.35, 35.64, 123.43, 35.15, 52.94),
    "GPT-2, medium": (35.66, 31.80, 123.14, 31.39, 55.72),
    "SEDD, medium (bound)": (42.77, 31.04, 87.12, 29.98, 61.19),
    "RADD, medium (bound)": (44.10, 30.60, 82.08, 29.29, 60.32),
    "ARMD 120K, medium": (40.62, 27.57, 105.09, 27.09, 45.49),
    "ARMD 300K, medium": (39.08, 26.06, 97.75, 25.55, 43.91),
}


def read(run: pathlib.Path) -> Suites | None:
    """What `armd eval --suite` left in a run's folder; None if there is nothing. Raises UserError if it is damaged."""
    return results.read_file(Suites, run / FILE, "armd eval --suite=all")


HEADER = (
    "set",
    "split",
    "perplexity",
    "± nats",
    "tokens",
    "dropped",
    "first given",
    "every token",
    "words",
    "per word",
)


def cells(figure: Figure) -> list[str]:
    """A line of the tables, as `HEADER` names its columns."""

    def shown(perplexity: float | None) -> str:
        return ("≤ " if figure.bound and perplexity is not None else "") + formatted(perplexity, 2)

    def of(found: Counted | None) -> str:
        return shown(None if found is None else found.perplexity)

    error = None if figure.score is None else figure.score.standard_error
    return [
        figure.set,
        figure.split + ("" if figure.published else "*"),
        of(figure.score),
        formatted(error, 4),
        f"{figure.score.tokens if figure.score else 0:,}",
        "?" if figure.limited else f"{figure.dropped:,}",
        of(figure.given_first),
        of(figure.every_token),
        "?" if figure.limited else f"{figure.words:,}",
        shown(figure.perplexity_per_word),
    ]


def heading(protocol: SuiteProtocol, found: Suites) -> str:
    """How a protocol cuts text, and whether the raw weights were taken, in one line."""
    match protocol:
        case "sedd":
            chunks = f"chunks of {found.length:,}"
        case "mdlm":
            chunks = f"chunks of {found.length - 2:,} between two end-of-texts"
        case _:
            assert_never(protocol)
    return f"{protocol}: end-of-text behind every record, {chunks}{results.raw_weights(found.ema)}"


def notes(found: Suites) -> list[str]:
    """What a reader of the tables has to know."""
    lines = []
    if any(not figure.published for figure in found.figures):
        lines.append("* by the protocol's rules, but the published code does not measure this split")
    if names := sorted({f"{one.set} {one.split}" for one in found.figures if one.unknown and one.set in _RAW}):
        lines.append(f"with <unk> in the text, unlike the raw form that was published: {', '.join(names)}")
    if names := sorted({f"{one.set} {one.split}" for one in found.figures if one.tokenized}):
        lines.append(f"in the original, tokenised form, unlike OpenAI's form that was published: {', '.join(names)}")
    if any(figure.bound and figure.set == "lambada" for figure in found.figures):
        lines.append("last words of LAMBADA are not measured: a denoiser predicts nothing from left to right")
    if found.limit_rows is not None:
        lines.append(f"at most {found.limit_rows:,} chunks or passages of each set (--limit-rows)")
    if found.documents_apart:
        lines.append("documents are kept apart, as in training (data.reset=document): not what the protocols do")
    for protocol in dict.fromkeys(one.protocol for one in found.missing):
        gone = [f"{one.set} {one.split}" for one in found.missing if one.protocol == protocol]
        lines.append(f"not there for {protocol}: {', '.join(gone)}")
    return lines


def last_word_line(found: LastWord) -> str:
    """The figures of last words in one line."""
    form = "original (tokenised) form" if found.tokenized else "OpenAI's form"
    cut = f"; {found.cut:,} passages lost their beginning" if found.cut else ""
    return (
        f"LAMBADA, last word: accuracy {found.accuracy:.2%} ± {found.standard_error:.2%}"
        f" ({found.correct:,} of {found.passages:,} passages), perplexity per word"
        f" {formatted(found.perplexity_per_word, 2)}, per token {formatted(found.perplexity_per_token, 2)}; {form}{cut}"
    )


def as_text(found: Suites) -> str:
    """The figures as tables for a terminal."""
    lines = []
    for protocol in dict.fromkeys(figure.protocol for figure in found.figures):
        lines.append(heading(protocol, found))
        table = [list(HEADER), *(cells(figure) for figure in found.figures if figure.protocol == protocol)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            first, rest = row[:2], row[2:]
            named = [f"{cell:<{width}}" for cell, width in zip(first, widths[:2], strict=True)]
            numbers = [f"{cell:>{width}}" for cell, width in zip(rest, widths[2:], strict=True)]
            lines.append("  ".join(named + numbers))
        lines.append("")
    if found.last_word is not None:
        lines.append(last_word_line(found.last_word))
    return "\n".join([*lines, *notes(found)]).rstrip()

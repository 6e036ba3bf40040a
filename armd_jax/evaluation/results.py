"""The results of `armd eval` and `armd sample`, and the files in a run's folder that hold them.

`eval.json` holds one `Evaluation`, `samples.json` one `Samples`. To add a figure of held-out text, add three things:
its field in `Evaluation`, its computation in `perplexity.evaluate`, and its row in `rows`. The table in the terminal,
the table of the report and the report's bars are all made from these rows.
"""

import dataclasses
import math
import pathlib
from typing import Any, Literal, TypeVar, assert_never

from armd_jax import files, typed
from armd_jax.errors import UserError
from armd_jax.names import DecodingMode, DenoisingSampler

EVALUATION_FILE = "eval.json"
SAMPLES_FILE = "samples.json"
_LARGEST = 2**53  # larger whole numbers count nothing in these files, and no float holds all of them

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a split is predicted in one way: its total nats, per token, per word and per byte.

    A figure is None if it is not known. Bits per byte are not known if the tokenizer is lossy, and figures read from a
    file are not known if they were not finite, because JSON has no infinity and no NaN.
    """

    nats_per_token: float | None = None
    perplexity_per_token: float | None = None
    perplexity_per_word: float | None = None
    bits_per_byte: float | None = None


@dataclasses.dataclass(frozen=True)
class RandomOrders(Score):
    """The expected score over uniformly random orders, which are drawn independently for every row.

    draws: random orders per row of tokens.
    standard_error: of nats_per_token over the draws, for the rows as they are. spread: the standard deviation of the
    nats of a row over orders, the root of the variance averaged over rows. Both are None after a single draw.
    """

    draws: int | None = None
    standard_error: float | None = typed.field(None, absent_if_none=True)
    spread: float | None = typed.field(None, absent_if_none=True)


@dataclasses.dataclass(frozen=True)
class Elbo(Score):
    """The bound that a masked diffusion gives (ELBO).

    diffusion_steps: T; None if time is continuous. draws: masks or masking times per row of tokens.
    standard_error: of nats_per_token over the draws; None if it is not known, as after a single draw.
    """

    diffusion_steps: int | None = None
    draws: int | None = typed.field(None, absent_if_none=True)
    standard_error: float | None = typed.field(None, absent_if_none=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderBound:
    """What K orders say of the negative log-likelihood of the mixture over all orders, in nats per token.

    nll_at_most: an estimate of something that is at least the negative log-likelihood, and nll_at_least of
    something that is at most it, both in expectation over the draws; see `evaluation.order_bounds`. One order bounds it
    on one side only. Errors are standard errors over the draws, None if they are not known.
    """

    nll_at_most: float | None = None
    nll_at_most_error: float | None = None
    nll_at_least: float | None = None
    nll_at_least_error: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderBounds:
    """Bounds on the likelihood of the mixture over all orders.

    shuffled: the orders are those in which that many tokens, drawn at random, stand in random order, and all others
    where they were; None: all permutations.
    rows: how many rows were scored, evenly spaced over the split. tokens: how many they hold.
    spread: the standard deviation of the nats of a row over orders; None after a single draw.
    bounds: by the number of orders, which is written out ("4"), fewest first.
    """

    shuffled: int | None = typed.field(None, absent_if_none=True)
    rows: int = 0
    tokens: int = 0
    spread: float | None = None
    bounds: dict[str, OrderBound] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Nats of the tokens that are the `first`-th to `last`-th (from 1) of their streams. tokens: how many there are."""

    first: int
    last: int
    tokens: int
    nats_per_token: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPrice:
    """What writing in S streams costs, taken apart (see `evaluation.parallel_price`), in nats per token.

    nats_per_token: of the strided order, whose blocks are factorised.
    independence_gap: that, minus the same sequence one token at a time. order_cost: the latter, minus left to right.
    Their errors are standard errors over rows of text; nothing else is random here.
    order_cost_per_stream: the same in nats for each stream more than with S = 1; None for S = 1.
    late_nats_per_token: late in the stream. cold_start: nats of a stream beyond that, from its head on.
    places: nats by place in the stream.
    """

    nats_per_token: float | None = None
    independence_gap: float | None = None
    independence_gap_error: float | None = None
    order_cost: float | None = None
    order_cost_error: float | None = None
    order_cost_per_stream: float | None = None
    late_nats_per_token: float | None = None
    cold_start: float | None = None
    places: tuple[Place, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All figures of one split of held-out text, as `perplexity.evaluate` returns them.

    split: "train", "valid" or "test". lossless: whether the tokenizer is.
    documents, bytes, words, tokens, rows: the size of the split, see `data.manifest.Counts`; 0 if a file does not say.
    left_to_right: exact; None if the model has no exact likelihood, as a denoiser.
    strided: scores of strided orders by the number of streams, which is written out ("4"): keys of JSON are texts.
    random_orders, elbo: None if they were not measured.
    order_bounds: of the mixture over all orders; None if it was not asked for.
    price: of writing in streams, by their number, which is written out; None if it was not asked for.
    unigram: the score of the token frequencies of the training split.
    xz_bits_per_byte: bits per byte that `xz -9e` needs after the training text; None if that cannot be known.
    seed: of the random orders.
    ema: whether the average of the weights was asked for rather than the raw ones; None if a file does not say.
    other_text: whether the text is not that of the run, but one that `--data` named; the unigram model and the
        compressor are then those of its own training split.
    """

    split: str
    lossless: bool
    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    rows: int = 0
    left_to_right: Score | None = typed.field(None, absent_if_none=True)
    random_orders: RandomOrders | None = typed.field(None, absent_if_none=True)
    strided: dict[str, Score] = dataclasses.field(default_factory=dict)
    elbo: Elbo | None = typed.field(None, absent_if_none=True)
    order_bounds: OrderBounds | None = typed.field(None, absent_if_none=True)
    price: dict[str, StreamPrice] | None = typed.field(None, absent_if_none=True)
    unigram: Score | None = None
    xz_bits_per_byte: float | None = None
    seed: int | None = None
    ema: bool | None = typed.field(None, absent_if_none=True)
    other_text: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The content of `eval.json`. Figures that were not measured, or that a model does not have, have no key."""
        plain: dict[str, Any] = typed.as_plain(self)
        return plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One text that a model wrote, and how.

    streams: S; None if a denoiser wrote it, which has a sampler and a number of steps instead (first-hitting sampling
    has no choice of steps). mode: of an ARMD; None: strided.
    num_calls: network calls (NFE) for the whole batch. tokens_per_second: of the whole batch.
    tokens: ids, at natural positions, those of a stop text included, which `text` leaves out. pieces: a short text for
    each of them. calls: the number (from 1) of the network call that made each of them, 0 if it was given. cut: how
    many tokens were drawn from the text's end on, which are no part of it.
    """

    streams: int | None = typed.field(None, absent_if_none=True)
    mode: DecodingMode | None = typed.field(None, absent_if_none=True)
    sampler: DenoisingSampler | None = typed.field(None, absent_if_none=True)
    steps: int | None = typed.field(None, absent_if_none=True)
    num_calls: int = 0
    tokens_per_second: float = 0.0
    text: str = ""
    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    calls: tuple[int, ...] = ()
    cut: int = 0

    @property
    def way(self) -> tuple[str, int, str, int]:
        """What tells ways of writing apart, and sorts them."""
        return self.mode or "", self.streams or 0, self.sampler or "", self.steps or 0

    @property
    def label(self) -> str:
        """The way of writing in a few words."""
        match self.sampler:
            case None if self.mode in (None, "strided"):
                return f"S = {self.streams}"
            case None:
                return f"{self.mode}, S = {self.streams}"
            case "first_hitting":
                return "first-hitting"
            case "ancestral":
                return f"ancestral, {self.steps} steps"
            case "confidence":
                return f"most confident first, {self.steps} steps"
            case _:
                assert_never(self.sampler)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples in one or several numbers of streams (or of steps), and the settings that all of them were drawn with.

    length: tokens per text. batch: texts that were drawn together. hardware: devices, for people.
    """

    length: int | None = None
    batch: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    hardware: str = ""
    samples: tuple[Sample, ...]


RowKind = Literal["exact", "order", "bound", "baseline", "compressor"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the tables.

    kind: "exact": the model's left-to-right likelihood. "order": the model's likelihood under other orders. "bound":
    the model's likelihood is at least this good. "baseline": a prediction without a network. "compressor": the size of
    the compressed text.
    """

    name: str
    kind: RowKind
    score: Score


def rows(result: Evaluation) -> list[Row]:
    """Everything that was measured, in the order in which tables and bars show it."""
    found = [Row("left to right (exact)", "exact", result.left_to_right)] if result.left_to_right else []
    found += [Row(f"strided, S = {streams}", "order", score) for streams, score in result.strided.items()]
    if orders := result.random_orders:
        drawn = "" if orders.draws is None else f", {orders.draws} drawn"
        found.append(Row(f"random orders (expected{drawn}{_give_or_take(orders.standard_error)})", "order", orders))
    if elbo := result.elbo:
        # Only an ARMD with diffusion blocks has time steps; a denoiser has continuous time.
        blocks = elbo.diffusion_steps is not None
        way, steps = ("diffusion blocks", f", T = {elbo.diffusion_steps}") if blocks else ("masked diffusion", "")
        found.append(Row(f"{way} (ELBO{steps}{_give_or_take(elbo.standard_error)})", "bound", elbo))
    whose = "other text's training split" if result.other_text else None
    if result.unigram:
        found.append(Row(f"unigram of the {whose or 'training split'}", "baseline", result.unigram))
    if result.xz_bits_per_byte is not None:
        compressed = Score(bits_per_byte=result.xz_bits_per_byte)
        found.append(Row(f"xz -9e after the {whose or 'training text'}", "compressor", compressed))
    return found


def _give_or_take(error: float | None) -> str:
    return "" if error is None else f", ± {error:.4f} nats per token"


def raw_weights(ema: bool | None) -> str:
    """What headings add if the raw weights were taken."""
    return "; raw weights (--no-ema)" if ema is False else ""


def perplexity(nats: float) -> float:
    """exp, infinite beyond what a float holds."""
    return math.inf if nats >= 700 else math.exp(nats)  # NaN stays NaN


def formatted(value: float | None, digits: int, absent: str = "–") -> str:
    """A figure for people, `absent` if it is not known."""
    return absent if value is None else f"{value:,.{digits}f}"


def formatted_bits(score: Score, lossless: bool, digits: int) -> str:
    """Bits per byte for people; a tokenizer that changes the text has none."""
    return formatted(score.bits_per_byte, digits, "–" if lossless else "n/a (lossy)")


def read_evaluation(run: pathlib.Path) -> Evaluation | None:
    """The evaluation in a run's folder that `armd eval` wrote, None if there is none.

    Raises UserError if the file is damaged or was not written by `armd eval`.
    """
    file = run / EVALUATION_FILE
    found = read_file(Evaluation, file, "armd eval")
    if found and found.left_to_right is None and found.elbo is None:
        raise UserError(f"{file}: has neither left_to_right nor elbo; write it again with armd eval")
    for name, group in (("strided", found.strided), ("price", found.price)) if found else ():
        if wrong := [key for key in group or () if not key.isdecimal()]:
            raise UserError(f"{file}: {name}={wrong!r}: expected numbers of streams; write it again with armd eval")
    return found


def read_samples(run: pathlib.Path) -> Samples | None:
    """The samples in a run's folder that `armd sample` wrote, None if there are none.

    Raises UserError if the file is damaged or was not written by `armd sample`.
    """
    return read_file(Samples, run / SAMPLES_FILE, "armd sample")


def read_file(cls: type[T], file: pathlib.Path, command: str) -> T | None:
    """What a command wrote into a file, None if there is no file. Raises UserError if it is damaged, or not that."""
    if not file.exists():
        return None
    again = f"write it again with {command}"
    try:
        values = files.read_json(file)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    try:
        return typed.build(cls, values, file.stem, _LARGEST, any_text=True)
    except UserError as error:
        raise UserError(f"{file}: not what {command} writes: {error}; {again}") from error

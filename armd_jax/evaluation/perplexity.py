"""Likelihoods of held-out text: exact left to right, expected over random orders, under strided orders, and an ELBO.

A denoiser has an ELBO and nothing else, because no order gives it an exact likelihood.

Every token of the split counts once, end-of-text and the last, partly filled row included; rows are independent.
Bits per byte = total nats / ln 2 / UTF-8 bytes of the original text, and only a lossless tokenizer has them.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from armd_jax.config import ModelConfig
from armd_jax.core import corruption, curriculum, documents, objective
from armd_jax.core import order as orders
from armd_jax.core.context import PLAIN, Context
from armd_jax.core.objective import Task
from armd_jax.core.order import Order
from armd_jax.core.parameters import Params
from armd_jax.data import loader
from armd_jax.data.manifest import Counts
from armd_jax.data.mixture import Data, place_of
from armd_jax.errors import UserError
from armd_jax.evaluation import baselines, order_bounds, parallel_price, results
from armd_jax.evaluation.parallel_price import ByPlace
from armd_jax.evaluation.results import Elbo, Evaluation, OrderBounds, RandomOrders, Score, StreamPrice
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import Reset
from armd_jax.order_config import OrderConfig
from armd_jax.training import sharding

# (key, tokens_BN, valid_BN) -> task. A static argument of compiled functions: the same task must be the same object.
MakeTask = Callable[[jax.Array, jax.Array, jax.Array], Task]
MakeOrder = Callable[[jax.Array, int, int], Order]  # (key, batch, length) -> order


@functools.partial(jax.jit, static_argnames=("config", "make_task", "context"))
def batch_nats(
    params: Params,
    config: ModelConfig,
    tokens_BN: jax.Array,
    valid_BN: jax.Array,
    key: jax.Array,
    make_task: MakeTask,
    context: Context,
) -> jax.Array:
    """Nats [B, N] float32 of every token, at natural positions, 0 at padding; of a corruption, those of its bound."""
    tokens_BN, valid_BN = (context.constrain(a, ("batch", "length")) for a in (tokens_BN, valid_BN))
    return objective.token_nats(params, config, tokens_BN, make_task(key, tokens_BN, valid_BN), context)


@functools.cache
def under_order(make_order: MakeOrder, end_of_text: int | None = None) -> MakeTask:
    """The task of an order: it, with padding behind everything else.

    end_of_text: the id behind every document, if documents are kept apart (`data.reset`): the order is then carried out
        in each of them by itself. None: they are not.
    """

    def make_task(key: jax.Array, tokens_BN: jax.Array, valid_BN: jax.Array) -> Task:
        made = orders.padding_last(make_order(key, *valid_BN.shape), valid_BN)
        return made if end_of_text is None else documents.keep_apart(made, documents.begins(tokens_BN, end_of_text))

    return make_task


@functools.cache
def _in_streams(streams: int, end_of_text: int | None) -> MakeTask:
    """The task of the strided order, whose streams are those of each document if documents are kept apart."""
    if end_of_text is None:
        return under_order(functools.partial(_strided, streams))

    def make_task(key: jax.Array, tokens_BN: jax.Array, valid_BN: jax.Array) -> Task:
        del key
        first_BN = documents.begins(tokens_BN, end_of_text)
        made = orders.padding_last(documents.strided(first_BN, streams), valid_BN)
        return documents.keep_apart(made, first_BN)

    return make_task


@functools.cache
def _one_by_one(make_task: MakeTask) -> MakeTask:
    """The task of an order with the same sequence of tokens, one at a time."""

    def make_one_by_one(key: jax.Array, tokens_BN: jax.Array, valid_BN: jax.Array) -> Task:
        made = make_task(key, tokens_BN, valid_BN)
        assert isinstance(made, Order)
        return orders.one_by_one(made)

    return make_one_by_one


def denoising(key: jax.Array, tokens_BN: jax.Array, valid_BN: jax.Array) -> Task:
    """The task of a denoiser."""
    del tokens_BN
    return corruption.by_count(key, valid_BN)


def total_nats(
    lm: LanguageModel,
    data: Data,
    split: str,
    make_task: MakeTask,
    batch_size: int = 16,
    seed: int = 0,
    progress: str | None = None,
    context: Context = PLAIN,
) -> float:
    """Nats of all tokens of the split under `make_task(key, tokens_BN, valid_BN)`, in float64.

    progress: the label of the progress bar; None: no bar. context: how network calls are carried out; a static argument
    of compiled functions.
    """
    batches = _token_nats(lm, data, split, make_task, batch_size, seed, progress, context)
    return float(sum(nats_BN.sum() for _, _, nats_BN in batches))


def _token_nats(
    lm: LanguageModel,
    data: Data,
    split: str,
    make_task: MakeTask,
    batch_size: int,
    seed: int,
    progress: str | None,
    context: Context,
    chosen: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For every batch tokens and valid as of `loader.eval_batches`, and the nats of each token, float64 [B, N].

    The last batch may have rows without any valid token. chosen: the numbers of the rows; None: all of the split.
    """
    key = jax.random.key(seed)
    steps = -(-(data.counts(split).rows if chosen is None else len(chosen)) // batch_size)
    batches = loader.eval_batches(data, split, batch_size, None, chosen)
    for number, (tokens, valid) in enumerate(tqdm(batches, progress, steps, disable=progress is None, leave=False)):
        arrays = jnp.asarray(tokens), jnp.asarray(valid), jax.random.fold_in(key, number)
        nats_BN = batch_nats(lm.params, lm.config, *arrays, make_task=make_task, context=context)
        yield tokens, valid, np.asarray(nats_BN, np.float64)


def score(nats: float, counts: Counts, lossless: bool) -> Score:
    """The figures per token, word and byte of a total. There are no bits per byte if the tokenizer is lossy."""
    return Score(
        nats_per_token=nats / counts.tokens,
        perplexity_per_token=results.perplexity(nats / counts.tokens),
        perplexity_per_word=results.perplexity(nats / max(counts.words, 1)),
        bits_per_byte=nats / math.log(2) / counts.bytes if lossless else None,
    )


def _strided(streams: int, key: jax.Array, batch: int, length: int) -> Order:
    del key
    return orders.strided(batch, length, streams)


@functools.cache
def _with_shuffled(number: int, end_of_text: int | None) -> MakeTask:
    """The task of the natural order with so many valid tokens shuffled, within documents if those are kept apart."""

    def make_task(key: jax.Array, tokens_BN: jax.Array, valid_BN: jax.Array) -> Task:
        first_BN = None if end_of_text is None else documents.begins(tokens_BN, end_of_text)
        batch, length = valid_BN.shape
        made = orders.progressive(key, batch, length, number, first_BN=first_BN, among_BN=valid_BN)
        made = orders.padding_last(made, valid_BN)
        return made if first_BN is None else documents.keep_apart(made, first_BN)

    return make_task


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Passes over the rows of a split. end: end-of-text if documents are kept apart; None: they are not."""

    lm: LanguageModel
    data: Data
    split: str
    batch_size: int
    seed: int
    progress: bool
    context: Context
    end: int | None

    def score(self, nats: float) -> Score:
        return score(nats, self.data.counts(self.split), self.data.tokenizer.lossless)

    def _batches(
        self, make_task: MakeTask, label: str, draw: int, chosen: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        name = label if self.progress else None
        where = self.lm, self.data, self.split, make_task, self.batch_size, self.seed + draw
        return _token_nats(*where, name, self.context, chosen)

    def nats(self, make_task: MakeTask, label: str, draws: int, chosen: Sequence[int] | None = None) -> np.ndarray:
        """Nats of every row (or of the chosen ones) in every draw [R, draws], float64."""
        num_rows = self.data.counts(self.split).rows if chosen is None else len(chosen)
        found = []
        for draw in range(draws):
            batches = self._batches(make_task, label, draw, chosen)
            found.append(np.concatenate([nats_BN.sum(axis=1) for _, _, nats_BN in batches])[:num_rows])
        return np.stack(found, axis=1)

    def in_streams(self, streams: int) -> tuple[np.ndarray, ByPlace]:
        """Nats of every row [R] under the strided order, and of all tokens by place in the stream."""
        found, by_place = [], ByPlace(self.data.length)
        label = "left to right" if streams == 1 else f"strided, S = {streams}"
        for tokens_BN, valid_BN, nats_BN in self._batches(_in_streams(streams, self.end), label, 0):
            whole = jnp.zeros(tokens_BN.shape, jnp.int32)
            first_BN = whole if self.end is None else documents.begins(jnp.asarray(tokens_BN), self.end)
            by_place.add(np.asarray(documents.depths(first_BN, streams)), nats_BN, valid_BN)
            found.append(nats_BN.sum(axis=1))
        return np.concatenate(found)[: self.data.counts(self.split).rows], by_place

    def expected(self, draws: int) -> RandomOrders:
        """The score expected over random orders."""
        nats_RK = self.nats(under_order(orders.uniform, self.end), "random orders", draws)
        mean = self.score(float(nats_RK.mean(axis=1).sum()))
        if draws == 1:
            return RandomOrders(**dataclasses.asdict(mean), draws=draws)
        error = order_bounds.error_of_mean(nats_RK) / self.data.counts(self.split).tokens
        return RandomOrders(
            **dataclasses.asdict(mean), draws=draws, standard_error=error, spread=order_bounds.spread(nats_RK)
        )

    def elbo(self, make_task: MakeTask, draws: int, diffusion_steps: int | None) -> Elbo:
        # Of a denoiser, the rows of a batch are not drawn independently: the error is known from whole draws alone.
        found = self.nats(make_task, "ELBO", draws).sum(axis=0)
        tokens = self.data.counts(self.split).tokens
        error = float(np.std(found, ddof=1)) / draws**0.5 / tokens if draws > 1 else None
        mean = self.score(float(np.mean(found)))
        return Elbo(**dataclasses.asdict(mean), diffusion_steps=diffusion_steps, draws=draws, standard_error=error)

    def bounds(self, num_orders: int, num_rows: int, shuffled: int | None) -> OrderBounds:
        """Bounds on the likelihood of the mixture over orders, from some rows."""
        all_rows = self.data.counts(self.split).rows
        num_rows = min(num_rows, all_rows)
        chosen = [place * all_rows // num_rows for place in range(num_rows)]
        make_task = under_order(orders.uniform, self.end) if shuffled is None else _with_shuffled(shuffled, self.end)
        nats_RK = self.nats(make_task, "bounds over orders", num_orders, chosen)
        batches = loader.eval_batches(self.data, self.split, self.batch_size, None, chosen)
        tokens = int(sum(valid_BN.sum() for _, valid_BN in batches))
        return OrderBounds(
            shuffled=shuffled,
            rows=num_rows,
            tokens=tokens,
            spread=order_bounds.spread(nats_RK) if num_orders > 1 else None,
            bounds=order_bounds.measure(-nats_RK, tokens),
        )

    def price(self, found: Mapping[int, tuple[np.ndarray, ByPlace]]) -> dict[str, StreamPrice]:
        """What each number of streams costs, from what `in_streams` found for them, and for 1."""
        one, places_of_one = found[1]
        prices = {}
        for streams, (nats_R, by_place) in found.items():
            single_R = nats_R  # blocks of one token already
            if streams > 1:
                task = _one_by_one(_in_streams(streams, self.end))
                single_R = self.nats(task, f"one at a time, S = {streams}", 1)[:, 0]
            heads = int(places_of_one.tokens[0])
            prices[str(streams)] = parallel_price.measure(nats_R, single_R, one, by_place, heads)
        return prices


# Kept, so that the same config gives the same function and compiles once.
_bounding_order = functools.cache(curriculum.bounding_order)


def evaluate(
    lm: LanguageModel,
    data: Data,
    split: str,
    streams: Sequence[int] = (2, 4, 8),
    draws: int = 1,
    trained_on: OrderConfig | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    mesh: Mesh | None = None,
    reset: Reset = "none",
    with_baselines: bool = True,
    kept_in: Sequence[pathlib.Path] = (),
    num_orders: int = 0,
    num_rows: int = 64,
    shuffled: int | None = None,
    with_price: bool = False,
) -> Evaluation:
    """All figures of a split.

    streams: numbers of streams whose strided orders are scored; those that do not divide the rows are left out.
    draws: random orders per row of tokens, and draws of the ELBO; 0: random orders are not scored, and the ELBO is
        estimated from one draw. Standard errors are known from two draws on.
    trained_on: the orders that the model was trained with. Only those of a masked diffusion matter: they bound the
        likelihood (ELBO).
    progress: whether progress bars are shown on stderr.
    mesh: the devices that the model's parameters are spread over; None: a single one. Batches are divided over its axes
        data and fsdp, whose size has to divide them.
    reset: `data.reset` of the training, which is what the text is scored with.
    with_baselines: whether the training text's token frequencies and the compressor are measured as well.
    kept_in: files that may hold what these two took long to find out; see `baselines.Baselines`.
    num_orders: K, from how many random orders per row the likelihood of their mixture is bounded; 0: it is not.
    num_rows: on how many rows of the split, evenly spaced.
    shuffled: the mixture is over the orders in which this many tokens are shuffled (see `order.progressive`), drawn
        uniformly; None: over all orders.
    with_price: whether the price of parallel sampling is taken apart, for S = 1 and the numbers of `streams`.
    Raises UserError if the model's vocabulary is not the data's, if the rows are longer than the model's, or if they
    are shorter than `shuffled`.
    """
    check_data(lm, data)
    if shuffled is not None and shuffled > data.length:
        raise UserError(f"--shuffled={shuffled}: a row of this text has {data.length} tokens ({place_of(data)})")
    counts, lossless = data.counts(split), data.tokenizer.lossless
    context = PLAIN if mesh is None else Context(sharding.constrain(mesh))
    match reset:
        case "none":
            end = None
        case "document":
            end = data.tokenizer.end_of_text
        case _:
            assert_never(reset)

    passes = _Passes(lm, data, split, batch_size, seed, progress, context, end)
    left_to_right = random_orders = elbo = bounds = price = None
    strided: dict[str, Score] = {}
    match lm.config.kind:
        case "armd":
            fitting = [s for s in streams if s > 1 and data.length % s == 0]
            found = {s: passes.in_streams(s) for s in (1, *fitting)}
            scores = {str(s): passes.score(float(nats_R.sum())) for s, (nats_R, _) in found.items()}
            left_to_right, strided = scores.pop("1"), scores
            random_orders = passes.expected(draws) if draws else None
            price = passes.price(found) if with_price else None
            bounds = passes.bounds(num_orders, num_rows, shuffled) if num_orders else None
            if trained_on is not None and (make_order := _bounding_order(trained_on)):
                elbo = passes.elbo(under_order(make_order, end), max(draws, 1), trained_on.diffusion_steps)
        case "denoiser":
            elbo = passes.elbo(denoising, max(draws, 1), None)
        case _:
            assert_never(lm.config.kind)
    unigram: Score | None = None
    xz: float | None = None
    if with_baselines:
        known = baselines.Baselines(data, kept_in)
        unigram, xz = passes.score(known.unigram_nats(split)), known.xz_bits_per_byte(split)
    return Evaluation(
        split=split,
        lossless=lossless,
        documents=counts.documents,
        bytes=counts.bytes,
        words=counts.words,
        tokens=counts.tokens,
        rows=counts.rows,
        left_to_right=left_to_right,
        random_orders=random_orders,
        strided=strided,
        elbo=elbo,
        order_bounds=bounds,
        price=price,
        unigram=unigram,
        xz_bits_per_byte=xz,
        seed=seed,
    )


def check_data(lm: LanguageModel, data: Data) -> None:
    """Raises UserError if the model was made for another vocabulary or for shorter rows than the data's."""
    if data.length > lm.config.max_length:
        raise UserError(
            f"{place_of(data)}: rows of {data.length} tokens are longer than the model's"
            f" max_length={lm.config.max_length}; prepare the text at that length"
        )
    theirs = data.tokenizer
    if lm.config.vocab_size < theirs.vocab_size or (lm.tokenizer is not None and lm.tokenizer.hash != theirs.hash):
        raise UserError(
            f"the checkpoint was made for another vocabulary ({lm.config.vocab_size} tokens) than the data in"
            f" {place_of(data)} ({theirs.vocab_size} tokens): prepare the text with the checkpoint's tokenizer folder"
        )

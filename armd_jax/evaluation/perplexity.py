"""Likelihoods of held-out text: exact left to right, expected over random orders, under strided orders, and an ELBO.

A denoiser has an ELBO and nothing else, because no order gives it an exact likelihood.

Every token of the split counts once, end-of-text and the last, partly filled row included; rows are independent.
Bits per byte = total nats / ln 2 / UTF-8 bytes of the original text, and only a lossless tokenizer has them.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
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
from armd_jax.evaluation import baselines, results
from armd_jax.evaluation.results import Elbo, Evaluation, RandomOrders, Score
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import Reset
from armd_jax.order_config import OrderConfig
from armd_jax.training import sharding

# (key, tokens_BN, valid_BN) -> task. A static argument of compiled functions: the same task must be the same object.
MakeTask = Callable[[jax.Array, jax.Array, jax.Array], Task]
MakeOrder = Callable[[jax.Array, int, int], Order]  # (key, batch, length) -> order


@functools.partial(jax.jit, static_argnames=("config", "make_task", "context"))
def _nll(
    params: Params,
    config: ModelConfig,
    tokens_BN: jax.Array,
    valid_BN: jax.Array,
    key: jax.Array,
    make_task: MakeTask,
    context: Context,
) -> jax.Array:
    tokens_BN, valid_BN = (context.constrain(a, ("batch", "length")) for a in (tokens_BN, valid_BN))
    return objective.loss_sums(params, config, tokens_BN, make_task(key, tokens_BN, valid_BN), context).nll


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


def _denoising(key: jax.Array, tokens_BN: jax.Array, valid_BN: jax.Array) -> Task:
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
    key = jax.random.key(seed)
    steps = -(-data.counts(split).rows // batch_size)
    total = 0.0
    batches = loader.eval_batches(data, split, batch_size)
    for number, (tokens, valid) in enumerate(tqdm(batches, progress, steps, disable=progress is None, leave=False)):
        batch_key = jax.random.fold_in(key, number)
        arrays = jnp.asarray(tokens), jnp.asarray(valid), batch_key
        total += float(_nll(lm.params, lm.config, *arrays, make_task=make_task, context=context))
    return total


def score(nats: float, counts: Counts, lossless: bool) -> Score:
    """The figures per token, word and byte of a total. There are no bits per byte if the tokenizer is lossy."""
    return Score(
        nats_per_token=nats / counts.tokens,
        perplexity_per_token=_exp(nats / counts.tokens),
        perplexity_per_word=_exp(nats / max(counts.words, 1)),
        bits_per_byte=nats / math.log(2) / counts.bytes if lossless else None,
    )


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)  # NaN stays NaN


def _left_to_right(key: jax.Array, batch: int, length: int) -> Order:
    del key
    return orders.left_to_right(batch, length)


def _strided(streams: int, key: jax.Array, batch: int, length: int) -> Order:
    del key
    return orders.strided(batch, length, streams)


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
) -> Evaluation:
    """All figures of a split.

    streams: numbers of streams whose strided orders are scored; those that do not divide the rows are left out.
    draws: random orders per row of tokens, and draws of the ELBO; 0: random orders are not scored, and the ELBO is
        estimated from one draw. The standard error of the ELBO is known from two draws on.
    trained_on: the orders that the model was trained with. Only those of a masked diffusion matter: they bound the
        likelihood (ELBO).
    progress: whether progress bars are shown on stderr.
    mesh: the devices that the model's parameters are spread over; None: a single one. Batches are divided over its axes
        data and fsdp, whose size has to divide them.
    reset: `data.reset` of the training, which is what the text is scored with.
    with_baselines: whether the training text's token frequencies and the compressor are measured as well.
    kept_in: files that may hold what these two took long to find out; see `baselines.Baselines`.
    Raises UserError if the model's vocabulary is not the data's, or if the rows are longer than the model's.
    """
    check_data(lm, data)
    counts, lossless = data.counts(split), data.tokenizer.lossless
    context = PLAIN if mesh is None else Context(sharding.constrain(mesh))
    match reset:
        case "none":
            end = None
        case "document":
            end = data.tokenizer.end_of_text
        case _:
            assert_never(reset)

    def nats(make_task: MakeTask, label: str, repeat: int = 1) -> list[float]:
        shared = lm, data, split, make_task, batch_size
        name = label if progress else None
        return [total_nats(*shared, seed + i, name, context) for i in range(repeat)]

    def under(make_order: MakeOrder, label: str, repeat: int = 1) -> Score:
        return score(float(np.mean(nats(under_order(make_order, end), label, repeat))), counts, lossless)

    def bound(make_task: MakeTask, diffusion_steps: int | None) -> Elbo:
        found = nats(make_task, "ELBO", max(draws, 1))
        error = float(np.std(found, ddof=1)) / len(found) ** 0.5 / counts.tokens if len(found) > 1 else None
        mean = score(float(np.mean(found)), counts, lossless)
        return Elbo(**dataclasses.asdict(mean), diffusion_steps=diffusion_steps, draws=len(found), standard_error=error)

    left_to_right = random_orders = elbo = None
    strided: dict[str, Score] = {}
    match lm.config.kind:
        case "armd":
            left_to_right = under(_left_to_right, "left to right")
            if draws:
                expected = under(orders.uniform, "random orders", draws)
                random_orders = RandomOrders(**dataclasses.asdict(expected), draws=draws)
            fitting = [s for s in streams if s > 1 and data.length % s == 0]
            strided = {
                str(s): score(nats(_in_streams(s, end), f"strided, S = {s}")[0], counts, lossless) for s in fitting
            }
            if trained_on is not None and (make_order := _bounding_order(trained_on)):
                elbo = bound(under_order(make_order, end), trained_on.diffusion_steps)
        case "denoiser":
            elbo = bound(_denoising, None)
        case _:
            assert_never(lm.config.kind)
    unigram: Score | None = None
    xz: float | None = None
    if with_baselines:
        known = baselines.Baselines(data, kept_in)
        unigram, xz = score(known.unigram_nats(split), counts, lossless), known.xz_bits_per_byte(split)
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


def as_text(result: Evaluation) -> str:
    """The figures as a table for a terminal."""
    rows = results.rows(result)
    width = max(30, *(len(row.name) for row in rows))
    lines = [f"{result.split}: {result.bytes:,} bytes, {result.tokens:,} tokens, {result.words:,} words"]
    lines.append(f"{'':<{width}} {'bits/byte':>11} {'ppl/token':>13} {'ppl/word':>18}")
    for row in rows:
        per_token, per_word = (
            results.formatted(value, 3) for value in (row.score.perplexity_per_token, row.score.perplexity_per_word)
        )
        bits = results.formatted_bits(row.score, result.lossless, 4)
        lines.append(f"{row.name:<{width}} {bits:>11} {per_token:>13} {per_word:>18}")
    return "\n".join(lines)

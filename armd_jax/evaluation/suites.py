"""Zero-shot suites: perplexities of texts that a model was not trained on, by two published protocols.

`sedd` is that of SEDD and RADD, as RADD's evaluation code carries it out on SEDD's data code: test splits (of
WikiText-2 the training split), an end-of-text behind every record, all of it in chunks of exactly the model's length.
`mdlm` is that of MDLM and the models after it: validation splits (test splits of LM1B and AG News), chunks of two
tokens less, with a start-of-text and an end-of-text put around each. Tokenizers of this package have an end-of-text
only, and it serves as both, as GPT-2's does there. Detokenising is the same in both (`detokenizers`).

Some things are done otherwise, and change little but remove accidents:
- That code cuts text into chunks within batches of 1,000 records, in several processes, and drops what is left over in
  each. Here all records of a set form one stream, and what is dropped, as the protocol asks, is one last, partly filled
  chunk. Beside the protocol's figure stands one that drops nothing.
- It averages over batches of chunks, the last of which may be smaller, and over processes, which may repeat a chunk.
  Here every token weighs the same.
- A model of this package predicts the first token of a chunk too, from its start token. In `sedd`, and in `mdlm` for
  masked diffusion, that is the published way of counting. Autoregressive models of the `mdlm` family are given the
  start-of-text: `given_first` counts so.
- Chunks are as long as the rows of the model, which are 1,024 in the papers: shorter ones give worse perplexities.
- RADD's code averages a bound over 1,024 masking times a batch. Here draws are fewer (4, unless more are asked for).
  Within a draw, the masked shares are spread evenly over the chunks of a batch and so are not independent; the standard
  error beside the figure is that over whole draws, which are.

An ARMD is scored left to right, exactly. A denoiser has a bound (ELBO), whose draws give its standard error.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from armd_jax.core import order as orders
from armd_jax.core.context import PLAIN, Context
from armd_jax.core.order import Order
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.evaluation import perplexity, results, suites_lambada, suites_text
from armd_jax.evaluation.perplexity import MakeTask
from armd_jax.evaluation.suites_results import Figure, Missing, Suites, counted
from armd_jax.evaluation.suites_text import CORPORA, PUBLISHED, SPLITS, Text
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import Reset, Split, SuiteProtocol, SuiteSet

_AT_ONCE = 256  # records that are tokenized together


@dataclasses.dataclass
class Tally:
    """The size of what was read of a set, filled in while it is read; see `suites_results.Figure`.

    tokenized: records that look as if they were in the original form of LAMBADA, whatever the set.
    """

    records: int = 0
    words: int = 0
    bytes: int = 0
    unknown: int = 0
    tokenized: int = 0
    text_tokens: int = 0


def added(protocol: SuiteProtocol) -> int:
    """How many tokens of a chunk the protocol puts around the text."""
    match protocol:
        case "sedd":
            return 0
        case "mdlm":
            return 2
        case _:
            assert_never(protocol)


def chunks(
    records: Iterable[str],
    detokenize: Callable[[str], str],
    tokenizer: Tokenizer,
    length: int,
    protocol: SuiteProtocol,
    tally: Tally,
) -> Iterator[np.ndarray]:
    """The chunks of a set, int32 arrays of `length` tokens, the last one possibly shorter.

    All records form one stream, with an end-of-text behind each. tally: is filled in. Raises UserError if the rows are
    too short for the protocol.
    """
    room, around = length - added(protocol), added(protocol) // 2
    if room < 1:
        raise UserError(f"model.max_length={length}: leaves no room for text between start and end ({protocol})")
    ends = np.full(around, tokenizer.end_of_text, np.int32)
    left = np.empty(0, np.int32)
    for ids in _tokens(records, detokenize, tokenizer, tally):
        stream = np.concatenate([left, ids])
        whole = len(stream) // room * room
        for start in range(0, whole, room):
            yield np.concatenate([ends, stream[start : start + room], ends])
        left = stream[whole:]
    if len(left):
        yield np.concatenate([ends, left, ends])


def _tokens(
    records: Iterable[str], detokenize: Callable[[str], str], tokenizer: Tokenizer, tally: Tally
) -> Iterator[np.ndarray]:
    """The stream of tokens, some records at a time."""
    batch: list[str] = []

    def encoded() -> np.ndarray:
        found = [ids + [tokenizer.end_of_text] for ids in tokenizer.encode_batch(batch)]
        batch.clear()
        stream = np.concatenate([np.asarray(ids, np.int32) for ids in found])
        tally.text_tokens += len(stream)
        return stream

    for record in records:
        words = record.split()
        tally.records += 1
        tally.words += len(words) + 1  # and the end of the line
        tally.bytes += len(record.encode())
        tally.unknown += words.count("<unk>")
        tally.tokenized += suites_lambada.is_tokenized(record)
        batch.append(detokenize(record))
        if len(batch) == _AT_ONCE:
            yield encoded()
    if batch:
        yield encoded()


@dataclasses.dataclass(frozen=True)
class Found:
    """A text of a protocol that is there."""

    protocol: SuiteProtocol
    name: SuiteSet
    split: Split
    text: Text


def find(
    protocols: Sequence[SuiteProtocol],
    names: Sequence[SuiteSet],
    folder: pathlib.Path | None,
    tfds_folder: pathlib.Path | None,
    needed: bool,
) -> tuple[list[Found], list[Missing]]:
    """The texts of these sets in these protocols, and what is not there; see `suites_text.find`.

    needed: whether every set has to be there, in one split of each protocol at least.
    Raises UserError if a set that is needed is not there, or if none is.
    """
    found: list[Found] = []
    missing: list[Missing] = []
    for protocol in protocols:
        for name in names:
            before = len(found)
            for split in SPLITS[protocol][name]:
                text = suites_text.find(name, split, folder, tfds_folder)
                if text is None:
                    missing.append(Missing(protocol=protocol, set=name, split=split))
                else:
                    found.append(Found(protocol, name, split, text))
            if needed and len(found) == before:
                splits = " or ".join(SPLITS[protocol][name])
                over = suites_text.passed_over(name, folder)[:3] if folder is not None else []
                there = f"; passed over: {', '.join(over)} (rename to say one split, and .txt)" if over else ""
                raise UserError(
                    f"--suite-sets={name}: nothing there for {protocol}: put {splits}.txt, .jsonl or .parquet into a"
                    f" folder {name} of --suite-data={folder or 'FOLDER'}{there}"
                )
    if not found:
        raise UserError(
            f"--suite-data={folder}, --suite-tfds={tfds_folder}: no text of any set there, such as"
            " wikitext2/test.txt or lambada/test.jsonl"
        )
    return found, missing


def evaluate(
    scorer: "Scorer",
    found: Sequence[Found],
    missing: Sequence[Missing] = (),
    keep: Callable[[Suites], None] | None = None,
) -> Suites:
    """The figures of all these texts, last words first. Raises UserError if a text cannot be read.

    keep: is called with everything that is known after each figure, so that a text that is bad late loses nothing else.
    """
    word = None
    passages = next((one.text for one in found if one.name == "lambada"), None)
    if passages is not None and scorer.lm.config.has_orders:
        records = itertools.islice(passages.records(), scorer.limit)
        made = scorer.lm, scorer.tokenizer, records, passages.where, scorer.batch_size, scorer.progress
        word = suites_lambada.last_word(*made)
    result = Suites(
        length=scorer.lm.config.max_length,
        documents_apart=scorer.end_of_document is not None,
        seed=scorer.seed,
        limit_rows=scorer.limit,
        figures=(),
        last_word=word,
        missing=tuple(missing),
        ema=scorer.ema,
    )
    for one in found:
        figure = scorer.figure(one.protocol, one.name, one.split, one.text)
        result = dataclasses.replace(result, figures=(*result.figures, figure))
        if keep is not None:
            keep(result)
    return result


def _left_to_right(key: jax.Array, batch: int, length: int) -> Order:
    del key
    return orders.left_to_right(batch, length)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model, and how its chunks are scored.

    Attributes:
      draws: of the bound of a denoiser; 1 for an ARMD, whose figures are exact.
      batch_size: chunks per network call. seed: of the draws.
      limit: chunks of each set at most; None: all.
      reset: `data.reset` of the training, which chunks are scored with, although the protocols know no such thing.
      ema: whether the weights are the average, as far as the run keeps one, or the raw ones; None: not known.
      context: on which devices.
      progress: whether progress bars are shown on stderr.
    """

    lm: LanguageModel
    tokenizer: Tokenizer
    draws: int = 1
    batch_size: int = 16
    seed: int = 0
    limit: int | None = None
    reset: Reset = "none"
    ema: bool | None = None
    context: Context = PLAIN
    progress: bool = True

    @property
    def end_of_document(self) -> int | None:
        """The id behind every document, if the documents of a chunk are kept apart; None: they are not."""
        match self.reset:
            case "none":
                return None
            case "document":
                return self.tokenizer.end_of_text
            case _:
                assert_never(self.reset)

    def figure(self, protocol: SuiteProtocol, name: SuiteSet, split: Split, text: Text) -> Figure:
        """The figure of one split of one set. Raises UserError if its text cannot be read."""
        length, around, bound = self.lm.config.max_length, added(protocol), not self.lm.config.has_orders
        detokenize, tally = CORPORA[name].detokenize, Tally()
        made = chunks(text.records(), detokenize, self.tokenizer, length, protocol, tally)
        read = itertools.islice(made, self.limit)
        sums = _Sums(self.draws)
        label = f"{protocol} {name} {split}" if self.progress else None
        for number, rows in enumerate(
            tqdm(self._batches(read), label, disable=label is None, unit="batch", leave=False)
        ):
            for draw in range(self.draws):
                sums.add(draw, rows, self._score(rows, draw, number), length, around)
        limited = next(made, None) is not None  # which only a limit leaves
        error = sums.error(length)
        # Nats of single tokens of a chunk are those of an order. A bound is one of whole chunks.
        text_nats = sums.total if not around else None if bound else sums.total - sums.first - sums.last
        every = None if text_nats is None else counted(float(np.mean(text_nats)), sums.tokens - sums.around)
        first = counted(float(np.mean(sums.whole - sums.whole_first)), sums.chunks * (length - 1))
        per_word = None if every is None or limited else results.perplexity(every.nats / max(tally.words, 1))
        return Figure(
            protocol=protocol,
            set=name,
            split=split,
            published=(name, split) in PUBLISHED[protocol],
            source=text.where,
            records=tally.records,
            words=tally.words,
            bytes=tally.bytes,
            unknown=tally.unknown,
            tokenized=2 * tally.tokenized > tally.records if name == "lambada" else None,
            text_tokens=tally.text_tokens,
            chunk=length,
            added=around,
            chunks=sums.chunks,
            dropped=0 if limited else tally.text_tokens - sums.chunks * (length - around),
            limited=limited,
            bound=bound,
            draws=self.draws,
            score=counted(float(np.mean(sums.whole)), sums.chunks * length, error),
            given_first=first if around and not bound else None,
            every_token=every,
            perplexity_per_word=per_word,
        )

    def _batches(self, made: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Batches of whole chunks, and then the one that is not whole, by itself."""
        batch: list[np.ndarray] = []
        for row in made:
            if len(row) < self.lm.config.max_length:
                if batch:
                    yield batch
                yield [row]
                return
            batch.append(row)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _score(self, rows: Sequence[np.ndarray], draw: int, number: int) -> np.ndarray:
        """Nats [rows, N] float64 of the tokens of a batch; 0 behind the end of a row."""
        shape = self.batch_size, self.lm.config.max_length
        tokens_BN, valid_BN = np.full(shape, self.tokenizer.end_of_text, np.int32), np.zeros(shape, bool)
        for index, row in enumerate(rows):
            tokens_BN[index, : len(row)] = row
            valid_BN[index, : len(row)] = True
        key = jax.random.fold_in(jax.random.key(self.seed + draw), number)
        make_task: MakeTask = perplexity.denoising
        if self.lm.config.has_orders:
            make_task = perplexity.under_order(_left_to_right, self.end_of_document)
        arrays = jnp.asarray(tokens_BN), jnp.asarray(valid_BN), key
        nats_BN = perplexity.batch_nats(
            self.lm.params, self.lm.config, *arrays, make_task=make_task, context=self.context
        )
        return np.asarray(nats_BN, np.float64)[: len(rows)]


class _Sums:
    """Sums over the chunks of a set, for each draw.

    whole, total: nats of the whole chunks, and of all. whole_first, first, last: those of the first tokens of chunks,
    of the whole ones and of all, and of their last tokens. chunks: how many are whole. tokens: of all chunks. around:
    those of them that the protocol adds.
    """

    def __init__(self, draws: int) -> None:
        self.whole, self.total, self.whole_first, self.first, self.last = np.zeros((5, draws))
        self.chunks = self.tokens = self.around = 0

    def add(self, draw: int, rows: Sequence[np.ndarray], nats: np.ndarray, length: int, around: int) -> None:
        """Adds a batch. nats: [rows, N], what `Scorer` found."""
        for row, nats_N in zip(rows, nats, strict=True):
            first, last, total = nats_N[0], nats_N[len(row) - 1], nats_N.sum()
            self.total[draw] += total
            self.first[draw] += first
            self.last[draw] += last
            if len(row) == length:
                self.whole[draw] += total
                self.whole_first[draw] += first
            if not draw:
                self.chunks += len(row) == length
                self.tokens += len(row)
                self.around += around

    def error(self, length: int) -> float | None:
        """The standard error of nats per token of the whole chunks, over the draws; None if it is not known."""
        if len(self.whole) < 2 or not self.chunks:
            return None
        return float(np.std(self.whole, ddof=1)) / len(self.whole) ** 0.5 / (self.chunks * length)

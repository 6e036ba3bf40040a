"""Judges: models that score the texts of another model, left to right, for its generative perplexity.

A text is a row of token ids of the model that wrote it. If the judge has the same tokenizer, it scores these ids. If
not, the row is cut at its end-of-text tokens, each part is decoded and encoded again with the judge's tokenizer, and
the judge's own end-of-text stands between the parts. Every token is scored, the first one and those of end-of-text
included. A text that is longer than the judge's context is scored in windows (`windows`). A judge that was trained with
`data.reset=document` scores every document of a text by itself.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol, assert_never

import jax.numpy as jnp
import numpy as np

from armd_jax import typed
from armd_jax.core import documents
from armd_jax.core import order as orders
from armd_jax.core.order import Order
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.evaluation.completions import fingerprint
from armd_jax.evaluation.generative_results import JudgedBy
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import JudgeKind, Reset


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a judge says about texts T.

    nats_T: float64, -log p of each text. tokens_T: how many tokens that are. windows_T: how many windows each was
    scored in. features_TD: the judge's final hidden states, averaged over the tokens of a text; None if they were not
    asked for.
    """

    nats_T: np.ndarray
    tokens_T: np.ndarray
    windows_T: np.ndarray
    features_TD: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a text that is scored at once. text: its number. seen: how many tokens at the start are only read."""

    text: int
    tokens: Sequence[int]
    seen: int


def windows(texts: Sequence[Sequence[int]], context: int) -> list[Window]:
    """The parts that a judge scores texts in, those of similar lengths together.

    A text that fits into the context is one window. Of a longer one, the first window is its first `context` tokens;
    each further one scores up to context - context // 2 tokens more and reads as many tokens before them as fit. So
    every token after the first window is conditioned on at least context // 2 tokens of its own text.
    """
    found = []
    for number, text in enumerate(texts):
        done = min(len(text), context)
        found.append(Window(number, text[:done], 0))
        while done < len(text):
            end = min(done + context - context // 2, len(text))
            found.append(Window(number, text[end - context : end], done - (end - context)))
            done = end
    return sorted(found, key=lambda window: len(window.tokens))


def totals(parts: Sequence[Window], nats: np.ndarray, sums: np.ndarray | None) -> Scores:
    """The scores of whole texts, from those of their windows: -log p, and sums of hidden states of what is scored."""
    texts = np.asarray([window.text for window in parts])
    count = int(texts.max()) + 1
    tokens_T = np.bincount(texts, [len(window.tokens) - window.seen for window in parts], count).astype(np.int64)
    features_TD = None
    if sums is not None:
        features_TD = np.zeros((count, sums.shape[1]))
        np.add.at(features_TD, texts, sums)
        features_TD /= tokens_T[:, None]
    return Scores(np.bincount(texts, nats, count), tokens_T, np.bincount(texts, minlength=count), features_TD)


class Judge(Protocol):
    """A model that scores texts. The properties are those of `JudgedBy`."""

    @property
    def facts(self) -> JudgedBy:
        """The judge as it is recorded, of texts that it has to encode again."""

    @property
    def tokenizer_hash(self) -> str:
        """The `Tokenizer.hash` of its tokenizer; empty if it is none of this package."""

    def encode(self, parts: Sequence[str]) -> list[int]:
        """The judge's ids of the documents of a text, with its end-of-text between them."""

    def score(self, texts: Sequence[Sequence[int]], features: bool) -> Scores:
        """Scores texts of at least one of the judge's ids each."""


@dataclasses.dataclass(frozen=True)
class OwnJudge:
    """A judge that this package computes. reset: `data.reset` of its training, which texts are scored with."""

    lm: LanguageModel
    facts: JudgedBy
    batch_size: int
    reset: Reset = "none"

    @classmethod
    def of(cls, lm: LanguageModel, name: str, kind: JudgeKind, batch_size: int, reset: Reset = "none") -> "OwnJudge":
        """A model with orders and with a tokenizer as a judge. name, kind: see `JudgedBy`. reset: see the class."""
        match kind:
            case "armd":
                first_token = "the judge's start token"
            case "imported" | "transformers":
                first_token = "the token that its config says texts begin with (bos, else eos)"
            case _:
                assert_never(kind)
        match reset:
            case "none":
                pass
            case "document":
                first_token += ", and so is the one behind every end-of-text (data.reset=document)"
            case _:
                assert_never(reset)
        facts = JudgedBy(
            name=name,
            kind=kind,
            digest=_digest(lm),
            context=lm.config.max_length,
            retokenised=True,
            first_token=first_token,
        )
        return cls(lm, facts, batch_size, reset)

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.lm.tokenizer is not None  # whatever is loaded from a folder has one
        return self.lm.tokenizer

    @property
    def tokenizer_hash(self) -> str:
        return self._tokenizer.hash

    def encode(self, parts: Sequence[str]) -> list[int]:
        return joined(self._tokenizer.encode_batch(parts), self._tokenizer.end_of_text)

    def score(self, texts: Sequence[Sequence[int]], features: bool) -> Scores:
        parts = windows(texts, self.facts.context)
        sizes = [(len(window.tokens), window.seen) for window in parts]
        lengths, seen = (np.asarray(numbers) for numbers in zip(*sizes, strict=True))
        nats_W, sums_WD = np.zeros(len(parts)), np.zeros((len(parts), self.lm.config.width if features else 0))
        # What fills up a row comes last in the order, where nobody sees it.
        for start in range(0, len(parts), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            tokens_BN = np.zeros((len(parts[chosen]), int(lengths[chosen].max())), np.int32)
            for row, window in enumerate(parts[chosen]):
                tokens_BN[row, : len(window.tokens)] = window.tokens
            places_N = np.arange(tokens_BN.shape[1])
            scored_BN = (places_N >= seen[chosen, None]) & (places_N < lengths[chosen, None])
            order = self._order(tokens_BN)
            if features:
                log_prob, hidden = self.lm.log_prob_and_hidden(tokens_BN, order)
                sums_WD[chosen] = np.where(scored_BN[..., None], np.asarray(hidden), 0).sum(axis=1, dtype=np.float64)
            else:
                log_prob = self.lm.log_prob(tokens_BN, order)
            nats_W[chosen] = -np.where(scored_BN, np.asarray(log_prob), 0).sum(axis=1, dtype=np.float64)
        return totals(parts, nats_W, sums_WD if features else None)

    def _order(self, tokens_BN: np.ndarray) -> Order:
        """Left to right, in each document by itself if the judge was trained so."""
        order = orders.left_to_right(*tokens_BN.shape)
        match self.reset:
            case "none":
                return order
            case "document":
                return documents.keep_apart(
                    order, documents.begins(jnp.asarray(tokens_BN), self._tokenizer.end_of_text)
                )
            case _:
                assert_never(self.reset)


def _digest(lm: LanguageModel) -> str:
    """Of a model's weights, of its config, and of its tokenizer: what decides how it scores a text."""
    assert lm.tokenizer is not None  # as above
    told = fingerprint(lm), typed.to_json(lm.config), lm.tokenizer.hash
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def joined(parts: Sequence[Sequence[int]], end_of_text: int) -> list[int]:
    """The ids of documents one behind the other, with an end-of-text between two of them."""
    ids = list(parts[0])
    for part in parts[1:]:
        ids += [end_of_text, *part]
    return ids


def ids_for(judge: Judge, tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], JudgedBy]:
    """The texts of rows of a model's ids as ids of the judge, and the judge as it is recorded for them.

    Raises UserError if a text has not a single token in the judge's tokenizer.
    """
    if judge.tokenizer_hash == tokenizer.hash:
        return [list(row) for row in rows], dataclasses.replace(judge.facts, retokenised=False)
    found = [judge.encode([tokenizer.decode(part) for part in _documents(row, tokenizer.end_of_text)]) for row in rows]
    if not all(found):
        number = next(at for at, ids in enumerate(found) if not ids)
        raise UserError(f"text {number} is empty, so that the judge has nothing to score: draw longer texts")
    return found, judge.facts


def _documents(row: Sequence[int], end_of_text: int) -> list[list[int]]:
    """The parts of a row between its end-of-text tokens, which are left out; some may be empty."""
    parts: list[list[int]] = [[]]
    for token in row:
        if token == end_of_text:
            parts.append([])
        else:
            parts[-1].append(int(token))
    return parts

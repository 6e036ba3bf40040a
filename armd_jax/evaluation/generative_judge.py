"""Judges: models that score the texts of another model, left to right, for its generative perplexity.

A text is a row of token ids of the model that wrote it. If the judge has the same tokenizer, it scores these ids. If
not, the row is cut at its end-of-text tokens, each part is decoded and encoded again with the judge's tokenizer, and
the judge's own end-of-text stands between the parts. Every token is scored, the first one and those of end-of-text
included, up to the judge's context.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, assert_never

import numpy as np

from armd_jax.core import order as orders
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.evaluation.completions import fingerprint
from armd_jax.evaluation.generative_results import JudgedBy
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import JudgeKind


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a judge says about texts T.

    nats_T: float64, -log p of each text, of what is within the judge's context. tokens_T: how many tokens that are.
    cut_T: how many tokens lie behind the context. features_TD: the judge's final hidden states, averaged over the
    tokens of a text; None if they were not asked for.
    """

    nats_T: np.ndarray
    tokens_T: np.ndarray
    cut_T: np.ndarray
    features_TD: np.ndarray | None = None


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
    """A judge that this package computes."""

    lm: LanguageModel
    facts: JudgedBy
    batch_size: int

    @classmethod
    def of(cls, lm: LanguageModel, name: str, kind: JudgeKind, batch_size: int) -> "OwnJudge":
        """A model with orders and with a tokenizer as a judge. name, kind: see `JudgedBy`."""
        match kind:
            case "armd":
                first_token = "the judge's start token"
            case "imported" | "transformers":
                first_token = "the token that its config says texts begin with (bos, else eos)"
            case _:
                assert_never(kind)
        facts = JudgedBy(
            name=name,
            kind=kind,
            digest=fingerprint(lm),
            context=lm.config.max_length,
            retokenised=True,
            first_token=first_token,
        )
        return cls(lm, facts, batch_size)

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
        context, count = self.facts.context, len(texts)
        lengths = np.asarray([min(len(text), context) for text in texts], np.int64)
        nats_T, features_TD = np.zeros(count), np.zeros((count, self.lm.config.width if features else 0))
        # Texts of similar lengths together. What fills up a row comes last in the order, where nobody sees it.
        by_length = np.argsort(lengths, kind="stable")
        for start in range(0, count, self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            tokens_BN = np.zeros((len(chosen), int(lengths[chosen].max())), np.int32)
            valid_BN = np.arange(tokens_BN.shape[1]) < lengths[chosen, None]
            for row, at in enumerate(chosen):
                tokens_BN[row, : lengths[at]] = texts[at][: lengths[at]]
            order = orders.left_to_right(*tokens_BN.shape)
            if features:
                log_prob, hidden = self.lm.log_prob_and_hidden(tokens_BN, order)
                sums_BD = np.where(valid_BN[..., None], np.asarray(hidden), 0).sum(axis=1, dtype=np.float64)
                features_TD[chosen] = sums_BD / lengths[chosen, None]
            else:
                log_prob = self.lm.log_prob(tokens_BN, order)
            nats_T[chosen] = -np.where(valid_BN, np.asarray(log_prob), 0).sum(axis=1, dtype=np.float64)
        cut_T = np.asarray([len(text) for text in texts], np.int64) - lengths
        return Scores(nats_T, lengths, cut_T, features_TD if features else None)


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

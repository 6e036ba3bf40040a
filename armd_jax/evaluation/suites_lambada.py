"""LAMBADA's last words: how often a model tells the last word of a passage from everything before it.

A passage is taken with straight quotes and without spaces around it, and cut at its last space. What stands before
the cut is encoded, and so is the whole passage: the tokens of the last word are those of the passage behind what the
two have in common, as in lm-evaluation-harness. (A word by itself may have other tokens: some tokenizers put a space
before every text.) The model sees its start token and the context, without an end-of-text before it. A word is
correct if every one of its tokens is the likeliest one given what stands before, which is to say that greedy
decoding, left to right, writes exactly these tokens. (It may go on after them: whether the word ends there is not
asked, as in lm-evaluation-harness.) A passage that is longer than the model's rows loses its beginning. Blank records
are skipped, as the published code does, and so is a passage whose last word has no tokens.
"""

import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

from armd_jax.core import order as orders
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.evaluation import detokenizers, results
from armd_jax.evaluation.suites_results import LastWord
from armd_jax.inference import schedule
from armd_jax.inference.language_model import LanguageModel

Passage = tuple[list[int], list[int]]  # the tokens of the context, and of the last word
_TOKENIZED = re.compile(r" [.,?!]|``| n't|\w 's ")  # what only passages in the original form have


def is_tokenized(passage: str) -> bool:
    """Whether a passage looks as if it were in the original, tokenised form of LAMBADA."""
    return bool(_TOKENIZED.search(passage))


def cut_last_word(passage: str) -> tuple[str, str]:
    """The context of a passage, and its last word with a space in front. Raises UserError if there is no context."""
    text = detokenizers.straight(passage)
    found = re.fullmatch(r"(.*\S)\s+(\S+)", text, re.DOTALL)
    if found is None:
        raise UserError(f"{passage!r:.80} has no last word behind a context")
    return found[1], f" {found[2]}"


def passages(records: Iterable[str], tokenizer: Tokenizer) -> tuple[list[Passage], int]:
    """The tokens of passages, and how many of these look as if they were in the original, tokenised form.

    Raises UserError that says which passage has no context.
    """
    contexts, wholes, tokenized = [], [], 0
    for number, record in enumerate(records, 1):
        try:
            context, word = cut_last_word(record)
        except UserError as error:
            raise UserError(f"passage {number}: {error}") from error
        tokenized += is_tokenized(context)
        contexts.append(context)
        wholes.append(context + word)
    found = []
    for context_ids, ids in zip(tokenizer.encode_batch(contexts), tokenizer.encode_batch(wholes), strict=True):
        pairs = zip(context_ids, ids, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common < len(ids):
            found.append((ids[:common], ids[common:]))
    return found, tokenized


def last_word(
    lm: LanguageModel,
    tokenizer: Tokenizer,
    records: Iterable[str],
    source: str,
    batch_size: int = 16,
    progress: bool = True,
) -> LastWord:
    """The figures of these passages. Raises UserError if there are none, or if the model is a denoiser."""
    try:
        found, tokenized = passages(records, tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if not found:
        raise UserError(f"{source}: holds no passages")
    longest = lm.config.max_length
    nats, correct = np.zeros(len(found)), np.zeros(len(found), bool)
    # Similar lengths together, the longest first: if memory does not suffice, that shows at once.
    numbers = sorted(range(len(found)), key=lambda number: len(found[number][0]) + len(found[number][1]), reverse=True)
    with tqdm(desc="LAMBADA, last word", total=len(found), disable=not progress, leave=False) as bar:
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            parts = _score(lm, [found[number] for number in chosen])
            for number, (its_nats, its_greedy) in zip(chosen, parts, strict=True):
                nats[number], correct[number] = its_nats, its_greedy
            bar.update(len(chosen))
    count, tokens = len(found), sum(min(len(word), longest) for _, word in found)
    accuracy = float(correct.mean())
    return LastWord(
        source=source,
        tokenized=2 * tokenized > count,
        passages=count,
        cut=sum(len(context) + len(word) > longest for context, word in found),
        correct=int(correct.sum()),
        accuracy=accuracy,
        standard_error=(accuracy * (1 - accuracy) / count) ** 0.5,
        tokens=tokens,
        perplexity_per_word=results.perplexity(float(nats.sum()) / count),
        perplexity_per_token=results.perplexity(float(nats.sum()) / tokens),
    )


def _score(lm: LanguageModel, batch: Sequence[Passage]) -> list[tuple[float, bool]]:
    """Nats of each last word, and whether all its tokens are the likeliest ones."""
    longest = lm.config.max_length
    rows = [(context + word)[-longest:] for context, word in batch]
    # Few widths, so that few programs are compiled. Padding is behind the text, where no token of it sees any.
    width = min(max(schedule.SHORTEST, 1 << (len(max(rows, key=len)) - 1).bit_length()), longest)
    tokens_BN = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens_BN[index, : len(row)] = row
    answer = lm.log_prob_and_greedy(tokens_BN, orders.left_to_right(len(rows), width))
    log_prob_BN, greedy_BN = np.asarray(answer[0], np.float64), np.asarray(answer[1])
    found = []
    for index, (row, (_, word)) in enumerate(zip(rows, batch, strict=True)):
        its = slice(max(len(row) - len(word), 0), len(row))
        found.append((-float(log_prob_BN[index, its].sum()), bool(greedy_BN[index, its].all())))
    return found

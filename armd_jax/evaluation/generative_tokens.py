"""How varied texts are: entropies, distinct n-grams and repetition, all counted in tokens.

Texts are rows of token ids, which may differ in length. No n-gram reaches from one text into the next. All of these
figures depend on the lengths of the texts, and those of a whole corpus on their number too: compare equal sizes.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

REPEATED = 4  # tokens of the n-grams whose repetition is counted, as seq-rep-4 of Welleck et al. (2020) has it

Text = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variety:
    """Figures of a corpus of texts. One is None if no text is long enough for it.

    entropy_nats, entropy_bits: the entropy of the frequencies of tokens within a text, averaged over the texts. This is
        the "unigram entropy" that papers on diffusion language models report beside generative perplexity. A text of N
        tokens has at most ln N nats.
    corpus_entropy_nats, corpus_entropy_bits: that of the frequencies of tokens in all texts together.
    distinct_1, distinct_2, distinct_3: different n-grams in all texts together, as a share of all n-grams there (Li et
        al. 2016).
    repetition: 1 - different 4-grams of a text / its 4-grams, averaged over the texts (seq-rep-4).
    longest_repeat: tokens of the longest stretch that a text has at least twice (the two may overlap), averaged over
        the texts. N - 1 if a text repeats one token, N - 2 if it repeats two in turn.
    """

    entropy_nats: float | None = None
    entropy_bits: float | None = None
    corpus_entropy_nats: float | None = None
    corpus_entropy_bits: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    distinct_3: float | None = None
    repetition: float | None = None
    longest_repeat: float | None = None


def variety(texts: Iterable[Text]) -> Variety:
    """All figures of a corpus."""
    rows = [np.asarray(text, np.int64) for text in texts if len(text)]
    if not rows:
        return Variety()
    within, over_all = float(np.mean([entropy(row) for row in rows])), entropy(np.concatenate(rows))
    repeated = [1 - share for row in rows if (share := distinct([row], REPEATED)) is not None]
    return Variety(
        entropy_nats=within,
        entropy_bits=within / math.log(2),
        corpus_entropy_nats=over_all,
        corpus_entropy_bits=over_all / math.log(2),
        distinct_1=distinct(rows, 1),
        distinct_2=distinct(rows, 2),
        distinct_3=distinct(rows, 3),
        repetition=float(np.mean(repeated)) if repeated else None,
        longest_repeat=float(np.mean([longest_repeat(row) for row in rows])),
    )


def entropy(text: Text) -> float:
    """The entropy of the frequencies of the tokens of a text of at least one token, in nats."""
    counts = np.unique(np.asarray(text), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no minus in front of 0


def distinct(texts: Iterable[Text], n: int) -> float | None:
    """How many different n-grams texts have, as a share of all their n-grams; None if they have none."""
    grams = [sliding_window_view(np.asarray(text), n) for text in texts if len(text) >= n]
    if not grams:
        return None
    together = np.concatenate(grams)
    return len(np.unique(together, axis=0)) / len(together)


def longest_repeat(text: Text) -> int:
    """Tokens of the longest stretch that a text has at least twice; the two may overlap. 0 if no token comes twice."""
    tokens = np.ascontiguousarray(text, np.int64)
    # If a stretch of some length comes twice, so does every part of it: the longest one is found by bisection.
    low, high = 0, len(tokens)
    while high - low > 1:
        middle = (low + high) // 2
        grams = {gram.tobytes() for gram in sliding_window_view(tokens, middle)}
        low, high = (middle, high) if len(grams) <= len(tokens) - middle else (low, middle)
    return low

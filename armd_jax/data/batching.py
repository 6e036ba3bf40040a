"""Documents in batches of about the same size, and a count of what was read."""

import dataclasses
import re
from collections.abc import Iterator

from tqdm import tqdm

from armd_jax.data.encoding import Batch
from armd_jax.data.tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 22  # encoded at a time: enough to keep all cores busy, little enough to hold as Python ints
WORDS_AT_ONCE = 1 << 20  # characters whose words exist at once: a document may be one line of many MB

_SPACE = re.compile(r"\s")


@dataclasses.dataclass
class Tally:
    """The documents of a split that have been read so far."""

    documents: int = 0
    bytes: int = 0
    words: int = 0


def batches(documents: Iterator[str], tokenizer: Tokenizer, tally: Tally, bar: tqdm) -> Iterator[Batch]:
    """Chunks of documents, each with whether it is the last one of its document.

    A batch has about BATCH_CHARACTERS characters, from many documents or from a part of one. `tally` and `bar` are kept
    up to date.
    """
    batch: Batch = []
    size = 0
    for document in documents:
        num_bytes = len(document.encode())
        tally.documents += 1
        tally.bytes += num_bytes
        tally.words += count_words(document)
        bar.update(num_bytes)
        previous = ""  # one chunk behind, because only the end of the loop tells which chunk is the last
        for chunk in tokenizer.chunks(document):
            if previous:
                batch.append((previous, False))
                size += len(previous)
            previous = chunk
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        batch.append((previous, True))
        size += len(previous)
    if batch:
        yield batch


def progress_bar(what: str, total: int | None, shown: bool) -> tqdm:
    """A bar on stderr that counts bytes of text. total: how many there are; None: that is not known.

    It disappears at its end: if a document turns out to be a mistake, its message is all that is left.
    """
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not shown, leave=False)


def count_words(text: str) -> int:
    """Words plus line ends: what WikiText perplexities are given per."""
    words = start = 0
    while start < len(text):
        cut = _SPACE.search(text, start + WORDS_AT_ONCE)
        end = cut.start() if cut else len(text)
        words += len(text[start:end].split())
        start = end
    return words + text.count("\n")

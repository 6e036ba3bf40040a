"""Splits: their names, and how held-out documents are taken from the training documents of a source without them."""

import array
import functools
import hashlib
import re
import typing
from collections.abc import Iterator

import numpy as np

from armd_jax.data.reading import Documents
from armd_jax.errors import UserError
from armd_jax.names import Split

SPLITS: tuple[Split, ...] = typing.get_args(Split)
# The words that sources use for a split.
SPLIT_NAMES: dict[str, Split] = {split: split for split in SPLITS}
SPLIT_NAMES |= {"training": "train", "validation": "valid", "val": "valid", "dev": "valid"}
# Words that occur in the names of files as well. Text that is held out, for whatever purpose, is never trained on.
FILE_WORDS: dict[str, Split] = SPLIT_NAMES | {"testing": "test", "devtest": "test"}
FILE_WORDS |= {word: "valid" for word in ("devel", "development", "eval", "evaluation", "heldout", "holdout")}


def splits_named(name: str) -> dict[Split, str]:
    """The splits that the name of a file or its folders gives, each with the word that says so.

    Words are runs of letters and may be anywhere: `c4-validation.00000-of-00008`, `en_train_0`, `wikiTest`, `dev/0`.
    """
    together = re.sub(r"(held|hold)[-_. ]?out", "heldout", name, flags=re.IGNORECASE)
    found: dict[Split, str] = {}
    for run in re.findall(r"[^\W\d_]+", together):
        for word in re.split(r"(?<=[a-z])(?=[A-Z])", run):
            split = FILE_WORDS.get(word.lower()) or FILE_WORDS.get(word.lower().removesuffix("set"))
            if split is not None:
                found.setdefault(split, word)
    return found


def hash_of(content: bytes) -> int:
    """What decides the split of a document: 64 bits of the sha256 of its UTF-8 text."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


class Division:
    """Divides the training documents of a source among train and the splits in `fractions`, by size in UTF-8 bytes.

    Several documents: each belongs to one split as a whole. For every split in `fractions`, documents are taken in the
    order of the sha256 of their text until the split has its fraction of the bytes. A document that is too large for
    what the split still lacks is passed over. Hash order looks random but is the same on every machine. Equal documents
    have equal hashes and stay together, so no held-out document is also trained on.

    One document: its text is cut into consecutive parts, train first and then the splits in the order of `fractions`.
    The cuts are made between lines unless the lines are too long for that.
    """

    def __init__(self, documents: Documents, fractions: dict[Split, float], name: str) -> None:
        """name: what the error about too little text calls the source."""
        self.documents, self.fractions, self._name = documents, fractions, name
        self.order: tuple[Split, ...] = ("train", *fractions)
        self._sizes: list[int] = []

    def read(self, split: Split) -> Iterator[str]:
        """A new pass over the documents of `split`. Raises UserError if there is too little text to divide."""
        if not self.fractions:
            yield from self.documents.read()
            return
        numbers = self._split_numbers
        if len(numbers) == 1:
            yield self._cut(split)
            return
        wanted = self.order.index(split)
        for index, text in enumerate(self.documents.read()):
            if numbers[index] == wanted:
                yield text

    @functools.cached_property
    def _split_numbers(self) -> np.ndarray:
        """int8[documents]: the place in `order` of every document's split. Takes one pass over the documents."""
        hashes, sizes = array.array("Q"), array.array("Q")
        for text in self.documents.read():
            content = text.encode()
            hashes.append(hash_of(content))
            sizes.append(len(content))
        return self.divide(np.array(hashes, np.uint64), np.array(sizes, np.uint64))

    def size(self, split: Split) -> int | None:
        """The UTF-8 bytes of the documents of `split`; None as long as they are not known.

        They are after a first call of `read` or `divide`, if there are several documents to divide.
        """
        return self._sizes[self.order.index(split)] if self._sizes else None

    def divide(self, hashes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """int8[documents]: the place in `order` of the split of every document.

        hashes, sizes: uint64[documents], `hash_of` and length of their UTF-8 texts.
        Raises UserError if there is too little text to divide.
        """
        if len(hashes) <= 1:
            return np.zeros(len(hashes), np.int8)
        # Equal documents form one group. `np.unique` sorts, so that groups are numbered in hash order.
        _, group = np.unique(hashes, return_inverse=True)
        group_size, size = np.bincount(group, weights=sizes), int(sizes.sum())
        number_of_group = np.zeros(len(group_size), np.int8)
        for number, (split, fraction) in enumerate(self.fractions.items(), start=1):
            goal, taken = fraction * size, 0.0
            for candidate in np.flatnonzero(number_of_group == 0):
                if taken >= goal:
                    break
                # Whether taking it brings the split as close to the goal as leaving it, or closer.
                if taken + group_size[candidate] / 2 <= goal:
                    number_of_group[candidate] = number
                    taken += group_size[candidate]
            if not taken or (number_of_group != 0).all():
                raise self._too_small(split, f"{len(hashes)} documents")
        numbers = number_of_group[group]
        self._sizes = [int(size) for size in np.bincount(numbers, sizes, len(self.order))]
        return numbers

    def _cut(self, split: Split) -> str:
        """The part of the only document that belongs to `split`."""
        (text,) = self.documents.read()
        ends = [len(text)]
        share = 1.0
        for fraction in reversed(self.fractions.values()):
            share -= fraction
            ends.insert(0, self._cut_before(text, share))
        number = self.order.index(split)
        start, end = [0, *ends][number : number + 2]
        if not text[start:end].strip():
            raise self._too_small(split, "one document")
        return text[start:end]

    def _cut_before(self, text: str, share: float) -> int:
        """Where to cut so that about `share` of the characters lie before the cut.

        That is the start of the line which the exact place falls into. If the start is so far back that the smallest
        split would change by more than a quarter of its size, the exact place is taken.
        """
        exact = round(share * len(text))
        line_start = text.rfind("\n", 0, exact) + 1
        near = min(self.fractions.values()) * len(text) / 4
        return line_start if exact - line_start <= near else exact

    def _too_small(self, split: Split, what: str) -> UserError:
        held_out = f"data.{split}_fraction={self.fractions[split]:g}" if split in self.fractions else "training"
        return UserError(
            f"{self._name}: nothing of {what} would be left for {held_out};"
            f" name files {', '.join(SPLITS[:-1])} and {SPLITS[-1]}, or change the fractions (0: no such split)"
        )

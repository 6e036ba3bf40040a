"""The tokens of a corpus, split by split, which packing cuts into rows: from its text, or from parts (`merging`)."""

import abc
import collections
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from armd_jax.data import batching, encoding, tokenizers
from armd_jax.data.batching import Tally
from armd_jax.data.corpora import Corpus
from armd_jax.data.manifest import TrainingSample
from armd_jax.data.reading import LeftOut
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.data_config import DataConfig
from armd_jax.names import Split


class TokenStreams(abc.ABC):
    """The tokens of a corpus.

    Attributes:
      corpus: it, whose documents need not be read.
      sample: what the tokenizer was trained on, if it was.
      pieces: decides how the streams are cut into arrays, whose number a killed preparation goes on from.
    """

    corpus: Corpus
    pieces: str
    sample: TrainingSample | None = None

    @abc.abstractmethod
    def is_empty(self, split: Split) -> bool:
        """Whether no document is in `split`."""

    @abc.abstractmethod
    def size(self, split: Split) -> int | None:
        """About how many bytes of text `split` has; None if that is not known yet."""

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained if it has to be."""

    @abc.abstractmethod
    def read(
        self, split: Split, tokenizer: Tokenizer, folder: Path, dtype: np.dtype, skip: int, tally: Tally, bar: tqdm
    ) -> Iterator[np.ndarray]:
        """The tokens of `split` in arrays dtype[tokens], with end-of-text behind every document.

        folder: that the tokenizer is saved in. skip: the first arrays, which are left out.
        tally: complete at the end, with what was skipped. bar: is told the bytes of the text.
        """

    @abc.abstractmethod
    def left_out(self, unread: Iterable[Split] = ()) -> dict[Split, LeftOut]:
        """Documents that are in no split, by the splits that the source itself has.

        unread: splits that were not read, because they were whole before a kill.
        """


class FromText(TokenStreams):
    """Tokens that are made of the text, by so many processes."""

    def __init__(self, config: DataConfig, corpus: Corpus, workers: int) -> None:
        self.corpus, self.pieces = corpus, f"text {batching.BATCH_CHARACTERS}"
        self._config, self._workers = config, workers

    def is_empty(self, split: Split) -> bool:
        return next(self.corpus.documents(split), None) is None

    def size(self, split: Split) -> int | None:
        return self.corpus.size(split)

    def tokenizer(self) -> Tokenizer:
        return tokenizers.load_or_train(self._config, self.corpus.documents("train"), self._keep)

    def _keep(self, sample: TrainingSample) -> None:
        self.sample = sample

    def read(
        self, split: Split, tokenizer: Tokenizer, folder: Path, dtype: np.dtype, skip: int, tally: Tally, bar: tqdm
    ) -> Iterator[np.ndarray]:
        batches = batching.batches(self.corpus.documents(split), tokenizer, tally, bar)
        collections.deque(itertools.islice(batches, skip), maxlen=0)
        yield from encoding.encode_all(batches, tokenizer, folder, dtype, self._workers)

    def left_out(self, unread: Iterable[Split] = ()) -> dict[Split, LeftOut]:
        for split in unread:
            collections.deque(self.corpus.documents(split), maxlen=0)
        return self.corpus.left_out()

"""Batches of text as tokens: here, or in several processes at once. Either way the result is the same.

Workers are processes of their own, begun anew: threads of `tokenizers` and sentencepiece share one interpreter, in
which the lists of ids that they return are made one after the other. Each worker loads the tokenizer from its files.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from armd_jax.data import tokenizers
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError

# Parts of documents, each with whether it is the last part of its document.
Batch = list[tuple[str, bool]]

_AHEAD = 2  # batches for each worker that are read and not yet taken: more would only need memory

_tokenizer: Tokenizer  # of a worker


def _encode(tokenizer: Tokenizer, batch: Batch, dtype: np.dtype) -> np.ndarray:
    ids = tokenizer.encode_batch([text for text, _ in batch])
    ends = [[tokenizer.end_of_text] if last else [] for _, last in batch]
    return np.concatenate([np.array(part + end, dtype) for part, end in zip(ids, ends, strict=True)])


def encode_all(
    batches: Iterator[Batch], tokenizer: Tokenizer, folder: Path, dtype: np.dtype, workers: int
) -> Iterator[np.ndarray]:
    """The tokens of every batch, in their sequence: dtype[tokens], with end-of-text behind every document.

    folder: of the tokenizer, for the workers. At most `_AHEAD` batches for each of them and as many results are in
    memory. One worker, or a single batch: everything happens in this process.
    Raises UserError if a worker ends before its work, as one does that the system kills for its memory.
    """
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if workers == 1 or len(first) < 2:
        yield from (_encode(tokenizer, batch, dtype) for batch in batches)
        return
    waiting: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(folder,)
    )
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_there, batch, dtype))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} processes that tokenize was ended from outside, perhaps for its memory; give fewer with"
            " --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The CPU cores that this process may use."""
    with contextlib.suppress(AttributeError):  # only Linux tells
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin(folder: Path) -> None:
    """Begins a worker. It leaves Ctrl-C to its parent, and ends when that does, however that ends."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other workers have the other cores
    _tokenizer = tokenizers.load(folder)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_there(batch: Batch, dtype: np.dtype) -> np.ndarray:
    return _encode(_tokenizer, batch, dtype)

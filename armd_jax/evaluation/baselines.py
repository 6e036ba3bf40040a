"""What text is worth without a network: the training text's token frequencies, and `xz -9e` after the training text.

Both read all training rows, which takes long for large data, so what they find out is kept in a file beside the rows.
"""

import contextlib
import dataclasses
import hashlib
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from armd_jax import files, typed
from armd_jax.data import loader
from armd_jax.data.mixture import Data, sources_of
from armd_jax.errors import UserError

FILE = "baselines.json"
_XZ_LIMIT = 64 * 2**20  # bytes; beyond this xz -9e takes minutes and its dictionary no longer holds the training text


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The content of the file.

    rows: the digest of the training rows and the tokenizer, which everything here follows from.
    unigrams: how often each token occurs in the training rows.
    xz_bits_per_byte: by the digest of the rows that are compressed.
    """

    rows: str
    unigrams: tuple[int, ...]
    xz_bits_per_byte: dict[str, float]


class Baselines:
    """The figures of prepared data.

    They are taken from the first file of `kept_in` that has them. What had to be measured is written to the first one
    that can be written; if none can, it is measured again next time.
    """

    def __init__(self, data: Data, kept_in: Sequence[Path] = ()) -> None:
        self._data, self._kept_in = data, kept_in
        found = [kept for file in kept_in if (kept := _read(file, data)) is not None]
        self._kept = found[0] if found else None

    def unigram_nats(self, split: str) -> float:
        """Nats of the split under the training split's token frequencies (add-one smoothing)."""
        train = np.array(self._known().unigrams, np.float64)
        held_out = train if split == "train" else _count(self._data, split)
        return float(-(held_out * np.log((train + 1) / (train.sum() + len(train)))).sum())

    def xz_bits_per_byte(self, split: str) -> float | None:
        """Bits per byte that `xz -9e` needs for the split's text after the training text.

        None if that cannot be known: the tokenizer is lossy, the text is too long, or the split is the training text,
        of which nothing would be left to compress after itself.
        """
        data = self._data
        num_bytes = sum(data.counts(name).bytes for name in ("train", split))
        if split == "train" or not data.tokenizer.lossless or num_bytes > _XZ_LIMIT:
            return None
        kept, digest = self._known(), _digest(data, split)
        if digest not in kept.xz_bits_per_byte:
            measured = {**kept.xz_bits_per_byte, digest: _compress(data, split)}
            kept = self._keep(dataclasses.replace(kept, xz_bits_per_byte=measured))
        return kept.xz_bits_per_byte[digest]

    def _known(self) -> _Kept:
        if self._kept is None:
            counts = _count(self._data, "train").astype(int).tolist()
            return self._keep(_Kept(self._data.digest, tuple(counts), {}))
        return self._kept

    def _keep(self, kept: _Kept) -> _Kept:
        self._kept = kept
        for file in self._kept_in:
            with contextlib.suppress(OSError):  # another user's folder, a read-only disk, a full one
                files.write(file, typed.to_json(kept) + "\n")
                break
        return kept


def _read(file: Path, data: Data) -> _Kept | None:
    """What the file knows of these data. None if there is no such file, if it is damaged, or is about other data."""
    try:
        kept = typed.build(_Kept, files.read_json(file)) if file.is_file() else None
    except UserError:
        return None
    if kept is None or kept.rows != data.digest or len(kept.unigrams) != data.tokenizer.vocab_size:
        return None
    return kept if min(kept.unigrams) >= 0 and sum(kept.unigrams) == data.counts("train").tokens else None


def _digest(data: Data, split: str) -> str:
    """sha256 of the rows of the split."""
    every = [item for source in sources_of(data) for item in source.manifest.splits.items()]
    shards = [shard.sha256 for name, part in every if name == split for shard in part.shards]
    return hashlib.sha256("\0".join(shards).encode()).hexdigest()


def _count(data: Data, split: str) -> np.ndarray:
    """float64[vocabulary]: how often each token occurs in the split."""
    size = data.tokenizer.vocab_size
    counts = np.zeros(size)
    for tokens, valid in loader.eval_batches(data, split, 256):
        counts += np.bincount(tokens[valid], minlength=size)
    return counts


def _compress(data: Data, split: str) -> float:
    """Bits per byte of the split's text, compressed after the training text."""
    texts = []
    for name in ("train", split):
        ids = np.concatenate([tokens[valid] for tokens, valid in loader.eval_batches(data, name, 256)])
        texts.append(data.tokenizer.decode(ids.tolist()).encode())
    size = [len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in (texts[0], texts[0] + texts[1])]
    return 8 * (size[1] - size[0]) / len(texts[1])

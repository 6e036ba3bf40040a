"""Mixtures (`data.mixture`): several prepared folders that one run is trained on, each with its share of the rows."""

import dataclasses
import hashlib
import os
import typing
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from armd_jax import data_config, remote
from armd_jax.data import prepared
from armd_jax.data.manifest import Counts, Manifest, prepared_below
from armd_jax.data.packing import PreparedData, open_prepared
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import Split

FIELD = "data.mixture"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Prepared folders with rows of the same length and the same tokenizer.

    Attributes:
      sources: in the sequence of `data.mixture`, which counts: it is part of what decides the batches.
      shares: of the training rows, one in sum.
    """

    sources: tuple[PreparedData, ...]
    shares: tuple[Fraction, ...]

    @property
    def length(self) -> int:
        """N, tokens per row."""
        return self.sources[0].length

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sources[0].tokenizer

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that at least one source has."""
        there = {split for source in self.sources for split in source.splits}
        return tuple(split for split in typing.get_args(Split) if split in there)

    @property
    def digest(self) -> str:
        """What decides the training batches besides seed and step: rows, tokenizer and shares."""
        return _digest([source.digest for source in self.sources], self.shares)

    def counts(self, split: str) -> Counts:
        """The size of `split`, over all sources that have it. Raises UserError if none has."""
        if split not in self.splits:
            raise UserError(f"{place_of(self)} have no {split!r} split; they have {', '.join(self.splits)}")
        counts = [dataclasses.astuple(source.counts(split)) for source in self.sources if split in source.splits]
        return Counts(*map(sum, zip(*counts, strict=True)))


# What a run is trained on, and what is scored: one prepared folder, or several.
Data = PreparedData | Mixture


def sources_of(data: Data, split: str | None = None) -> tuple[PreparedData, ...]:
    """The prepared folders of the data; if `split` is given, those that have it."""
    sources = data.sources if isinstance(data, Mixture) else (data,)
    return tuple(source for source in sources if split is None or split in source.splits)


def shares_of(data: Data) -> tuple[Fraction, ...]:
    """The share of the training rows that each of `sources_of` has."""
    return data.shares if isinstance(data, Mixture) else (Fraction(1),)


def place_of(data: Data) -> str:
    """The folders of the data, for people."""
    return ", ".join(str(source.folder) for source in sources_of(data))


def names_of(data: Data) -> tuple[str, ...]:
    """A short name for each of `sources_of`: that of its folder; each with its number if two have the same."""
    names = [Path(os.path.abspath(source.folder)).name for source in sources_of(data)]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{name}-{at}" for at, name in enumerate(names, start=1))


def open_chosen(config: DataConfig, length: int) -> tuple[Data, DataConfig]:
    """What `config.mixture` names, and the config with the tokenizer of its rows. One folder alone is no mixture.

    Raises UserError if an entry names no prepared folder, if two hold the same training rows, or if the rows do not fit
    `length`, the tokenizer of the config, or one another's tokenizer.
    """
    entries = data_config.mixture(config)
    opened = [_open(config, path, length) for path, _ in entries]
    sources, tokenizer = [source for source, _ in opened], opened[0][1]
    for at, source in enumerate(sources):
        first, path = entries[0][0], entries[at][0]
        if source.tokenizer.hash != sources[0].tokenizer.hash:
            ours = remote.spelled(str(sources[0].folder / "tokenizer"))
            raise UserError(
                f"{FIELD}: the rows of {path!r} were made with another tokenizer than those of {first!r};"
                f" prepare that text with --tokenizer={ours}"
            )
        for before in range(at):
            if source.digest == sources[before].digest:
                raise UserError(
                    f"{FIELD}: {entries[before][0]!r} and {path!r} hold the same training rows; name one of them, with"
                    " the sum of their weights"
                )
    section = dataclasses.replace(config, tokenizer=tokenizer)
    return _of(sources, [share for _, share in entries]), section


def _open(config: DataConfig, path: str, length: int) -> tuple[PreparedData, str]:
    """One source, and what `data.tokenizer` is with it."""
    folder = prepared.folder_of(path)
    if folder is None:
        raise UserError(f"{FIELD}: {path!r} is no folder that `armd prepare` wrote; prepare the text first")
    data, section = prepared.open_chosen(folder, dataclasses.replace(config, path=path), length, FIELD)
    return data, section.tokenizer


def find(config: DataConfig, noted: Sequence[Path], digest: str) -> Data | None:
    """The data with this digest, in the folders that `config.mixture` names or in those noted at the last start.

    None if they are in neither. Raises UserError if they are there, but their files do not fit their manifests.
    """
    entries = data_config.mixture(config)
    shares = [share for _, share in entries]
    for places in ([path for path, _ in entries], noted):
        folders = [remote.local(place) for place in places]
        digests = [_digest_there(folder) for folder in folders]
        if len(folders) == len(shares) and all(digests) and _digest(digests, shares) == digest:
            return _of([open_prepared(folder) for folder in folders], shares)
    return None


def _digest_there(folder: Path) -> str:
    """The digest of a prepared folder; empty if there is none, or one whose manifest is damaged."""
    found = [manifest for place, manifest in prepared_below(folder) if place == folder]
    return found[0].digest if found and isinstance(found[0], Manifest) else ""


def _of(sources: Sequence[PreparedData], shares: Sequence[Fraction]) -> Data:
    return Mixture(tuple(sources), tuple(shares)) if len(sources) > 1 else sources[0]


def _digest(digests: Sequence[str], shares: Sequence[Fraction]) -> str:
    """That of a single source is its own: its batches are what they are without a mixture."""
    if len(digests) == 1:
        return digests[0]
    parts = [f"{digest} {share}" for digest, share in zip(digests, shares, strict=True)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def described(data: Mixture, steps: int, batch_size: int) -> str:
    """The sources with their shares, and how often all steps of a training go through each, for people."""
    parts = []
    for name, source, share in zip(names_of(data), data.sources, data.shares, strict=True):
        rows = source.counts("train").tokens // source.length
        epochs = float(share * steps * batch_size / rows)
        parts.append(f"{float(share):.2%} {name} ({rows:,} rows, {epochs:,.2f} epochs)")
    return f"{FIELD}: in {steps:,} steps, {', '.join(parts)}"

"""Real text that generated texts are compared with: rows of as many tokens, of a run's own text or of other text."""

import dataclasses
import functools
import hashlib
import pathlib
import tempfile
import typing

import numpy as np

from armd_jax import files, remote
from armd_jax.config import Config
from armd_jax.data.mixture import Data, sources_of
from armd_jax.errors import UserError
from armd_jax.evaluation import held_out
from armd_jax.names import Split


@dataclasses.dataclass(frozen=True)
class Real:
    """Real text. name: for people. rows: token ids in the model's tokenizer, all of the same number."""

    name: str
    rows: list[list[int]]

    @functools.cached_property
    def digest(self) -> str:
        """Of the rows, which two texts of one name may differ in."""
        return hashlib.sha256(np.asarray(self.rows, "<i4").tobytes()).hexdigest()[:16]


def find(
    run: pathlib.Path, config: Config, reference: str | None, rows: pathlib.Path, length: int, samples: int
) -> Real | None:
    """The first `length` tokens of at most `samples` rows.

    reference: a split of the run's text, or other text, which is prepared in `rows` (see `held_out.find`); None: the
        run's own held-out text, if it is there.
    Raises UserError if there is no such text, or no whole row of it. None if none was named and the run's own text
    cannot be found, or has no such row.
    """
    split = next((name for name in typing.get_args(Split) if name == reference), None)
    text = None if split else reference
    with tempfile.TemporaryDirectory(prefix="armd-eval-") as temporary:
        place = pathlib.Path(temporary) if files.unwritable(rows) else rows
        try:
            data = held_out.find(run, config, split, text, place)
            chosen = held_out.chosen_split(split, data.splits)
            found = spread(data, chosen, length, samples)
        except UserError as error:
            if reference is None:
                return None
            raise UserError(f"--reference={remote.spelled(reference)}: {error}") from error
        name = f"{chosen} split" if text is None else f"{chosen} split of {remote.spelled(text)}"
        return Real(name, found)


def spread(data: Data, split: str, length: int, samples: int) -> list[list[int]]:
    """The first `length` tokens of rows that are spread evenly over a split: at most `samples`, full ones only.

    Raises UserError if the rows are shorter, or if none is full.
    """
    if data.length < length:
        raise UserError(f"its rows have {data.length} tokens, fewer than --length={length}")
    sources = [(source.rows(split), source.counts(split).tokens // data.length) for source in sources_of(data, split)]
    places = [(rows, at) for rows, full in sources for at in range(full)]
    if not places:
        raise UserError(f"its {split} split has no row of {data.length} tokens")
    chosen = np.unique(np.linspace(0, len(places) - 1, min(samples, len(places))).round().astype(int))
    return [places[at][0][places[at][1]][:length].tolist() for at in chosen]

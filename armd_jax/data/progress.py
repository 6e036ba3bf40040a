"""How far a killed preparation came, so that the next one goes on from its last whole shard.

The notes lie beside the shards until the folder is whole. What is written does not depend on them: documents are read
again from the start, and only those whose tokens are in whole shards are not tokenized again.
"""

import dataclasses
import hashlib
from pathlib import Path

from armd_jax import files, typed
from armd_jax.data.manifest import PackedSplit, Shard, TrainingSample
from armd_jax.data.shards import check_shard
from armd_jax.errors import UserError
from armd_jax.names import Split

FILE = "progress.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """A split that has begun.

    Attributes:
      split: which one.
      shards: those that are whole.
      tokens: how many tokens they hold.
      batch, skip: the next token is in this batch of the split, behind so many others.
    """

    split: Split
    shards: tuple[Shard, ...] = ()
    tokens: int = 0
    batch: int = 0
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a partial folder holds.

    Attributes:
      identity: of what is prepared, see `identity_of`.
      splits: those that are whole.
      part: the one that is not; None: none has a whole shard.
      sample: what the tokenizer was trained on, if it was.
    """

    identity: str
    splits: dict[Split, PackedSplit] = dataclasses.field(default_factory=dict)
    part: Part | None = None
    sample: TrainingSample | None = None

    def write(self, folder: Path) -> None:
        """Notes it in a folder. Raises OSError."""
        files.write(folder / FILE, typed.to_json(self) + "\n")


def identity_of(*what: object) -> str:
    """sha256 of everything that decides what is written and how it is cut into batches."""
    return hashlib.sha256("\0".join(map(str, what)).encode()).hexdigest()


def read(folder: Path, identity: str) -> Progress | None:
    """What an earlier process left in a folder; None if it left nothing that can be used.

    That is so if it was preparing something else, or if one of its shards is no longer what was written.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        found = typed.build(Progress, files.read_json(folder / FILE))
        if found.identity != identity:
            return None
        shards = [shard for split in found.splits.values() for shard in split.shards]
        for shard in (*shards, *(found.part.shards if found.part else ())):
            check_shard(folder, shard, hashed=True)
    except UserError:
        return None
    return found

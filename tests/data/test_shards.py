"""Rows in shards: the files that reading opens are closed again."""

import gc
import weakref

from armd_jax.data import packing
from armd_jax.data_config import DataConfig


def test_rows_are_freed_as_soon_as_nobody_holds_them(tmp_path, corpus):
    """Open shards are not left to the cycle collector: a process may open only so many files."""
    config = DataConfig(path=str(corpus), tokenizer="bytes", shard_rows=16)
    data = packing.prepare_into(config, 64, tmp_path / "rows", progress=False)
    gc.collect()
    gc.disable()
    try:
        rows = data.rows("train")
        assert len({int(rows[index][0]) for index in range(0, len(rows), 16)}) > 1  # a row of every shard
        alive = weakref.ref(rows)
        del rows
        assert alive() is None
    finally:
        gc.enable()

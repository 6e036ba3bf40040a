"""The data of a run: prepared from what its config names, and given to the devices as global batches."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Generator, Iterator

import jax
from jax.sharding import Mesh

from armd_jax.config import Config
from armd_jax.data import loader, packing, tokenizers
from armd_jax.data.packing import PreparedData
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.training import sharding


def prepare(config: Config, workdir: pathlib.Path, progress: bool = True) -> tuple[PreparedData, Config]:
    """The prepared data of the config, made now if it is not there yet, and the config with its vocabulary size."""
    tokenizer = tokenizers.ready_made(config.data)
    if tokenizer is not None:
        with_vocabulary(config, tokenizer)  # a mistake is found before any text is prepared
    root = pathlib.Path(config.data.cache_dir) if config.data.cache_dir else workdir / "data"
    data = packing.prepare(config.data, config.model.max_length, root, progress=progress)
    return data, with_vocabulary(config, data.tokenizer)


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the vocabulary size of the data's tokenizer. Raises UserError if it names another one."""
    size = tokenizer.vocab_size
    if config.model.vocab_size not in (0, size):
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the data's tokenizer has {size}; leave it at 0"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


@contextlib.contextmanager
def global_batches(
    config: Config, data: PreparedData, mesh: Mesh, first: int
) -> Generator[Iterator[tuple[int, jax.Array]]]:
    """(step, tokens_BN) from step `first` on, as global arrays. Each process reads only the rows of its own devices."""
    size = config.training.batch_size
    here = sharding.rows_here(mesh, size)
    with loader.train_batches(data, size, config.training.seed, first, here) as batches:
        yield ((number, sharding.global_rows(mesh, size, here, tokens)) for number, tokens in batches)

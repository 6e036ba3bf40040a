"""`armd import` of an autoregressive model that was trained here: an ARMD with the same left-to-right likelihoods.

Such a model has the aggregator `shift` and no two-stream layers (see "Baselines" in experiments/README.md). Its layers
become two-stream and causal layers, and the aggregator `neighbours` begins as in every other import.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import assert_never

import numpy as np

from armd_jax import config as configs
from armd_jax import files
from armd_jax.config import Config, ModelConfig
from armd_jax.core.sizes import embedding_scale, prediction_offset
from armd_jax.errors import UserError
from armd_jax.interop import importing, load, safetensors_format
from armd_jax.interop.readable import Readable
from armd_jax.names import AggregatorKind, ImportAggregator
from armd_jax.order_config import OrderConfig


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is a training run or an export in the format of this package."""
    file = folder / "config.json"
    values = files.read_json(file) if file.is_file() else None
    return isinstance(values, dict) and isinstance(values.get("model"), dict)  # other programs have no such section


@contextlib.contextmanager
def open_model(
    folder: pathlib.Path,
    two_stream_layers: int | None = None,
    max_length: int | None = None,
    aggregator: ImportAggregator | None = None,
) -> Iterator[tuple[Readable, Config]]:
    """The model of a run or an export as an ARMD, which is read weight by weight, and the config stored with it.

    The arguments are those of `importing.open_model`; max_length None: that of the run. Raises UserError if the model
    is no autoregressive one, or if an argument is impossible.
    """
    theirs = configs.read(folder).model
    if not theirs.has_orders or theirs.two_stream_layers or not _takes_preceding_token(theirs.aggregator):
        raise UserError(
            f"{folder}: its model is not autoregressive (model.two_stream_layers=0, model.aggregator='shift'); to train"
            f" it further, set training.init_from={folder}"
        )
    model = _model(theirs, two_stream_layers, max_length, aggregator)
    config = Config(model=model, order=OrderConfig(kind="left_to_right"))
    configs.check(config)
    with load.open_model(folder) as (source, _):

        def read(name: str) -> np.ndarray:
            match name.split("."):
                case ["aggregator", *_]:
                    return importing.aggregator_weight(name, shapes[name].shape, vectors_VD)
                case ["positions"]:
                    return source.read(name)[1 - prediction_offset(theirs) :]
                case _:
                    return source.read(name)

        def vectors_VD() -> np.ndarray:
            return source.read("embedding") * np.float32(embedding_scale(model))

        shapes = safetensors_format.shapes(model)
        yield Readable(model, source.tokenizer, read), config


def _takes_preceding_token(aggregator: AggregatorKind) -> bool:
    match aggregator:
        case "shift":
            return True
        case "positional" | "mean" | "neighbours":
            return False
        case _:
            assert_never(aggregator)


def _model(
    theirs: ModelConfig, two_stream_layers: int | None, max_length: int | None, aggregator: ImportAggregator | None
) -> ModelConfig:
    length = theirs.max_length if max_length is None else max_length
    model = importing.with_arguments(theirs, two_stream_layers, length, aggregator)
    # All rows of the one stream move by a place. RoPE sees differences of positions alone; of a learned table, the
    # vector of position 0, which no row had, is left out.
    left_out = 1 - prediction_offset(theirs) if theirs.learned_positions else 0
    positions = theirs.learned_positions - left_out
    return dataclasses.replace(model, prediction_position="previous", learned_positions=positions)

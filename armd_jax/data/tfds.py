"""TensorFlow Datasets as a source of documents, read without TensorFlow."""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from armd_jax.data.reading import Reader, Selection, Source, TextOrError, decode_utf8
from armd_jax.data.splits import SPLIT_NAMES
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import Split

PREFIX = "tfds:"  # how `data.path` names such a source
EXAMPLES_PER_READ = 256


def open_source(config: DataConfig) -> Source:
    """The prepared dataset that `config.path` names: "tfds:NAME", or "tfds:" and the folder of one of its versions.

    Raises UserError if there is no such dataset, or if it has no train split or no field `config.text_field`.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data.path={config.path!r}: pip install tensorflow-datasets array-record") from error
    name = config.path.removeprefix(PREFIX)
    try:
        if "/" in name and Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=config.tfds_data_dir or None)
        parts: dict[Split, Any] = {
            SPLIT_NAMES[split]: builder.as_data_source(split=split)
            for split in builder.info.splits
            if split in SPLIT_NAMES
        }
    except Exception as error:  # TFDS raises an exception of its own for every way in which a dataset can be missing
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"data.path={config.path!r}: no dataset that can be read: {reason}") from error
    if "train" not in parts:
        raise UserError(f"data.path={config.path!r}: the dataset has no train split")
    if config.text_field not in builder.info.features:
        raise UserError(
            f"data.path={config.path!r}: its examples have no field {config.text_field!r} (data.text_field)"
        )
    identity = [builder.info.full_name, config.text_field]
    identity += [f"{split} {len(part)}" for split, part in sorted(parts.items())]
    fingerprint = hashlib.sha256("\0".join(identity).encode()).hexdigest()
    readers: dict[Split, Reader] = {
        split: functools.partial(_read, part, config.text_field, f"{config.path} {split}")
        for split, part in parts.items()
    }
    description = f"TFDS dataset {builder.info.full_name}"
    return Source(description, fingerprint, "splits of the dataset", readers, _selection(config.path, builder))


def _selection(path: str, builder: Any) -> Selection:
    """Which splits of the dataset are read."""
    taken: dict[Split, str] = {}
    left_out: dict[str, str] = {}
    for name in builder.info.splits:
        split = SPLIT_NAMES.get(name)
        if split is None:
            left_out[name] = f"not the name of a split that is read: {', '.join(SPLIT_NAMES)}"
        else:
            if split in taken:
                left_out[taken[split]] = f"{name!r} is read as {split}"
            taken[split] = name
    return Selection(path, "splits", {split: (name,) for split, name in taken.items()}, left_out)


def _read(examples: Any, text_field: str, where: str) -> Iterator[TextOrError]:
    """The documents of a TFDS data source (an untyped class of that library).

    Many examples are read at once, because the cost of one read grows with the number of records in its file.
    """
    for start in range(0, len(examples), EXAMPLES_PER_READ):
        indices = range(start, min(start + EXAMPLES_PER_READ, len(examples)))
        for index, example in zip(indices, examples.__getitems__(list(indices)), strict=True):
            text = example[text_field]
            if isinstance(text, bytes):
                yield decode_utf8(text, f"{where}, example {index}", one_line=True)
            elif isinstance(text, str):
                yield text
            else:
                raise UserError(f"{where}, example {index}: field {text_field!r} is not text (data.text_field)")

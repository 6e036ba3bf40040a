"""`armd.load`: a training run or an exported folder as a `LanguageModel`. Nothing that is read is ever executed."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from armd_jax import config as configs
from armd_jax import files, remote
from armd_jax.config import Config, ModelConfig
from armd_jax.core.parameters import Params
from armd_jax.data import tokenizers
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import importing, safetensors_format
from armd_jax.interop.huggingface.configs import ARMD_TYPE
from armd_jax.interop.huggingface.source import Folder
from armd_jax.interop.readable import Readable
from armd_jax.training import checkpoints, divisibility, sharding, stored_params


def load(path: str | os.PathLike[str], ema: bool = True, mesh: Mesh | None = None) -> LanguageModel:
    """The model in `path`: a training run (its newest whole checkpoint) or a folder written by `armd export`.

    Of the exports for transformers, those with code of their own can be loaded. The others are no different from what
    other programs write, for which there is `armd import`.

    ema: take the averaged weights of a run, if it keeps an average. An export holds the weights that were exported.
    mesh: spread the weights over it as in training; None puts them on one device.
    Raises UserError if `path` is neither a run nor an export, or if its model cannot be divided over the mesh.
    """
    remote.check_place(path, "path")
    folder = remote.local(path)
    exported = _exported(folder)
    if exported is not None:
        if mesh is None:
            return exported.load()
        divisibility.check_model(exported.config, mesh)
        lm = exported.load()
        return lm.replace(jax.device_put(lm.params, sharding.param_shardings(mesh, lm.params)))
    config = configs.read(folder)
    tokenizer = _tokenizer(folder, config.model)
    if mesh is not None:
        divisibility.check_model(config.model, mesh)
    params = without_padding(checkpoints.restore_params(folder, config, ema, mesh), config)
    return LanguageModel(config.model, params, tokenizer)


@contextlib.contextmanager
def open_model(folder: pathlib.Path, ema: bool = True) -> Iterator[tuple[Readable, int | None]]:
    """What `load` would give, to be read weight by weight, and the step of the checkpoint that it is from.

    The step is None for an export, which has none. Raises UserError as `load` does.
    """
    exported = _exported(folder)
    if exported is not None:
        yield exported, None
        return
    config = configs.read(folder)
    model = config.model
    tokenizer = _tokenizer(folder, model)
    with stored_params.open_newest(folder, config, ema) as stored:
        read = functools.partial(safetensors_format.weight, stored.params, model)
        yield Readable(model, tokenizer, read), stored.step


def _exported(folder: pathlib.Path) -> Readable | None:
    """The model of an export; None if the folder is no export."""
    if _model_type(folder) == ARMD_TYPE:
        return importing.open_model(Folder(folder))[0]
    if not (folder / safetensors_format.WEIGHTS).is_file():
        return None
    model = configs.read(folder).model
    return Readable(model, _tokenizer(folder, model), safetensors_format.Export(folder, model).read)


def _tokenizer(folder: pathlib.Path, model: ModelConfig) -> Tokenizer:
    tokenizer = tokenizers.load(folder / "tokenizer")
    if tokenizer.vocab_size > model.vocab_size:  # ids behind those of the tokenizer are padding of the source's
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its config.json says"
            f" model.vocab_size={model.vocab_size}"
        )
    return tokenizer


def _model_type(folder: pathlib.Path) -> object:
    """What a Hugging Face folder says it holds; None if it is no such folder."""
    file = folder / "config.json"
    values = files.read_json(file) if file.is_file() else None
    return values.get("model_type") if isinstance(values, dict) else None


def without_padding(params: Params, config: Config) -> Params:
    """The parameters with the padding rows of the vocabulary set to 0, as they are when an export is read."""
    real = jnp.arange(params["embedding"].shape[0]) < config.model.vocab_size
    params = dict(params, embedding=jnp.where(real[:, None], params["embedding"], 0))
    if "head" in params:
        params["head"] = jnp.where(real, params["head"], 0)
    return params

"""`armd.load`: a training run or an exported folder as a `LanguageModel`. Nothing that is read is ever executed."""

import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from armd_jax import config as configs
from armd_jax import files
from armd_jax.config import Config
from armd_jax.core.parameters import Params
from armd_jax.data import tokenizers
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import importing, safetensors_format
from armd_jax.interop.huggingface.configs import ARMD_TYPE
from armd_jax.interop.huggingface.source import Folder
from armd_jax.training import checkpoints, divisibility, sharding


def load(path: str | os.PathLike[str], ema: bool = True, mesh: Mesh | None = None) -> LanguageModel:
    """The model in `path`: a training run (its newest whole checkpoint) or a folder written by `armd export`.

    Of the exports for transformers, those with code of their own can be loaded. The others are no different from what
    other programs write, for which there is `armd import`.

    ema: take the averaged weights of a run, if it keeps an average. An export holds the weights that were exported.
    mesh: spread the weights over it as in training; None puts them on one device.
    Raises UserError if `path` is neither a run nor an export, or if its model cannot be divided over the mesh.
    """
    files.check_local(path, "path")
    folder = pathlib.Path(path)
    if _model_type(folder) == ARMD_TYPE:
        lm, config = importing.read(Folder(folder))
        if mesh is not None:
            divisibility.check_model(config.model, mesh)
            lm = lm.replace(jax.device_put(lm.params, sharding.param_shardings(mesh, lm.params)))
        return lm
    config = configs.read(folder)
    tokenizer = tokenizers.load(folder / "tokenizer")
    if tokenizer.vocab_size > config.model.vocab_size:  # ids behind those of the tokenizer are padding of the source's
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its config.json says"
            f" model.vocab_size={config.model.vocab_size}"
        )
    if mesh is not None:
        divisibility.check_model(config.model, mesh)
    if (folder / safetensors_format.WEIGHTS).is_file():
        params = safetensors_format.read(folder, config.model)
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, params))
    else:
        params = without_padding(checkpoints.restore_params(folder, config, ema, mesh), config)
    return LanguageModel(config.model, params, tokenizer)


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

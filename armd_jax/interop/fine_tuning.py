"""Fine-tuning: a new run that starts from the weights of another run or of an export (`training.init_from`)."""

import pathlib

from jax.sharding import Mesh

from armd_jax import config as configs
from armd_jax import remote
from armd_jax.config import Config
from armd_jax.core.parameters import Params
from armd_jax.data import prepared, tokenizers
from armd_jax.data.mixture import Data
from armd_jax.errors import UserError
from armd_jax.interop.load import load


def check_source(config: Config) -> None:
    """Raises UserError if the weights of `training.init_from` are not those of the new run's model or vocabulary.

    It reads only configs and tokenizers, so that a mistake is found before any text is prepared. Whether a tokenizer
    that is yet to be trained becomes the same one, `initial_params` finds out: on little text it is smaller than asked.
    """
    source = remote.local(config.training.init_from)
    model = configs.read(source).model
    for name in configs.weight_fields():
        theirs, ours = getattr(model, name), getattr(config.model, name)
        if theirs != ours:
            raise UserError(f"training.init_from={source}: model.{name} is {theirs!r} there, {ours!r} here")
    if not config.data.mixture and prepared.folder_of(config.data.path) is None:
        there, here = tokenizers.load(source / "tokenizer"), tokenizers.ready_made(config.data)
        if here is None:
            fits = config.data.tokenizer == there.kind and config.data.vocab_size >= there.vocab_size
        else:
            fits = here.hash == there.hash
        if not fits:
            raise _other_vocabulary(source)


def initial_params(config: Config, data: Data, mesh: Mesh) -> Params:
    """The weights of `training.init_from`, spread over the mesh.

    Raises UserError if their tokenizer is not that of the data.
    """
    source = remote.local(config.training.init_from)
    if tokenizers.load(source / "tokenizer").hash != data.tokenizer.hash:
        raise _other_vocabulary(source)
    return load(source, mesh=mesh).params


def _other_vocabulary(source: pathlib.Path) -> UserError:
    return UserError(
        f"training.init_from={source}: another vocabulary than the data's; set data.tokenizer={source / 'tokenizer'}"
    )

"""Which judge a folder holds: a model of this package, one that can be imported, or one that transformers computes."""

import pathlib

from armd_jax import config as configs
from armd_jax import files, remote
from armd_jax.errors import UserError
from armd_jax.evaluation import generative_transformers
from armd_jax.evaluation.generative_judge import Judge, OwnJudge
from armd_jax.interop import importing
from armd_jax.interop.huggingface import configs as huggingface_configs
from armd_jax.interop.huggingface.configs import ARMD_TYPE
from armd_jax.interop.load import load
from armd_jax.names import Reset


def open_judge(path: pathlib.Path, batch_size: int) -> Judge:
    """The judge in a folder: a run or an export of this package, or a causal language model of Hugging Face.

    The latter, and a GGUF file, are imported without torch, straight into memory. A folder of an architecture that
    cannot be imported is left to transformers, if that is installed. batch_size: texts per network call.
    Raises UserError if the folder holds none of these, or a denoiser, which gives texts no probability.
    """
    name = remote.spelled(str(path))
    if not path.exists():
        raise UserError(f"--judge={name}: there is no such folder or file")
    if not path.is_dir():
        return _imported(path, name, batch_size)
    file = path / "config.json"
    values = files.read_json(file) if file.is_file() else None
    kind = values.get("model_type", "") if isinstance(values, dict) else ""
    if kind in ("", ARMD_TYPE):
        lm = load(path)
        if not lm.config.has_orders:
            raise UserError(
                f"--judge={name}: a denoiser (model.kind) gives no text a probability; choose another judge"
            )
        # An export for transformers does not say what rows were in training.
        reset: Reset = "none" if kind else configs.read(path).data.reset
        return OwnJudge.of(lm, name, "armd", batch_size, reset)
    try:
        return _imported(path, name, batch_size)
    except UserError as error:
        return generative_transformers.open_judge(path, name, batch_size, str(error))


def _imported(path: pathlib.Path, name: str, batch_size: int) -> OwnJudge:
    source = importing.open_source(path)
    length = huggingface_configs.read(source.config, source.where).model.max_length
    lm = importing.open_model(source, two_stream_layers=0, max_length=length, aggregator="shift")[0].load()
    return OwnJudge.of(lm, name, "imported", batch_size)

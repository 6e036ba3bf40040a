"""`armd export --format=huggingface`: a folder that Hugging Face transformers loads.

A model that is exactly one of transformers' own networks is written as that (`native`). Any other brings code in
PyTorch, the files of `template`, and is loaded with trust_remote_code. Weights are read and written one at a time.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from armd_jax import files, typed
from armd_jax.config import ModelConfig
from armd_jax.core.sizes import mlp_width
from armd_jax.data import tokenizer_export
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.interop import safetensors_format
from armd_jax.interop.huggingface import card, names, native
from armd_jax.interop.huggingface.card import Facts
from armd_jax.interop.huggingface.configs import ARMD_FIELDS, ARMD_TYPE
from armd_jax.interop.huggingface.native import Native
from armd_jax.interop.huggingface.source import INDEX, SINGLE
from armd_jax.interop.readable import Job, Readable, SafetensorsFile, put_all, reading_place
from armd_jax.names import ExportCode, ExportDtype

_TEMPLATE = pathlib.Path(__file__).parent / "template"
_CODE = ("configuration_armd.py", "network_armd.py", "modeling_armd.py", "custom_generate/generate.py")
SHARD_GB = 5.0


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written. why: why it is not native; empty if it is, or if that was not asked for."""

    files: tuple[str, ...]
    native: bool
    why: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A weight of theirs: its name, its shape, and the entry of the table that gives it, with its place there."""

    name: str
    shape: tuple[int, ...]
    entry: names.Entry
    place: int


def check(config: ModelConfig, shard_gb: float) -> None:
    """Raises UserError if no such export can be made."""
    if not config.has_orders:
        raise UserError("--format=huggingface: a denoiser (model.kind) has no class in transformers and no order")
    if not 0 < shard_gb < float("inf"):
        raise UserError(f"--shard-size={shard_gb:g}: must be above 0, in GB")


def write(
    model: Readable,
    out: pathlib.Path,
    facts: Facts,
    code: ExportCode = "auto",
    dtype: ExportDtype = "float32",
    shard_gb: float = SHARD_GB,
) -> Written:
    """Writes the folder, whole or not at all.

    facts: for the model card. code: `native` is transformers' own, `remote` what is in the folder, `auto` the former if
    it is possible. shard_gb: most 10^9 bytes of weights in a file, unless one weight alone is larger.
    Raises UserError if the model cannot be written as it is asked for, and OSError if it does not fit on the disk.
    """
    config, tokenizer = model.config, model.tokenizer
    check(config, shard_gb)
    safetensors_format.check_new(out)
    found = "" if code == "remote" else native.fit(model)
    if code == "native" and isinstance(found, str):
        raise UserError(f"--code=native: not a network of transformers' own: {found}; --code=remote brings its code")
    made = found if isinstance(found, Native) else None
    tokenizer_json = tokenizer_export.tokenizer_json(tokenizer)
    with files.new_folder(out) as folder:
        try:
            _write_weights(_Weights(model, made), folder, dtype, int(shard_gb * 1e9))
        except OSError as error:
            raise files.os_error(error, out / SINGLE) from error
        _write_config(config, tokenizer, made, dtype, folder)
        _write_tokenizer(tokenizer, tokenizer_json, config.max_length, folder)
        if made is None:
            for name in _CODE:
                (folder / name).parent.mkdir(exist_ok=True)
                files.write(folder / name, (_TEMPLATE / name).read_bytes())
        files.write(folder / "README.md", card.page(config, made, dtype, facts))
        files.write_checksums(folder)
        written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Written(tuple(written), made is not None, found if isinstance(found, str) else "")


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The weights of a model under the names of theirs, each made when it is asked for."""

    source: Readable
    made: Native | None

    def tensors(self) -> Iterator[_Tensor]:
        """All of them, in the sequence of the table. No weight is read for it."""
        config = self.source.config
        shapes = {name: value.shape for name, value in safetensors_format.shapes(config).items()}
        shapes.setdefault("head", shapes["embedding"][::-1])
        made = self.made
        table = names.table("armd", config) if made is None else names.table(made.family, made.model)
        for entry in table:
            # What the layout changes do to empty arrays of our shapes are the shapes of theirs.
            empty = self._moved(entry, tuple(np.broadcast_to(np.float32(0), shapes[name]) for name in entry.ours))
            for place, (name, like) in enumerate(zip(entry.theirs, entry.to_theirs(empty), strict=True)):
                yield _Tensor(name, like.shape, entry, place)

    def read(self, tensor: _Tensor) -> np.ndarray:
        """The value, float32."""
        ours = self._moved(tensor.entry, tuple(self._ours(name) for name in tensor.entry.ours))
        return tensor.entry.to_theirs(ours)[tensor.place]

    def _ours(self, name: str) -> np.ndarray:
        if name == "head" and self.source.config.tie_embeddings:  # to a table that is written with a scale now
            return self.source.read("embedding").T
        value = self.source.read(name)
        return value * np.float32(self.made.scale) if name == "embedding" and self.made is not None else value

    def _moved(self, entry: names.Entry, ours: names.Arrays) -> names.Arrays:
        """Positions begin where theirs do."""
        first = self.made.first_position if self.made is not None else 0
        return (ours[0][first:],) if entry.ours == ("positions",) else ours


def _write_weights(weights: _Weights, folder: pathlib.Path, dtype: ExportDtype, most: int) -> None:
    """Writes one file, or several of at most `most` bytes with an index. A weight is never cut."""
    kind = np.dtype(jnp.dtype(dtype))
    shards: list[list[_Tensor]] = [[]]
    size = total = 0
    for tensor in weights.tensors():
        needed = int(np.prod(tensor.shape, dtype=np.int64)) * kind.itemsize
        if shards[-1] and size + needed > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + needed, total + needed
    file_of: dict[str, str] = {}
    writers: dict[str, SafetensorsFile] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {tensor.name: tensor.shape for tensor in shard}
        writers[name] = SafetensorsFile(folder / name, shapes, kind, {"format": "pt"})
        file_of |= dict.fromkeys(shapes, name)
    jobs = [
        Job(writers[file_of[tensor.name]], tensor.name, functools.partial(weights.read, tensor))
        # In the sequence in which they are read fastest, whatever file a weight is in.
        for tensor in sorted(itertools.chain(*shards), key=lambda tensor: reading_place(tensor.entry.ours[0]))
    ]
    put_all(jobs)
    for writer in writers.values():
        writer.finish()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        files.write(folder / INDEX, typed.to_json(index, indent=2) + "\n")


# --- config and tokenizer ---------------------------------------------------------------------------------------------


def _write_config(
    config: ModelConfig, tokenizer: Tokenizer, made: Native | None, dtype: ExportDtype, folder: pathlib.Path
) -> None:
    ends: dict[str, Any] = {
        "bos_token_id": None if made is None else made.bos,
        "eos_token_id": tokenizer.end_of_text,
        "pad_token_id": tokenizer.end_of_text,
    }
    fields = _armd_fields(config) if made is None else made.fields
    files.write(folder / "config.json", typed.to_json(fields | ends | {"dtype": dtype}, indent=2) + "\n")
    files.write(folder / "generation_config.json", typed.to_json(ends, indent=2) + "\n")


def _armd_fields(config: ModelConfig) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for ours, theirs in ARMD_FIELDS.items()}
    return {
        "architectures": ["ArmdForCausalLM"],
        "model_type": ARMD_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_armd.ArmdConfig",
            "AutoModelForCausalLM": "modeling_armd.ArmdForCausalLM",
        },
        **values,
        # Sizes that follow from others here are fields of their own there.
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": mlp_width(config),
        "rope_parameters": native.rope_parameters(config),
    }


def _write_tokenizer(tokenizer: Tokenizer, content: str, max_length: int, folder: pathlib.Path) -> None:
    """Our form of the tokenizer in a folder of its own, and the form that AutoTokenizer reads."""
    end = tokenizer_export.end_token(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    tokenizer.save(folder / "tokenizer")
    files.write(folder / "tokenizer.json", content)
    files.write(folder / "tokenizer_config.json", typed.to_json(settings, indent=2) + "\n")

"""The export format: `model.safetensors`, `config.json` and `tokenizer/` in one folder.

Tensors are float32 under flat names: `embedding` [vocab_size, D], `start` [D], `layers.<i>.<name>` for the layers in
order (the first `two_stream_layers` of them are two-stream layers), `aggregator.…`, `final_norm.…`, and `head`
[D, vocab_size] if it is not tied to the embedding. A denoiser has no aggregator, its `start` is the vector of a masked
token, and all of its layers are of one kind. Padding rows of the vocabulary are left out.
"""

import pathlib
from collections.abc import Mapping
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from armd_jax import config as configs
from armd_jax import files
from armd_jax.config import Config, ModelConfig
from armd_jax.core import parameters
from armd_jax.core.parameters import Params
from armd_jax.core.sizes import padded_vocab
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel

WEIGHTS = "model.safetensors"


def flatten(params: Params, config: ModelConfig) -> dict[str, jax.Array]:
    """Parameters under their export names, layers unstacked, vocabulary padding left out. Traceable."""
    per_layer = parameters.unstack(params)
    layers = list(per_layer.pop("bidirectional", [])) + list(per_layer.pop("two_stream", []))
    if "last_two_stream" in per_layer:
        layers.append(per_layer.pop("last_two_stream"))
    layers += per_layer.pop("causal", [])
    tree = per_layer | {"layers": {str(i): layer for i, layer in enumerate(layers)}}
    flat: dict[str, jax.Array] = {}

    def walk(node: Params, prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    walk(tree, "")
    flat["embedding"] = flat["embedding"][: config.vocab_size]
    if "head" in flat:
        flat["head"] = flat["head"][:, : config.vocab_size]
    return flat


def shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of all weights by their export names, without making any."""
    return jax.eval_shape(lambda key: flatten(parameters.init(key, config), config), jax.random.key(0))


def weight(params: Params, config: ModelConfig, name: str) -> np.ndarray:
    """One of the weights that `flatten` gives, by its export name. No other weight is copied for it."""
    *parents, last = name.split(".")
    node, layer = params, None
    if parents[:1] == ["layers"]:
        number, two = int(parents[1]), config.two_stream_layers
        parents = parents[2:]
        if "bidirectional" in params:
            node, layer = params["bidirectional"], number
        elif number == two - 1:
            node = params["last_two_stream"]
        elif number < two:
            node, layer = params["two_stream"], number
        else:
            node, layer = params["causal"], number - two
    for parent in parents:
        node = node[parent]
    value = node[last] if layer is None else node[last][layer]
    match name:
        case "embedding":
            value = value[: config.vocab_size]
        case "head":
            value = value[:, : config.vocab_size]
        case _:
            pass
    return np.asarray(value)


def unflatten(flat: dict[str, np.ndarray], config: ModelConfig) -> Params:
    """The inverse of `flatten`; padding rows become 0."""
    params = per_layer(flat, config)
    for name in params.keys() & {"two_stream", "causal", "bidirectional"}:
        params[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[name])
    return params


def per_layer(flat: Mapping[str, np.ndarray | jax.Array], config: ModelConfig) -> Params:
    """`parameters.unstack` of what `unflatten` gives. Traceable."""
    missing = padded_vocab(config) - config.vocab_size
    pads = {"embedding": ((0, missing), (0, 0)), "head": ((0, 0), (0, missing))}
    tree: Params = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.pad(value, pads[name]) if name in pads else jnp.asarray(value)
    layers = [layer for _, layer in sorted(tree.pop("layers").items(), key=lambda item: int(item[0]))]
    match config.kind:
        case "armd":
            two = config.two_stream_layers
            for name, group in (("two_stream", layers[: max(two - 1, 0)]), ("causal", layers[two:])):
                if group:
                    tree[name] = group
            if two:
                tree["last_two_stream"] = layers[two - 1]
        case "denoiser":
            tree["bidirectional"] = layers
        case _:
            assert_never(config.kind)
    return tree


def check_new(out: pathlib.Path) -> None:
    """Raises UserError if no export can be written to `out`: it exists already, or no folder can be made there."""
    if out.exists():
        raise UserError(f"--out={out}: exists already; choose another folder or remove it")
    if reason := files.unwritable(out):
        raise UserError(f"--out={out}: {reason}")


def write(lm: LanguageModel, config: Config, out: pathlib.Path) -> None:
    """Writes the export folder, whole or not at all.

    Raises UserError as `check_new` does, and OSError if the export does not fit on the disk.
    """
    check_new(out)
    if lm.tokenizer is None:
        raise UserError("this model has no tokenizer to export")
    flat = {name: np.ascontiguousarray(value) for name, value in flatten(lm.params, lm.config).items()}
    with files.new_folder(out) as folder:
        try:
            safetensors.numpy.save_file(flat, folder / WEIGHTS, metadata={"format": "armd-jax"})
        except safetensors.SafetensorError as error:
            raise files.os_error(error, out / WEIGHTS) from error
        (folder / WEIGHTS).chmod(0o644)  # the library makes private files; these are for whoever may read the folder
        files.write(folder / "config.json", configs.to_json(config))
        lm.tokenizer.save(folder / "tokenizer")


def read(folder: pathlib.Path, config: ModelConfig) -> Params:
    """The parameters of an export. Raises UserError if names or shapes are not those of the config's model."""
    file = folder / WEIGHTS
    try:
        flat = safetensors.numpy.load_file(file)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    layers = {name.split(".")[1] for name in flat if name.startswith("layers.")}
    if (
        len(layers) != config.num_layers
    ):  # checked before shapes are worked out, whose cost grows with the number of layers
        raise UserError(f"{file}: has {len(layers)} layers, its config.json says model.num_layers={config.num_layers}")
    other = sorted(name for name, value in flat.items() if value.dtype != np.float32)
    if other:
        raise UserError(f"{file}: {other[0]} is {flat[other[0]].dtype}, expected float32")
    wanted = {name: value.shape for name, value in shapes(config).items()}
    found = {name: value.shape for name, value in flat.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise UserError(
            f"{file}: does not fit its config.json: {wrong[0]} has shape {found.get(wrong[0])},"
            f" expected {wanted.get(wrong[0])} ({len(wrong)} tensors differ)"
        )
    return unflatten(flat, config)

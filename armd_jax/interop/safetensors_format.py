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

from armd_jax import files
from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.core.parameters import Params
from armd_jax.core.sizes import padded_vocab
from armd_jax.errors import UserError

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
    """One of the weights that `flatten` gives, by its export name. No other weight is copied for it.

    The leaves may be anything that is indexed as arrays are.
    """
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


class Export:
    """The weights of an export, read one at a time."""

    def __init__(self, folder: pathlib.Path, config: ModelConfig) -> None:
        """Reads the header. Raises UserError if names, shapes or types are not those of the config's model."""
        self._file = folder / WEIGHTS
        try:
            # One file for all weights, also if another takes its name meanwhile.
            self._opened = safetensors.safe_open(self._file, framework="numpy")
            slices = {name: self._opened.get_slice(name) for name in self._opened.keys()}  # noqa: SIM118
            found = {name: tuple(one.get_shape()) for name, one in slices.items()}
            types = {name: one.get_dtype() for name, one in slices.items()}
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise self._unreadable(error) from error
        layers = {name.split(".")[1] for name in found if name.startswith("layers.")}
        if len(layers) != config.num_layers:  # before shapes are worked out, whose cost grows with the layers
            raise UserError(
                f"{self._file}: has {len(layers)} layers, its config.json says model.num_layers={config.num_layers}"
            )
        other = sorted(name for name, kind in types.items() if kind != "F32")
        if other:
            raise UserError(f"{self._file}: {other[0]} is {types[other[0]]}, expected F32")
        wanted = {name: value.shape for name, value in shapes(config).items()}
        if wanted != found:
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise UserError(
                f"{self._file}: does not fit its config.json: {wrong[0]} has shape {found.get(wrong[0])},"
                f" expected {wanted.get(wrong[0])} ({len(wrong)} tensors differ)"
            )

    def read(self, name: str) -> np.ndarray:
        """One weight. Raises UserError if it cannot be read."""
        try:
            value: np.ndarray = self._opened.get_tensor(name)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise self._unreadable(error) from error
        return value

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self._file}: cannot be read ({error})")

"""The parameters: a plain nested dict, how it is initialised, and the forms that decoding takes."""

import math
from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core import aggregation, axes
from armd_jax.core.context import Context
from armd_jax.core.kernels.panels import Panels, cut
from armd_jax.core.layer import Layer, StackInputs, make_norm, rotary_table
from armd_jax.core.rows import single_row
from armd_jax.core.sizes import embedding_rms, embedding_scale, padded_vocab

Params = dict[str, Any]


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Float32 parameters as a plain nested dict; layers of one kind are stacked along their first axis.

    Keys: embedding [V, D], start [D], positions (if they are learned), aggregator (if it has any), two_stream (M - 1
    layers), last_two_stream, causal (L - M layers), final_norm, and head [D, V] if it is not tied to the embedding. In
    a denoiser, bidirectional (L layers) takes the place of aggregator and of the three kinds of layers, and start is
    the vector of a masked token.
    """
    keys = jax.random.split(key, 6)
    width, vocab = config.width, padded_vocab(config)
    num_two, num_causal = config.two_stream_layers, config.num_layers - config.two_stream_layers
    rows_BRD = jnp.zeros((1, 2, width))

    def layers(key: jax.Array, layer: Layer, count: int) -> Params:
        rotary = rotary_table(jnp.zeros((1, 2), jnp.int32), config)
        inputs = StackInputs(rotary, jnp.ones((1, 2 - layer.first_query), jnp.int32))
        return jax.vmap(lambda k: layer.init(k, rows_BRD, inputs, Context())["params"])(jax.random.split(key, count))

    params: Params = {
        # The start token is as long as the vectors of tokens, which are rows of this table times its scale.
        "embedding": nn.initializers.normal(embedding_rms(config) / embedding_scale(config))(keys[0], (vocab, width)),
        "start": nn.initializers.normal(embedding_rms(config))(keys[1], (width,)),
    }
    if config.learned_positions:
        init_positions = nn.initializers.normal(0.02)
        params["positions"] = init_positions(jax.random.fold_in(keys[1], 1), (config.learned_positions, width))
    match config.kind:
        case "armd":
            row_B1D = rows_BRD[:, :1]
            aggregator = aggregation.make(config).init(keys[2], single_row(), row_B1D, (row_B1D,) * 2, None, False)
            if aggregator:
                params["aggregator"] = aggregator["params"]
            if num_two > 1:
                layer = Layer(config, "two_stream", num_keys=1)
                params["two_stream"] = layers(jax.random.fold_in(keys[3], 0), layer, num_two - 1)
            if num_two:
                layer = Layer(config, "last_two_stream", num_keys=1, first_query=1)
                last = layers(jax.random.fold_in(keys[3], 1), layer, 1)
                params["last_two_stream"] = jax.tree.map(lambda a: a[0], last)
            if num_causal:
                params["causal"] = layers(keys[4], Layer(config, "causal", num_keys=2), num_causal)
        case "denoiser":
            params["bidirectional"] = layers(keys[4], Layer(config, "bidirectional", num_keys=2), config.num_layers)
        case _:
            assert_never(config.kind)
    params["final_norm"] = make_norm(config, "final_norm").init(keys[5], rows_BRD)["params"]
    if not config.tie_embeddings:
        params["head"] = nn.initializers.normal(0.02)(keys[5], (width, vocab))
    return params


def count(config: ModelConfig) -> int:
    """How many parameters a model has, without the rows that pad its vocabulary to a multiple of 128."""
    shapes = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    tables = 1 if config.tie_embeddings else 2
    padding = (padded_vocab(config) - config.vocab_size) * config.width * tables
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) - padding


def unstack(params: Params) -> Params:
    """The same parameters with a list of per-layer dicts in place of stacked layers.

    Decoding takes this form: on CPU, slicing stacked parameters inside the sampling loop copies them at every step.
    """
    per_layer = dict(params)
    for name in ("two_stream", "causal", "bidirectional"):
        if name in params:
            count = jax.tree.leaves(params[name])[0].shape[0]
            per_layer[name] = [jax.tree.map(lambda a, i=i: a[i], params[name]) for i in range(count)]
    return per_layer


def in_panels(params: Params, both_streams: bool, one_stream: bool) -> Params:
    """`unstack`ed parameters whose weights are in panels, for decoding on CPU with a few float32 rows per call.

    both_streams: cut the weights that rows of both streams are multiplied with, those of the first M - 1 layers.
    one_stream: cut the others. The head is among them, as a copy of its own if it is tied to the embedding.
    """

    def panels(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array | Panels:
        name = path[-1].key
        if name not in axes.PARAMETERS or name == "embedding" or path[0].key == "aggregator":
            return leaf
        wanted = both_streams if path[0].key == "two_stream" and name != "key_value" else one_stream
        found = cut(leaf.reshape(-1, leaf.shape[-1]) if name == "attention_out" else leaf) if wanted else leaf
        return found if isinstance(found, Panels) else leaf

    if one_stream and "head" not in params:
        params = params | {"head": params["embedding"].T}
    return jax.tree_util.tree_map_with_path(panels, unstack(params))

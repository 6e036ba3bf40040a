"""The two-stream network (paper section 4): a pure function of parameters and rows.

Dimension letters, used as suffixes everywhere in the package:
    B batch   N sequence length   D model width   H heads   K head width   F MLP width   V vocabulary (padded)
    L layers  M two-stream layers S streams       P positional-embedding width
    X rows of stream X   G rows of stream G   R rows of both   Q query rows   T keys

Stream X (causal) reads tokens; stream G (strictly causal) starts from prefix aggregation and predicts them. In the M
two-stream layers all weights are shared, and both streams attend to keys and values that come from X. The last of them
needs X's keys and values only. L - M causal layers on G alone follow, then the final norm and the output head:

    tokens --embed--> X --[M two-stream layers]--> (keys and values)
              |               | | |
              +-aggregate-->  G --[M two-stream layers]--> G --[L - M causal layers]--> norm --> head

One `Layer` definition serves every case, training and cached decoding alike: some rows give keys, some give queries.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core.aggregation import Aggregator
from armd_jax.core.attention import KERNEL_OUTPUT, attention, cached_attention, chunk_size
from armd_jax.core.cache import Cache, write
from armd_jax.core.embedding import look_up
from armd_jax.core.linear import linear
from armd_jax.core.panels import Panels, cut
from armd_jax.core.rows import START, Rows, single_row

Params = dict[str, Any]
# (array, logical axis names) -> the same array, told how to lie on the mesh. The network itself knows no mesh.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
# (q, k, v, prefix lengths, name of the layer group) -> attention output, in place of `core.attention.attention`.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, str], jax.Array]
VOCAB_MULTIPLE = 128
ROW_AXES = ("batch", "length", "embed")
# Logical axes of every parameter that may be sharded, by its last name; stacked layers have one more axis in front.
# What is not listed (norms, biases, the start token) is small.
PARAM_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads", None),
    "key_value": ("embed", None, "heads", None),
    "attention_out": ("heads", None, "embed"),
    "mlp_in": ("embed", "mlp"),
    "mlp_gate": ("embed", "mlp"),
    "mlp_out": ("mlp", "embed"),
}


def padded_vocab(config: ModelConfig) -> int:
    """Rows of embedding and head: the vocabulary rounded up to a multiple of 128."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def mlp_width(config: ModelConfig) -> int:
    """F: the config's, or 4 D for gelu and 8/3 D rounded up to a multiple of 64 for swiglu (equal parameters)."""
    if config.mlp_width:
        return config.mlp_width
    return 4 * config.width if config.mlp == "gelu" else -(-8 * config.width // 3 // 64) * 64


def activation_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations; `auto` asks which backend runs."""
    name = config.dtype if config.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def no_constraint(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The `Constrain` of a single device."""
    del axes
    return array


# --- one layer ------------------------------------------------------------------------------------------------------


def _normal(fan_in: int, gain: float = 1.0) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev=gain * fan_in**-0.5)


def _norm(config: ModelConfig, name: str) -> nn.Module:
    cls = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return cls(epsilon=1e-5, dtype=activation_dtype(config), name=name)


def rotary_table(positions_BR: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, R, 1, K/2] of RoPE (Su et al. 2021) at the given positions."""
    half = config.width // config.num_heads // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BR[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(a_BRHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(a_BRHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(a_BRHK.dtype)


def _is_first(start: jax.Array | int) -> bool:
    """Whether a call's own rows are all that the cache holds after it: long evidence then needs no N x N scores."""
    return isinstance(start, int) and start == 0


class Layer(nn.Module):
    """Pre-norm attention and MLP: the first `num_keys` rows give keys, those from `first_query` on are updated.

    Two-stream layer: rows are X then G, keys from X, all rows updated. Last two-stream layer: only G is updated, so X's
    queries, attention and MLP are never computed. Causal layer: rows are G, all give keys, all are updated.
    """

    config: ModelConfig
    num_keys: int
    first_query: int = 0
    attend: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(
        self,
        rows_BRD: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        len_BQ: jax.Array,
        dropout_key: jax.Array | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
        valid_BX: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Returns the updated rows [B, Q, D] and, where a cache (k, v) was given, the cache with the new keys."""
        config, dtype = self.config, rows_BRD.dtype
        width, heads = config.width, config.num_heads
        head_width, mlp = width // heads, mlp_width(config)
        residual_gain = (2 * config.num_layers) ** -0.5
        keys, queries = slice(0, self.num_keys), slice(self.first_query, None)

        normed_BRD = _norm(config, "attention_norm")(rows_BRD)
        w_q = self._weight("query", _normal(width), (width, heads, head_width), dtype)
        w_kv = self._weight("key_value", _normal(width), (width, 2, heads, head_width), dtype)
        w_o = self._weight("attention_out", _normal(width, residual_gain), (heads, head_width, width), dtype)
        cos, sin = rotary
        q_BQHK = linear(normed_BRD[:, queries], w_q)
        kv_BTcHK = linear(normed_BRD[:, keys], w_kv)
        q_BQHK = _rotate(q_BQHK, cos[:, queries], sin[:, queries])
        k_BTHK, v_BTHK = (a[:, :, 0] for a in jax.lax.split(kv_BTcHK, (1, 1), axis=2))
        k_BTHK = _rotate(k_BTHK, cos[:, keys], sin[:, keys])
        if cache is not None:
            cache = (write(cache[0], k_BTHK, start, valid_BX, "BHKT"), write(cache[1], v_BTHK, start, valid_BX, "BHTK"))
        if cache is None and self.attend is not None:
            mixed_BQHK = self.attend(q_BQHK, k_BTHK, v_BTHK, len_BQ)
        elif cache is None or _is_first(start):
            mixed_BQHK = attention(q_BQHK, k_BTHK, v_BTHK, len_BQ, config.attention, chunk_size(config))
        else:
            mixed_BQHK = cached_attention(q_BQHK, *cache, len_BQ)
        if isinstance(w_o, Panels):
            out_BQD = linear(mixed_BQHK.reshape(*mixed_BQHK.shape[:2], width), w_o)
        else:
            out_BQD = jnp.einsum("BQHK,HKD->BQD", mixed_BQHK, w_o)
        rows_BQD = rows_BRD[:, queries] + dropout(config.dropout, out_BQD, dropout_key, 0)

        normed_BQD = _norm(config, "mlp_norm")(rows_BQD)
        w_in = self._weight("mlp_in", _normal(width), (width, mlp), dtype)
        w_out = self._weight("mlp_out", _normal(mlp, residual_gain), (mlp, width), dtype)
        hidden_BQF = linear(normed_BQD, w_in)
        if config.mlp == "swiglu":
            w_gate = self._weight("mlp_gate", _normal(width), (width, mlp), dtype)
            hidden_BQF = nn.silu(linear(normed_BQD, w_gate)) * hidden_BQF
        else:
            hidden_BQF = nn.gelu(hidden_BQF)
        out_BQD = linear(hidden_BQF, w_out)
        return rows_BQD + dropout(config.dropout, out_BQD, dropout_key, 1), cache

    def _weight(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array | Panels:
        """The parameter in the dtype of the activations, or the panels that decoding has in its place."""
        held = self.get_variable("params", name)
        return held if isinstance(held, Panels) else self.param(name, init, shape).astype(dtype)


def dropout(rate: float, array: jax.Array, key: jax.Array | None, place: int) -> jax.Array:
    """Dropout with the key folded with `place`; none where there is no key. The draw depends on key and shape alone."""
    if key is None or rate == 0.0:
        return array
    keep = jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - rate, array.shape)
    return jnp.where(keep, array / (1.0 - rate), 0).astype(array.dtype)


# --- the whole network ----------------------------------------------------------------------------------------------


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Float32 parameters as a plain nested dict; layers of one kind are stacked along their first axis.

    Keys: embedding [V, D], start [D], aggregator, two_stream (M - 1 layers), last_two_stream, causal (L - M layers),
    final_norm, head [D, V] where untied.
    """
    keys = jax.random.split(key, 6)
    width, vocab, num_two, num_causal = (
        config.width,
        padded_vocab(config),
        config.two_stream_layers,
        config.num_layers - config.two_stream_layers,
    )
    row_D = jnp.zeros((1, 2, width))

    def layers(key: jax.Array, layer: Layer, count: int) -> Params:
        rotary = rotary_table(jnp.zeros((1, 2), jnp.int32), config)
        lens = jnp.ones((1, 2 - layer.first_query), jnp.int32)
        return jax.vmap(lambda k: layer.init(k, row_D, rotary, lens)["params"])(jax.random.split(key, count))

    params: Params = {
        "embedding": nn.initializers.normal(0.02)(keys[0], (vocab, width)),
        "start": nn.initializers.normal(0.02)(keys[1], (width,)),
    }
    if config.aggregator != "shift":
        aggregator = Aggregator(config).init(keys[2], single_row(), row_D[:, :1], None, False)["params"]
        params["aggregator"] = aggregator
    if num_two > 1:
        params["two_stream"] = layers(jax.random.fold_in(keys[3], 0), Layer(config, num_keys=1), num_two - 1)
    if num_two:
        last = layers(jax.random.fold_in(keys[3], 1), Layer(config, num_keys=1, first_query=1), 1)
        params["last_two_stream"] = jax.tree.map(lambda a: a[0], last)
    if num_causal:
        params["causal"] = layers(keys[4], Layer(config, num_keys=2), num_causal)
    params["final_norm"] = _norm(config, "final_norm").init(keys[5], row_D)["params"]
    if not config.tie_embeddings:
        params["head"] = nn.initializers.normal(0.02)(keys[5], (width, vocab))
    return params


def unstack(params: Params) -> Params:
    """The same parameters with a list of per-layer dicts where layers are stacked.

    Decoding takes this form: slicing stacked parameters inside the sampling loop copies them at every step on CPU.
    """
    per_layer = dict(params)
    for name in ("two_stream", "causal"):
        if name in params:
            count = jax.tree.leaves(params[name])[0].shape[0]
            per_layer[name] = [jax.tree.map(lambda a, i=i: a[i], params[name]) for i in range(count)]
    return per_layer


def in_panels(params: Params, both_streams: bool, one_stream: bool) -> Params:
    """`unstack`ed parameters, weights in panels where decoding on CPU multiplies a few float32 rows with them.

    both_streams: the weights that rows of both streams meet, in the first M - 1 layers. one_stream: the others, the
    head among them, in a place of its own also where it is tied to the embedding.
    """

    def panels(path: tuple, leaf: jax.Array) -> jax.Array | Panels:
        name = path[-1].key
        if name not in PARAM_AXES or name == "embedding":
            return leaf
        wanted = both_streams if path[0].key == "two_stream" and name != "key_value" else one_stream
        found = cut(leaf.reshape(-1, leaf.shape[-1]) if name == "attention_out" else leaf) if wanted else leaf
        return found if isinstance(found, Panels) else leaf

    if one_stream and "head" not in params:
        params = params | {"head": params["embedding"].T}
    return jax.tree_util.tree_map_with_path(panels, unstack(params))


def forward(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    cache: Cache | None = None,
    dropout_key: jax.Array | None = None,
    constrain: Constrain = no_constraint,
    attend: Attend | None = None,
) -> tuple[jax.Array, Cache | None]:
    """One network call: the final hidden state of every G row [B, G, D], and the cache with these rows in it.

    params: as `init` gives them, or `unstack`ed. dropout_key: None switches dropout off. attend: None takes the
    config's own attention.
    """
    attend_in = lambda group: attend and functools.partial(attend, group=group)  # noqa: E731
    dtype = activation_dtype(config)
    num_x = rows.x_tokens_BX.shape[1]
    num_two = config.two_stream_layers
    constrain_table = functools.partial(constrain, axes=PARAM_AXES["embedding"])
    embedded = look_up(dtype, constrain_table, params["embedding"], jnp.maximum(rows.x_tokens_BX, 0))
    x_BXD = jnp.where(rows.x_tokens_BX[..., None] == START, params["start"].astype(dtype), embedded)
    x_BXD = constrain(x_BXD, ROW_AXES)
    g_BGD, aggregate = Aggregator(config).apply(
        {"params": params.get("aggregator", {})},
        rows,
        x_BXD,
        None if cache is None else cache.aggregate,
        cache is not None,
    )
    embedding_key = None if dropout_key is None else jax.random.fold_in(dropout_key, config.num_layers)
    g_BGD = constrain(dropout(config.dropout, g_BGD, embedding_key, 1), ROW_AXES)
    g_rotary = rotary_table(rows.g_positions_BG, config)
    x_kv, g_kv = (), ()

    if num_two:
        x_BXD = dropout(config.dropout, x_BXD, embedding_key, 0)
        h_BRD = jnp.concatenate([x_BXD, g_BGD], axis=1)
        rotary = rotary_table(jnp.concatenate([rows.x_positions_BX, rows.g_positions_BG], axis=1), config)
        lens = jnp.concatenate([rows.x_len_BX, rows.g_strict_len_BG], axis=1)
        run = functools.partial(_run, config=config, rotary=rotary, dropout_key=dropout_key, constrain=constrain)
        run = functools.partial(run, start=rows.x_start, valid_BX=rows.x_valid_BX)
        caches = None if cache is None else cache.x_kv
        if num_two > 1:
            h_BRD, x_kv = run(
                Layer(config, num_keys=num_x, attend=attend_in("two_stream")),
                params["two_stream"],
                h_BRD,
                lens,
                first_layer=0,
                caches=caches,
            )
        g_BGD, last_kv = run(
            Layer(config, num_keys=num_x, first_query=num_x, attend=attend_in("last_two_stream")),
            [params["last_two_stream"]],
            h_BRD,
            rows.g_strict_len_BG,
            first_layer=num_two - 1,
            caches=None if caches is None else caches[-1:],
        )
        x_kv = (*x_kv, *last_kv)
    if num_two < config.num_layers:
        g_BGD, g_kv = _run(
            Layer(config, num_keys=g_BGD.shape[1], attend=attend_in("causal")),
            params["causal"],
            g_BGD,
            rows.g_len_BG,
            config=config,
            rotary=g_rotary,
            dropout_key=dropout_key,
            constrain=constrain,
            first_layer=num_two,
            caches=None if cache is None else cache.g_kv,
            start=rows.g_start,
            valid_BX=rows.g_valid_BG,
        )
    h_BGD = _norm(config, "final_norm").apply({"params": params["final_norm"]}, g_BGD)
    return h_BGD, None if cache is None else Cache(x_kv=x_kv, g_kv=g_kv, aggregate=aggregate)


def _run(
    layer: Layer,
    stack: Params | Sequence[Params],
    h_BRD: jax.Array,
    len_BQ: jax.Array,
    *,
    config: ModelConfig,
    rotary: tuple[jax.Array, jax.Array],
    dropout_key: jax.Array | None,
    constrain: Constrain,
    first_layer: int,
    caches: tuple[tuple[jax.Array, jax.Array], ...] | None,
    start: jax.Array | int,
    valid_BX: jax.Array | None,
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
    """Runs layers one after another, as a scan or a loop over the same parameters and with the same dropout draws."""

    def whole(path: tuple, leaf: jax.Array) -> jax.Array:
        """A weight put together along the model width, in the dtype it is used in: half the bytes to gather."""
        axes = None if isinstance(leaf, Panels) else PARAM_AXES.get(path[-1].key)
        return leaf if axes is None else constrain(leaf.astype(h_BRD.dtype), axes)

    def apply(h_BRD, params, number, cache=None):
        params = jax.tree_util.tree_map_with_path(whole, params, is_leaf=lambda leaf: isinstance(leaf, Panels))
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
        h_BQD, cache = layer.apply({"params": params}, h_BRD, rotary, len_BQ, key, cache, start, valid_BX)
        return constrain(h_BQD, ROW_AXES), cache

    if config.remat != "none":
        policies = jax.checkpoint_policies
        dots = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KERNEL_OUTPUT)
        )
        policy = {"dots": dots, "full": None}[config.remat]
        # Outside a scan nothing else keeps the compiler from merging the recomputation with the forward pass.
        in_scan = _scans(config) and caches is None and not isinstance(stack, list)
        apply = jax.checkpoint(apply, policy=policy, prevent_cse=not in_scan)
    if isinstance(stack, list):
        per_layer = stack
    elif _scans(config) and caches is None:
        count = jax.tree.leaves(stack)[0].shape[0]
        numbers = first_layer + jnp.arange(count)
        h_BRD, _ = jax.lax.scan(lambda h, inputs: (apply(h, *inputs)[0], None), h_BRD, (stack, numbers))
        return h_BRD, ()
    else:
        per_layer = _split_layers(stack)
    new_caches = []
    for index, params in enumerate(per_layer):
        h_BRD, cache = apply(h_BRD, params, first_layer + index, None if caches is None else caches[index])
        new_caches.append(cache)
    return h_BRD, tuple(new_caches)


def _scans(config: ModelConfig) -> bool:
    return config.scan_layers == "on" or (config.scan_layers == "auto" and jax.default_backend() != "cpu")


def _split_layers(stack: Params) -> list[Params]:
    """Per-layer parameters of a stack through `lax.split`, whose gradient is one concatenation instead of many adds."""
    leaves, treedef = jax.tree.flatten(stack)
    columns = [jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
    return [treedef.unflatten([part[0] for part in parts]) for parts in zip(*columns, strict=True)]


def head_logits(params: Params, config: ModelConfig, h_BND: jax.Array) -> jax.Array:
    """Float32 logits [B, N, V] over the padded vocabulary; padding rows are -inf, so no softmax gives them any mass."""
    weight_DV = params["head"] if "head" in params else params["embedding"].T
    if not isinstance(weight_DV, Panels):
        weight_DV = weight_DV.astype(h_BND.dtype)
    logits_BNV = linear(h_BND, weight_DV, jnp.float32)
    real = jnp.arange(logits_BNV.shape[-1]) < config.vocab_size
    return jnp.where(real, logits_BNV, -jnp.inf)

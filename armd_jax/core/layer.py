"""One layer of the network, and running a stack of them. Training and cached decoding share this one definition.

Some of a layer's rows give keys and values, some give queries; which ones makes the difference between the layers of
the two-stream network (see `core.network`, where the dimension letters are declared too).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp

from armd_jax.config import ModelConfig
from armd_jax.core import axes
from armd_jax.core.cache import write
from armd_jax.core.context import Context, LayerGroup
from armd_jax.core.kernels.attention import KERNEL_OUTPUT, attention, attention_chunk, cached_attention
from armd_jax.core.kernels.linear import AtUse, as_it_is, linear
from armd_jax.core.kernels.panels import Panels
from armd_jax.core.sizes import activation_dtype, mlp_width
from armd_jax.names import Remat

KeyValue = tuple[jax.Array, jax.Array]  # a layer's cache: keys [B H, K, N] and values [B H, N, K]


@dataclasses.dataclass(frozen=True)
class StackInputs:
    """What every layer of a stack is given beside its rows.

    rotary: cos and sin of RoPE for all rows. len_BQ: int32, how many keys each query sees, counted from the start of
    the context. start: key index of the first row that gives keys. valid_BT: bool, False for padding rows, which enter
    no cache; None: all rows are valid. first_B: int32, key index before which a cache has only padding; None: 0.
    own_BQ: int32, the index of one more key in a cache that each query sees; None: there is none. document_BQ: int32,
    the index of the first key that each query sees, if documents are kept apart in training; None: 0.
    """

    rotary: tuple[jax.Array, jax.Array]
    len_BQ: jax.Array
    start: jax.Array | int = 0
    valid_BT: jax.Array | None = None
    first_B: jax.Array | None = None
    own_BQ: jax.Array | None = None
    document_BQ: jax.Array | None = None


def make_norm(config: ModelConfig, name: str) -> nn.Module:
    """The norm of the config, which computes in the dtype of the activations."""
    dtype = activation_dtype(config)
    match config.norm:
        case "layernorm":
            return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)
        case "rmsnorm":
            return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)
        case _:
            assert_never(config.norm)


def _head_norm(dtype: jnp.dtype, name: str) -> nn.RMSNorm:
    """The RMS norm of queries or keys over the width of a head (Henry et al. 2020), with a learned scale [K]."""
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)


def rotary_table(positions_BR: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, R, 1, K/2] of RoPE (Su et al. 2021) at the given positions."""
    half = config.head_width // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    match config.rope_scaling:
        case "none":
            pass
        case "linear":
            frequency = frequency / config.rope_factor
        case "llama3":
            turns = config.rope_original_length * frequency / (2 * jnp.pi)
            kept = jnp.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
            frequency = (1 - kept) * frequency / config.rope_factor + kept * frequency
        case _:
            assert_never(config.rope_scaling)
    angle = positions_BR[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(a_BRHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(a_BRHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(a_BRHK.dtype)


def _normal(fan_in: int, gain: float = 1.0) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev=gain * fan_in**-0.5)


def _at_use(context: Context, name: str) -> AtUse:
    """How a weight lies on the mesh where it is used, if nothing has told it before (`run_stack`)."""
    return functools.partial(context.constrain, axes=axes.PARAMETERS[name]) if context.float32_sums else as_it_is


class Layer(nn.Module):
    """Pre-norm attention and MLP: the first `num_keys` rows give keys, those from `first_query` on are updated.

    Two-stream layer: the rows are X then G, keys come from X, and all rows are updated. Last two-stream layer: only G
    is updated, so X's queries, attention and MLP are never computed. Causal layer: the rows are G, all of them give
    keys and all are updated. Bidirectional layer (denoiser): there is one stream, whose rows all give keys and are
    updated.
    """

    config: ModelConfig
    group: LayerGroup
    num_keys: int
    first_query: int = 0

    @nn.compact
    def __call__(
        self, rows_BRD: jax.Array, inputs: StackInputs, context: Context, cache: KeyValue | None = None
    ) -> tuple[jax.Array, KeyValue | None]:
        """Returns the updated rows [B, Q, D] and, if a cache was given, the cache with the new keys and values."""
        config = self.config
        normed_BRD = make_norm(config, "attention_norm")(rows_BRD)
        mixed_BQD, cache = self._attention(normed_BRD, inputs, context, cache)
        rows_BQD = rows_BRD[:, self.first_query :] + context.dropout(config.dropout, mixed_BQD, 0)
        hidden_BQD = self._mlp(make_norm(config, "mlp_norm")(rows_BQD), context)
        return rows_BQD + context.dropout(config.dropout, hidden_BQD, 1), cache

    def _attention(
        self, normed_BRD: jax.Array, inputs: StackInputs, context: Context, cache: KeyValue | None
    ) -> tuple[jax.Array, KeyValue | None]:
        config, dtype = self.config, normed_BRD.dtype
        width, heads, head_width = config.width, config.num_heads, config.head_width
        keys, queries = slice(0, self.num_keys), slice(self.first_query, None)
        w_q = self._weight("query", _normal(width), (width, heads, head_width), dtype, context)
        w_kv = self._weight("key_value", _normal(width), (width, 2, config.kv_heads, head_width), dtype, context)
        w_o = self._weight(
            "attention_out", self._residual(heads * head_width), (heads, head_width, width), dtype, context
        )
        cos, sin = inputs.rotary
        q_BQHK = linear(normed_BRD[:, queries], w_q, at_use=_at_use(context, "query"))
        kv_BTcHK = linear(normed_BRD[:, keys], w_kv, at_use=_at_use(context, "key_value"))
        if config.qkv_bias:
            q_BQHK = q_BQHK + self._bias("query_bias", (heads, head_width), dtype)
            kv_BTcHK = kv_BTcHK + self._bias("key_value_bias", (2, config.kv_heads, head_width), dtype)
        k_BTHK, v_BTHK = (a[:, :, 0] for a in jax.lax.split(kv_BTcHK, (1, 1), axis=2))
        if config.qk_norm:
            q_BQHK, k_BTHK = _head_norm(dtype, "query_norm")(q_BQHK), _head_norm(dtype, "key_norm")(k_BTHK)
        if not config.learned_positions:
            q_BQHK = _rotate(q_BQHK, cos[:, queries], sin[:, queries])
            k_BTHK = _rotate(k_BTHK, cos[:, keys], sin[:, keys])
        if cache is not None:
            start, valid = inputs.start, inputs.valid_BT
            cache = (write(cache[0], k_BTHK, start, valid, "BHKT"), write(cache[1], v_BTHK, start, valid, "BHTK"))
            mixed_BQHK = cached_attention(q_BQHK, *cache, inputs.len_BQ, inputs.first_B, inputs.own_BQ)
        else:
            if config.kv_heads < heads:
                k_BTHK, v_BTHK = (jnp.repeat(a, heads // config.kv_heads, axis=2) for a in (k_BTHK, v_BTHK))
            if context.attend is not None:
                assert inputs.document_BQ is None  # kernels know prefixes alone, see `training.placement`
                mixed_BQHK = context.attend(q_BQHK, k_BTHK, v_BTHK, inputs.len_BQ, self.group)
            else:
                how = config.plain_attention, attention_chunk(config)
                mixed_BQHK = attention(q_BQHK, k_BTHK, v_BTHK, inputs.len_BQ, *how, inputs.document_BQ)
        if isinstance(w_o, Panels):
            out_BQD = linear(mixed_BQHK.reshape(*mixed_BQHK.shape[:2], -1), w_o)
        else:
            out_BQD = linear(mixed_BQHK, w_o, at_use=_at_use(context, "attention_out"))
        if config.attention_out_bias:
            out_BQD = out_BQD + self._bias("attention_out_bias", (width,), dtype)
        return out_BQD, cache

    def _mlp(self, normed_BQD: jax.Array, context: Context) -> jax.Array:
        config, dtype = self.config, normed_BQD.dtype
        width, hidden = config.width, mlp_width(config)
        w_in = self._weight("mlp_in", _normal(width), (width, hidden), dtype, context)
        w_out = self._weight("mlp_out", self._residual(hidden), (hidden, width), dtype, context)
        hidden_BQF = linear(normed_BQD, w_in, at_use=_at_use(context, "mlp_in"))
        if config.mlp_bias:
            hidden_BQF = hidden_BQF + self._bias("mlp_in_bias", (hidden,), dtype)
        match config.mlp:
            case "gelu":
                hidden_BQF = nn.gelu(hidden_BQF)
            case "swiglu":
                w_gate = self._weight("mlp_gate", _normal(width), (width, hidden), dtype, context)
                gate_BQF = linear(normed_BQD, w_gate, at_use=_at_use(context, "mlp_gate"))
                if config.mlp_bias:
                    gate_BQF = gate_BQF + self._bias("mlp_gate_bias", (hidden,), dtype)
                hidden_BQF = nn.silu(gate_BQF) * hidden_BQF
            case _:
                assert_never(config.mlp)
        out_BQD = linear(hidden_BQF, w_out, at_use=_at_use(context, "mlp_out"))
        return out_BQD + self._bias("mlp_out_bias", (width,), dtype) if config.mlp_bias else out_BQD

    def _residual(self, fan_in: int) -> nn.initializers.Initializer:
        """The initialisation of a projection into the residual stream, to which 2 L of them add."""
        match self.config.residual_init:
            case "unscaled":
                return _normal(fan_in)
            case "depth_scaled":
                return _normal(fan_in, (2 * self.config.num_layers) ** -0.5)
            case "zero":
                return nn.initializers.zeros_init()
            case _:
                assert_never(self.config.residual_init)

    def _weight(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype: jnp.dtype, context: Context
    ) -> jax.Array | Panels:
        """The parameter in the dtype of the activations, or the panels that decoding has in its place.

        If its gradient is summed in float32, it stays as it is, and the product casts it.
        """
        held: Any = self.get_variable("params", name)
        if isinstance(held, Panels):
            return held
        weight: jax.Array = self.param(name, init, shape)
        return weight if context.float32_sums else weight.astype(dtype)

    def _bias(self, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return self.param(name, nn.initializers.zeros_init(), shape).astype(dtype)


# --- a stack of layers ----------------------------------------------------------------------------------------------

LayerParams = dict[str, Any]
Apply = Callable[..., tuple[jax.Array, KeyValue | None]]


def run_stack(
    layer: Layer,
    stack: LayerParams | list[LayerParams],
    h_BRD: jax.Array,
    inputs: StackInputs,
    context: Context,
    *,
    first_layer: int,
    caches: Sequence[KeyValue] | None,
) -> tuple[jax.Array, tuple[KeyValue, ...]]:
    """Runs layers one after another, as a scan or a loop over the same parameters and with the same dropout draws.

    stack: the parameters of all layers, stacked along a first axis, or a list with those of each layer.
    first_layer: the number of the first of them in the network.
    caches: one per layer in decoding, else None.
    Returns the rows that the last layer updated, and the caches with the new keys and values.
    """
    config = layer.config

    def whole(path: tuple[Any, ...], leaf: jax.Array | Panels) -> jax.Array | Panels:
        """A weight put together along the model width, in the dtype it is used in: half the bytes to gather."""
        if isinstance(leaf, Panels) or (names := axes.PARAMETERS.get(path[-1].key)) is None or context.float32_sums:
            return leaf
        return context.constrain(leaf.astype(h_BRD.dtype), names)

    def apply(
        h_BRD: jax.Array, params: LayerParams, number: jax.Array | int, cache: KeyValue | None = None
    ) -> tuple[jax.Array, KeyValue | None]:
        params = jax.tree_util.tree_map_with_path(whole, params, is_leaf=lambda leaf: isinstance(leaf, Panels))
        out: Any = layer.apply({"params": params}, h_BRD, inputs, context.fold_in(number), cache)
        h_BQD, cache = out
        return context.constrain(h_BQD, axes.ROWS), cache

    scans = _scans(config) and caches is None and not isinstance(stack, list)
    run = _rematerialised(apply, config.remat, in_scan=scans)
    if isinstance(stack, list):
        per_layer = stack
    elif scans:
        count = jax.tree.leaves(stack)[0].shape[0]
        numbers = first_layer + jnp.arange(count)
        h_BRD, _ = jax.lax.scan(lambda h, inputs: (run(h, *inputs)[0], None), h_BRD, (stack, numbers))
        return h_BRD, ()
    else:
        per_layer = _split_layers(stack)
    new_caches = []
    for index, params in enumerate(per_layer):
        h_BRD, cache = run(h_BRD, params, first_layer + index, None if caches is None else caches[index])
        if cache is not None:
            new_caches.append(cache)
    return h_BRD, tuple(new_caches)


def _rematerialised(apply: Apply, remat: Remat, in_scan: bool) -> Apply:
    """`apply` with the config's choice of what its backward pass computes again."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return apply
        case "dots":
            policy = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KERNEL_OUTPUT)
            )
        case "full":
            policy = None
        case _:
            assert_never(remat)
    # Outside a scan nothing else keeps the compiler from merging the recomputation with the forward pass.
    return jax.checkpoint(apply, policy=policy, prevent_cse=not in_scan)


def _scans(config: ModelConfig) -> bool:
    match config.scan_layers:
        case "on":
            return True
        case "off":
            return False
        case "auto":
            return jax.default_backend() != "cpu"
        case _:
            assert_never(config.scan_layers)


def _split_layers(stack: LayerParams) -> list[LayerParams]:
    """Per-layer parameters of a stack through `lax.split`, whose gradient is one concatenation instead of many adds."""
    leaves, treedef = jax.tree.flatten(stack)
    columns = [jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [part[0] for part in parts]) for parts in zip(*columns, strict=True)]

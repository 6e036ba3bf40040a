"""The two-stream network (paper section 4): a pure function of parameters and rows.

Dimension letters, used as suffixes everywhere in the package:
    B batch   N sequence length   D model width   H heads   K head width   F MLP width   V vocabulary (padded)
    L layers  M two-stream layers S streams       P positional-embedding width
    X rows of stream X   G rows of stream G   R rows of both   Q query rows   T keys

Stream X (causal) reads tokens; stream G (strictly causal) starts from prefix aggregation and predicts them. In the M
two-stream layers all weights are shared, and both streams attend to keys and values that come from X. The last of these
layers needs only X's keys and values. L - M causal layers on G alone follow, then the final norm and the output head:

    tokens --embed--> X --[M two-stream layers]--> (keys and values)
              |               | | |
              +-aggregate-->  G --[M two-stream layers]--> G --[L - M causal layers]--> norm --> head

One `Layer` definition serves every case, in training and in cached decoding. `denoise` is the network of a denoiser:
one stream and L of these layers, in which every position sees every other.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import ModelConfig
from armd_jax.core import aggregation, axes
from armd_jax.core.cache import Cache
from armd_jax.core.context import PLAIN, Context
from armd_jax.core.kernels.embedding import look_up
from armd_jax.core.kernels.linear import linear
from armd_jax.core.layer import KeyValue, Layer, StackInputs, make_norm, rotary_table, run_stack
from armd_jax.core.parameters import Params
from armd_jax.core.rows import START, Rows
from armd_jax.core.sizes import activation_dtype, embedding_scale, prediction_offset


def forward(
    params: Params, config: ModelConfig, rows: Rows, cache: Cache | None = None, context: Context = PLAIN
) -> tuple[jax.Array, Cache | None]:
    """One network call: the final hidden state of every G row [B, G, D], and the cache with these rows in it.

    params: as `parameters.init` gives them, or `unstack`ed.
    cache: what earlier calls of decoding left; None in training and scoring.
    context: how the call is carried out.
    """
    h_BGD, cache = residual_stream(params, config, rows, cache, context)
    return normed(params, config, h_BGD), cache


def residual_stream(
    params: Params, config: ModelConfig, rows: Rows, cache: Cache | None = None, context: Context = PLAIN
) -> tuple[jax.Array, Cache | None]:
    """What `forward` returns, before the final norm."""
    num_two = config.two_stream_layers
    embedding_context = context.fold_in(config.num_layers)
    aggregator = aggregation.make(config)
    x_BXD, *near = _embed(params, config, (rows.x_tokens_BX, *aggregator.wanted(rows)), context)
    # Flax types every `apply` as a pair with collections of variables, which these modules do not return.
    state = None if cache is None else cache.aggregate
    g_BGD: Any = aggregator.apply(
        {"params": params.get("aggregator", {})}, rows, x_BXD, tuple(near), state, cache is not None
    )
    g_BGD = context.constrain(g_BGD, axes.FIRST_ROWS)
    aggregate = None if state is None else aggregator.state_after(rows, x_BXD, state)
    # The aggregator adds up vectors of tokens alone. Learned positions come in behind it.
    g_positions_BG = context.constrain(rows.g_positions_BG - prediction_offset(config), axes.PLACES)
    x_BXD, g_BGD = _with_positions(params, x_BXD, rows.x_positions_BX), _with_positions(params, g_BGD, g_positions_BG)
    g_BGD = context.constrain(embedding_context.dropout(config.dropout, g_BGD, 1), axes.ROWS)
    x_kv: tuple[KeyValue, ...] = ()
    g_kv: tuple[KeyValue, ...] = ()
    if num_two:
        x_BXD = embedding_context.dropout(config.dropout, x_BXD, 0)
        g_BGD, x_kv = _two_stream_layers(params, config, rows, x_BXD, g_BGD, context, cache)
    if num_two < config.num_layers:
        g_BGD, g_kv = run_stack(
            Layer(config, "causal", num_keys=g_BGD.shape[1]),
            params["causal"],
            g_BGD,
            StackInputs(
                rotary_table(g_positions_BG, config),
                rows.g_len_BG,
                rows.g_start,
                rows.g_valid_BG,
                rows.first_B,
                rows.g_own_BG,
                rows.document_BN,
            ),
            context,
            first_layer=num_two,
            caches=None if cache is None else cache.g_kv,
        )
    return g_BGD, None if cache is None else Cache(x_kv=x_kv, g_kv=g_kv, aggregate=aggregate)


def normed(params: Params, config: ModelConfig, h_BRD: jax.Array) -> jax.Array:
    """The residual stream [B, R, D] after the final norm."""
    h: Any = make_norm(config, "final_norm").apply({"params": params["final_norm"]}, h_BRD)
    return h


def aggregate_after(params: Params, config: ModelConfig, rows: Rows, state: jax.Array | None) -> jax.Array | None:
    """The aggregator's state after the valid rows of X alone, from its state before the call."""
    if state is None:
        return None
    (x_BXD,) = _embed(params, config, (rows.x_tokens_BX,), PLAIN)
    return aggregation.make(config).state_after(rows, x_BXD, state)


def with_left_neighbour(params: Params, config: ModelConfig, h_BRD: jax.Array, tokens_BR: jax.Array) -> jax.Array:
    """The residual stream [B, R, D] of targets that did not see their left neighbour, as if it had been known.

    What the neighbour alone adds to a target's first vector is carried over to the last. This leaves out what the
    layers would have made of it, and costs no call. tokens_BR: int32, the left neighbours.
    """
    (vectors_BRD,) = _embed(params, config, (tokens_BR,), PLAIN)
    return h_BRD + aggregation.make(config).of_left_neighbour(params.get("aggregator", {}), vectors_BRD)


def denoise(
    params: Params,
    config: ModelConfig,
    tokens_BN: jax.Array,
    masked_BN: jax.Array,
    valid_BN: jax.Array,
    context: Context = PLAIN,
) -> jax.Array:
    """The final hidden state of every position [B, N, D] in a denoiser (`model.kind`), at natural positions.

    The network is that of MDLM (Sahoo et al. 2024) without its time input: ordinary layers in which every position sees
    all valid ones. It predicts the tokens at masked positions, and what it says elsewhere means nothing.

    tokens_BN: int32. masked_BN: bool, True at tokens that the network must not see. valid_BN: bool, False at padding,
        which stands at the end of a row.
    """
    (x_BND,) = _embed(params, config, (jnp.where(masked_BN, START, tokens_BN),), context)
    x_BND = context.fold_in(config.num_layers).dropout(config.dropout, x_BND, 0)
    batch, length = tokens_BN.shape
    # The valid positions are a prefix of the row, so that the mask is one number per row. A query needs at least one.
    len_B1 = jnp.maximum(jnp.sum(valid_BN, axis=1, keepdims=True, dtype=jnp.int32), 1)
    positions_BN = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    x_BND = _with_positions(params, x_BND, positions_BN)
    x_BND, _ = run_stack(
        Layer(config, "bidirectional", num_keys=length),
        params["bidirectional"],
        x_BND,
        StackInputs(rotary_table(positions_BN, config), jnp.broadcast_to(len_B1, (batch, length))),
        context,
        first_layer=0,
        caches=None,
    )
    return normed(params, config, x_BND)


def _embed(params: Params, config: ModelConfig, ids: tuple[jax.Array, ...], context: Context) -> tuple[jax.Array, ...]:
    """The vectors [B, R, D] of ids [B, R], all in one lookup: token embeddings, and the learned vector that START
    stands for."""
    dtype = activation_dtype(config)

    def constrain_table(table_VD: jax.Array) -> jax.Array:
        return context.constrain(table_VD, axes.PARAMETERS["embedding"])

    ids_BR = jnp.concatenate(ids, axis=1)
    embedded = look_up(dtype, constrain_table, params["embedding"], jnp.maximum(ids_BR, 0))
    if (scale := embedding_scale(config)) != 1.0:
        embedded = embedded * jnp.asarray(scale, dtype)
    rows_BRD = jnp.where(ids_BR[..., None] == START, params["start"].astype(dtype), embedded)
    ends = np.cumsum([part.shape[1] for part in ids])[:-1]
    return tuple(context.constrain(part_BRD, axes.ROWS) for part_BRD in jnp.split(rows_BRD, ends, axis=1))


def _with_positions(params: Params, h_BRD: jax.Array, positions_BR: jax.Array) -> jax.Array:
    """Rows with the vectors of their positions, if the model has learned ones."""
    if "positions" not in params:
        return h_BRD
    return h_BRD + params["positions"].astype(h_BRD.dtype)[jnp.maximum(positions_BR, 0)]


def _two_stream_layers(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    x_BXD: jax.Array,
    g_BGD: jax.Array,
    context: Context,
    cache: Cache | None,
) -> tuple[jax.Array, tuple[KeyValue, ...]]:
    """The M two-stream layers: the rows of G after them, and the caches of X's keys and values."""
    num_x, num_two = x_BXD.shape[1], config.two_stream_layers
    caches = None if cache is None else cache.x_kv
    h_BRD = jnp.concatenate([x_BXD, g_BGD], axis=1)
    g_positions_BG = context.constrain(rows.g_positions_BG - prediction_offset(config), axes.PLACES)
    rotary = rotary_table(jnp.concatenate([rows.x_positions_BX, g_positions_BG], axis=1), config)
    lens_BR = jnp.concatenate([rows.x_len_BX, rows.g_strict_len_BG], axis=1)
    document_BN = rows.document_BN
    document_BR = None if document_BN is None else jnp.concatenate([document_BN, document_BN], axis=1)
    first_kv: tuple[KeyValue, ...] = ()
    if num_two > 1:
        h_BRD, first_kv = run_stack(
            Layer(config, "two_stream", num_keys=num_x),
            params["two_stream"],
            h_BRD,
            StackInputs(rotary, lens_BR, rows.x_start, rows.x_valid_BX, rows.first_B, document_BQ=document_BR),
            context,
            first_layer=0,
            caches=caches and caches[:-1],
        )
    g_BGD, last_kv = run_stack(
        Layer(config, "last_two_stream", num_keys=num_x, first_query=num_x),
        [params["last_two_stream"]],
        h_BRD,
        StackInputs(rotary, rows.g_strict_len_BG, rows.x_start, rows.x_valid_BX, rows.first_B, document_BQ=document_BN),
        context,
        first_layer=num_two - 1,
        caches=caches and caches[-1:],
    )
    return g_BGD, (*first_kv, *last_kv)


def head_logits(params: Params, config: ModelConfig, h_BND: jax.Array) -> jax.Array:
    """Float32 logits [B, N, V] over the padded vocabulary. Padding rows are -inf, so no softmax gives them any mass."""
    weight_DV = params["head"] if "head" in params else params["embedding"].T
    logits_BNV = linear(h_BND, weight_DV, jnp.float32)
    if config.logit_cap:
        logits_BNV = config.logit_cap * jnp.tanh(logits_BNV / config.logit_cap)
    real = jnp.arange(logits_BNV.shape[-1]) < config.vocab_size
    return jnp.where(real, logits_BNV, -jnp.inf)

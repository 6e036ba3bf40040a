"""The two-stream network of an ARMD in plain PyTorch: what `modeling_armd` puts a head on.

Stream X reads tokens, stream G predicts them. Which tokens a row sees follows from blocks: the start token is block 0,
the tokens of block k are predicted together from all earlier blocks, and a row of X sees its own block too.
Dimension letters: B batch, T keys, X and G rows of the streams, R rows of both, D width, H heads, K head width.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .configuration_armd import ArmdConfig

START, UNSEEN = -1, -2  # the start token, and a neighbour that no earlier block holds, among token ids
NEVER = 2**30  # the block of padding, which nothing sees


@dataclasses.dataclass
class Rows:
    """The rows of one network call, int64 each. Positions are 0 for the start token and j + 1 for natural position j.

    x_tokens, x_positions, x_blocks [B, X]; g_positions, g_blocks [B, G]; g_left, g_right [B, G]: the tokens beside the
    targets, START before the first position and UNSEEN if no earlier block holds them.
    fixed: how many rows of each stream, its first ones, are the same in every call and are not kept in the cache.
    """

    x_tokens: torch.Tensor
    x_positions: torch.Tensor
    x_blocks: torch.Tensor
    g_positions: torch.Tensor
    g_blocks: torch.Tensor
    g_left: torch.Tensor
    g_right: torch.Tensor
    fixed: int = 0


class RMSNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, a):
        wide = a.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * self.weight.float()).to(a.dtype)


def _norm(config):
    match config.norm:
        case "rmsnorm":
            return RMSNorm(config.hidden_size, config.norm_epsilon)
        case "layernorm":
            return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
    raise ValueError(f"norm={config.norm!r}")


def _sinusoidal(positions, width):
    half = width // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angle = positions[..., None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1) * half**-0.5


def _rotary(positions, config):
    """cos and sin [B, 1, R, K/2], computed in every call: buffers would not survive the loading on a meta device."""
    rope, half = config.rope_parameters, config.head_dim // 2
    exponent = -torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequency = rope["rope_theta"] ** exponent
    match rope.get("rope_type", "default"):
        case "default":
            pass
        case "linear":
            frequency = frequency / rope["factor"]
        case "llama3":
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = (1 - kept) * frequency / rope["factor"] + kept * frequency
        case other:
            raise ValueError(f"rope_type={other!r}")
    angle = positions[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def _rotate(a, cos, sin):
    first, second = a.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(a.dtype)


def _with_past(update, fixed, layer, new, also_new):
    """What is new, with what the cache holds between its fixed rows and the others, along the last axis but one."""
    if update is None:
        return new, also_new
    held = update(new[..., fixed:, :].contiguous(), also_new[..., fixed:, :].contiguous(), layer)
    return tuple(torch.cat([a[..., :fixed, :], old], dim=-2) for a, old in zip((new, also_new), held, strict=True))


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(config.head_dim, 1e-6), RMSNorm(config.head_dim, 1e-6)

    def forward(self, h, keys, queries, rotary, seen, fixed, update):
        """h [B, R, D]; keys, queries: slices of its rows; seen: bool [B, 1, Q, T]."""
        config, (cos, sin) = self.config, rotary

        def heads(a):
            return a.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

        q, k, v = heads(self.q_proj(h[:, queries])), heads(self.k_proj(h[:, keys])), heads(self.v_proj(h[:, keys]))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if not config.learned_positions:
            q = _rotate(q, cos[:, :, queries], sin[:, :, queries])
            k = _rotate(k, cos[:, :, keys], sin[:, :, keys])
        k, v = _with_past(update, fixed, self.layer, k, v)
        groups = config.num_attention_heads // config.num_key_value_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        match config.mlp:
            case "swiglu":
                self.gate_proj = nn.Linear(width, inner, bias=bias)
            case "gelu":
                self.gate_proj = None
            case other:
                raise ValueError(f"mlp={other!r}")
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, h):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(h), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, h, keys, queries, *inputs):
        """The rows of `queries`, updated."""
        out = h[:, queries] + self.self_attn(self.input_layernorm(h), keys, queries, *inputs)
        return out + self.mlp(self.post_attention_layernorm(out))


class PrefixSum(nn.Module):
    """The positional sum over all earlier tokens, or their mean, normalised, plus a map of the target's code."""

    def __init__(self, config, positional=True):
        super().__init__()
        self.positional, self.code = positional, config.positional_width
        self.norm = RMSNorm(config.hidden_size, 1e-6)
        self.position = nn.Linear(config.positional_width, config.hidden_size)

    def forward(self, context, rows, x_positions, x_blocks):
        weight = (x_blocks[:, None] < rows.g_blocks[..., None]).float()
        code = _sinusoidal(rows.g_positions, self.code)
        if self.positional:
            weight = weight * (code @ _sinusoidal(x_positions, self.code).transpose(1, 2))
        else:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        total = self.norm(weight @ context.float())
        position = F.linear(code, self.position.weight.float(), self.position.bias.float())
        return (total + position).to(context.dtype)


class Shift(nn.Module):
    """The mean of the block before."""

    def forward(self, context, rows, x_positions, x_blocks):
        weight = (x_blocks[:, None] == rows.g_blocks[..., None] - 1).float()
        return ((weight @ context.float()) / weight.sum(-1, keepdim=True).clamp(min=1)).to(context.dtype)


class Neighbours(nn.Module):
    """The tokens beside the target, through learned maps, with a code of its position and the positional sum."""

    def __init__(self, config):
        super().__init__()
        width, self.code = config.hidden_size, config.positional_width
        if config.positional_gain:
            self.sum = PrefixSum(config)
        else:
            self.position = nn.Linear(config.positional_width, width)
        match config.neighbours:
            case "left":
                self.sides = ("left",)
            case "both":
                self.sides = ("left", "right")
            case other:
                raise ValueError(f"neighbours={other!r}")
        for side in self.sides:
            setattr(self, side, nn.Linear(width, width, bias=False))
            setattr(self, f"unseen_{side}", nn.Parameter(torch.zeros(width)))

    def forward(self, context, rows, x_positions, x_blocks, embed):
        if hasattr(self, "sum"):
            first = self.sum(context, rows, x_positions, x_blocks)
        else:
            code, position = _sinusoidal(rows.g_positions, self.code), self.position
            first = F.linear(code, position.weight.float(), position.bias.float()).to(context.dtype)
        for side in self.sides:
            ids = getattr(rows, f"g_{side}")
            vectors = torch.where((ids == UNSEEN)[..., None], getattr(self, f"unseen_{side}"), embed(ids))
            first = first + getattr(self, side)(vectors)
        return first


def _aggregator(config):
    match config.aggregator:
        case "positional" | "mean":
            return PrefixSum(config, positional=config.aggregator.startswith("p"))
        case "shift":
            return Shift()
        case "neighbours":
            return Neighbours(config)
    raise ValueError(f"aggregator={config.aggregator!r}")


class ArmdPreTrainedModel(PreTrainedModel):
    config_class = ArmdConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True
    _can_compile_fullgraph = False

    def _init_weights(self, module):
        scale = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=scale)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
        if isinstance(module, ArmdModel):
            nn.init.normal_(module.start, std=scale)
        if isinstance(module, Neighbours):
            for side in module.sides:
                nn.init.normal_(getattr(module, f"unseen_{side}"), std=scale)


class ArmdModel(ArmdPreTrainedModel):
    """The network without its head. `forward` takes `Rows`, not tokens: it is `ArmdForCausalLM` that makes them."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.start = nn.Parameter(torch.zeros(config.hidden_size))
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.learned_positions, config.hidden_size)
        self.aggregator = _aggregator(config)
        self.layers = nn.ModuleList([Layer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = _norm(config)
        self.post_init()

    def _embed(self, ids):
        vectors = self.embed_tokens(ids.clamp(min=0))
        if self.config.embedding_scale.startswith("sqrt"):
            vectors = vectors * torch.tensor(self.config.hidden_size**0.5, dtype=vectors.dtype)
        return torch.where((ids == START)[..., None], self.start, vectors)

    def _with_positions(self, h, positions):
        if not self.config.learned_positions:
            return h
        return h + self.embed_positions(positions.clamp(0, self.config.learned_positions - 1))

    def forward(self, rows, cache=None):
        """The final hidden state [B, G, D] of the rows of G."""
        config, fixed = self.config, rows.fixed
        num_x, num_two = rows.x_tokens.shape[1], config.two_stream_layers
        x = self._embed(rows.x_tokens)
        info = torch.stack([rows.x_tokens, rows.x_positions, rows.x_blocks], dim=-1)[:, None]
        g_info = rows.g_blocks[:, None, :, None]
        update = None if cache is None else cache.update
        if cache is not None:
            # Behind the layers of the network, one more holds tokens, positions and blocks.
            while 0 < len(cache.layers) <= config.num_hidden_layers:
                cache.layers.append(DynamicLayer())
            info, g_info = _with_past(update, fixed, config.num_hidden_layers, info, g_info)
        tokens, x_positions, x_blocks = info[:, 0].unbind(-1)
        g_blocks = g_info[:, 0, :, 0]
        context = x if cache is None else self._embed(tokens)
        extra = (self._embed,) if isinstance(self.aggregator, Neighbours) else ()
        g = self.aggregator(context, rows, x_positions, x_blocks, *extra)
        match config.prediction_position:
            case "own":
                stand = rows.g_positions
            case "previous":
                stand = rows.g_positions - 1
            case other:
                raise ValueError(f"prediction_position={other!r}")
        x, g = self._with_positions(x, rows.x_positions), self._with_positions(g, stand)
        h = torch.cat([x, g], dim=1)
        rotary = _rotary(torch.cat([rows.x_positions, stand], dim=1), config)
        x_sees = x_blocks[:, None, None] <= rows.x_blocks[:, None, :, None]
        g_sees = x_blocks[:, None, None] < rows.g_blocks[:, None, :, None]
        both, keys = torch.cat([x_sees, g_sees], dim=2), slice(0, num_x)
        for number, layer in enumerate(self.layers[:num_two]):
            last = number == num_two - 1
            queries, seen = (slice(num_x, None), g_sees) if last else (slice(0, None), both)
            h = layer(h, keys, queries, rotary, seen, fixed, update)
        h = h if num_two else g
        rotary = tuple(a[:, :, num_x:] for a in rotary)
        seen, every = g_blocks[:, None, None] <= rows.g_blocks[:, None, :, None], slice(0, None)
        for layer in self.layers[num_two:]:
            h = layer(h, every, every, rotary, seen, fixed, update)
        return self.norm(h)

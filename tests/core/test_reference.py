"""The network against slow implementations written from the mathematics alone, sharing no code with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.core import block_mask, network, objective, order, parameters
from armd_jax.core.rows import rows_for_training
from armd_jax.names import AggregatorKind

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.partial(jax.jit, static_argnames="config")
def _natural_logits(params, config, tokens, drawn):
    rows = rows_for_training(tokens, drawn, block_mask.build(drawn))
    h_BND, _ = network.forward(params, config, rows)
    logits = network.head_logits(params, config, h_BND)[..., : config.vocab_size]
    return objective.to_natural(drawn, logits)


# --- a plain causal transformer -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("num_heads", "vocab"))
def _plain_transformer(params, tokens, num_heads: int, vocab: int):
    """Pre-norm decoder: start token at position 0, RoPE, causal softmax, GELU, tied head; row j predicts token j."""
    batch, length = tokens.shape
    start = jnp.broadcast_to(params["start"], (batch, 1, params["start"].shape[0]))
    width = start.shape[-1]
    x = jnp.concatenate([start, params["embedding"][tokens[:, :-1]] * width**0.5], axis=1)
    size = width // num_heads
    angles = np.outer(np.arange(length), 10_000.0 ** (-np.arange(0, size, 2) / size))
    turn = jnp.asarray(np.exp(1j * angles), jnp.complex64)[None, :, None]

    def rope(a):
        rotated = (a[..., : size // 2] + 1j * a[..., size // 2 :]) * turn
        return jnp.concatenate([rotated.real, rotated.imag], axis=-1)

    def norm(p, a):
        return (a - a.mean(-1, keepdims=True)) / jnp.sqrt(a.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    heads = lambda a: a.reshape(batch, length, num_heads, size)  # noqa: E731
    for layer in range(params["causal"]["query"].shape[0]):
        p = jax.tree.map(lambda a, layer=layer: a[layer], params["causal"])
        a = norm(p["attention_norm"], x)
        q = rope(heads(a @ p["query"].reshape(width, width)))
        k = rope(heads(a @ p["key_value"][:, 0].reshape(width, width)))
        v = heads(a @ p["key_value"][:, 1].reshape(width, width))
        scores = jnp.where(np.tri(length, dtype=bool), jnp.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5, -np.inf)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, length, width)
        x = x + mixed @ p["attention_out"].reshape(width, width)
        hidden = norm(p["mlp_norm"], x) @ p["mlp_in"]
        x = x + jax.nn.gelu(hidden, approximate=True) @ p["mlp_out"]
    return norm(params["final_norm"], x) @ params["embedding"][:vocab].T


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_autoregressive_config_is_a_plain_transformer(toy, attention):
    """M = 0, `shift` and the identity order equal an ordinary causal transformer within 1e-5."""
    config = toy.config(
        vocab_size=11,
        num_layers=3,
        two_stream_layers=0,
        aggregator="shift",
        width=16,
        num_heads=4,
        attention=attention,
        attention_chunk=4,
    )
    params = toy.params(config, scale=1.0, noise=0.1)
    tokens = jax.random.randint(jax.random.key(0), (3, 10), 0, 11)
    ours = _natural_logits(params, config, tokens, order.left_to_right(3, 10))
    plain = np.asarray(_plain_transformer(params, tokens, num_heads=4, vocab=11))
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(ours, plain, atol=1e-5)


# --- the two-stream network, one target at a time -------------------------------------------------------------------


def _norm(kind: str, p, a: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    if kind == "rmsnorm":
        return a / np.sqrt((a**2).mean() + eps) * p["scale"]
    return (a - a.mean()) / np.sqrt(((a - a.mean()) ** 2).mean() + eps) * p["scale"] + p["bias"]


def _code(position: int, width: int) -> np.ndarray:
    angles = position * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)]) / np.sqrt(width // 2)


def _rope(a_HK: np.ndarray, position: int, base: float) -> np.ndarray:
    half = a_HK.shape[-1] // 2
    angles = position * base ** (-np.arange(half) / half)
    first, second = a_HK[:, :half], a_HK[:, half:]
    turned = [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    return np.concatenate(turned, axis=1)


def _attend(config, p, query_row, query_position: int, keys: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Update of one row from normed key rows with their positions."""

    def heads(name: str, row: np.ndarray, weight: np.ndarray, position: int) -> np.ndarray:
        vectors = np.einsum("d,dhk->hk", row, weight)
        if config.qk_norm:
            vectors = np.stack([_norm("rmsnorm", p[f"{name}_norm"], vector, 1e-6) for vector in vectors])
        return _rope(vectors, position, config.rope_base)

    q = heads("query", query_row, p["query"], query_position)
    k = np.stack([heads("key", row, p["key_value"][:, 0], position) for row, position in keys])
    v = np.stack([np.einsum("d,dhk->hk", r, p["key_value"][:, 1]) for r, _ in keys])
    scores = np.einsum("hk,thk->ht", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ht,thk,hkd->d", weights, v, p["attention_out"])


def _mlp(config, p, row: np.ndarray) -> np.ndarray:
    a = _norm(config.norm, p["mlp_norm"], row)
    hidden = a @ p["mlp_in"]
    if config.mlp == "swiglu":
        gate = a @ p["mlp_gate"]
        return (gate / (1 + np.exp(-gate)) * hidden) @ p["mlp_out"]
    tanh = np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))
    return (0.5 * hidden * (1 + tanh)) @ p["mlp_out"]


def _layer(config, p, queries: dict, keys: dict, sees) -> dict:
    """New rows of `queries` ({index: (row, position)}) attending to `keys` where sees(query, key)."""
    normed = {i: (_norm(config.norm, p["attention_norm"], row), position) for i, (row, position) in keys.items()}
    updated = {}
    for n, (row, position) in queries.items():
        visible = [normed[i] for i in keys if sees(n, i)]
        row = row + _attend(config, p, _norm(config.norm, p["attention_norm"], row), position, visible)
        updated[n] = (row + _mlp(config, p, row), position)
    return updated


def _first_vector(config, params, n: int, block: dict, x: dict) -> np.ndarray:
    earlier = [i for i in x if block[i] < block[n]]
    if config.aggregator == "shift":
        return np.mean([x[i][0] for i in earlier if block[i] == block[n] - 1], axis=0)
    own = _code(n, config.positional_width)
    if config.aggregator in ("positional", "neighbours"):
        total = sum(own @ _code(i, config.positional_width) * x[i][0] for i in earlier)
    else:
        total = np.mean([x[i][0] for i in earlier], axis=0)
    p = params["aggregator"].get("sum", params["aggregator"])
    code = own @ p["position"]["kernel"] + p["position"]["bias"]
    if config.aggregator == "neighbours" and not config.positional_gain:
        vector = code
    else:
        vector = _norm("rmsnorm", p["norm"], total, 1e-6) + code
    if config.aggregator == "neighbours":
        p = params["aggregator"]
        vector = vector + (x[n - 1][0] if n - 1 in earlier else p["unseen_left"]) @ p["left"]
        if config.neighbours == "both":
            vector = vector + (x[n + 1][0] if n + 1 in earlier else p["unseen_right"]) @ p["right"]
    return vector


def _slow_network(params, config, tokens, blocks) -> np.ndarray:
    """Logits [N, V] at natural positions, for one sequence. Context 0 is the start token, j + 1 natural position j."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters.unstack(params))
    block = {0: 0} | {j + 1: b for b, members in enumerate(blocks, start=1) for j in members}
    scale = {"sqrt_width": np.sqrt(config.width), "one": 1.0}[config.embedding_scale]
    x = {0: (params["start"], 0)} | {j + 1: (params["embedding"][t] * scale, j + 1) for j, t in enumerate(tokens)}
    targets = range(1, len(tokens) + 1)
    g = {n: (_first_vector(config, params, n, block, x), n) for n in targets}
    two_stream = [*params.get("two_stream", []), *([params["last_two_stream"]] if config.two_stream_layers else [])]
    for p in two_stream:
        new_x = _layer(config, p, x, x, lambda n, i: block[i] <= block[n])
        g = _layer(config, p, g, x, lambda n, i: block[i] < block[n])
        x = new_x
    for p in params.get("causal", []):
        g = _layer(config, p, g, g, lambda n, i: block[i] <= block[n])
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    final = np.stack([_norm(config.norm, params["final_norm"], g[n][0]) for n in targets])
    return final @ head[:, : config.vocab_size]


@pytest.mark.slow
@pytest.mark.parametrize("two_stream_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
def test_network_equals_the_slow_network(toy, aggregator, two_stream_layers):
    """Random blocks, every aggregator, M in {0, 1, 2, L}: equal to sums over explicit sets of visible tokens."""
    odd = (typed.choices(AggregatorKind).index(aggregator) + two_stream_layers) % 2
    config = toy.config(
        vocab_size=5,
        num_layers=3,
        two_stream_layers=two_stream_layers,
        aggregator=aggregator,
        norm=("layernorm", "rmsnorm")[odd],
        mlp=("gelu", "swiglu")[odd],
        tie_embeddings=not odd,
        rope_base=100.0,
        attention_chunk=4,
        neighbours=("left", "both")[odd],
        positional_gain=0.3 * (two_stream_layers < 2),
        qk_norm=bool(odd),
        embedding_scale=("sqrt_width", "one")[odd],
    )
    params = toy.params(config, seed=two_stream_layers, scale=1.0, noise=0.2)
    rng = np.random.default_rng([two_stream_layers, odd])
    partitions = [toy.blocks(rng, 7) for _ in range(3)] + [[[4, 2, 6], [0, 1], [3, 5]]]
    tokens = rng.integers(0, 5, (len(partitions), 7)).astype(np.int32)
    drawn = toy.stack(*(order.from_blocks(blocks) for blocks in partitions))
    ours = _natural_logits(params, config, jnp.asarray(tokens), drawn)
    slow = np.stack([_slow_network(params, config, *pair) for pair in zip(tokens, partitions, strict=True)])
    assert slow.std() > 0.1
    np.testing.assert_allclose(ours, slow, rtol=1e-4, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", typed.choices(AggregatorKind))
def test_one_token_blocks_equal_the_slow_network(toy, aggregator):
    """The same for permutations, where every mask is the lower triangle and `shift` is the previous token."""
    config = toy.config(vocab_size=5, num_layers=3, two_stream_layers=2, aggregator=aggregator)
    params = toy.params(config, scale=1.0, noise=0.2)
    permutation = [3, 0, 5, 1, 4, 2]
    tokens = np.asarray([4, 1, 0, 2, 2, 3], np.int32)
    blocks = [[p] for p in permutation]
    ours = _natural_logits(params, config, jnp.asarray(tokens)[None], order.from_blocks(blocks))[0]
    np.testing.assert_allclose(ours, _slow_network(params, config, tokens, blocks), rtol=1e-4, atol=3e-5)

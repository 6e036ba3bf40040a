"""Likelihoods of held-out text: exact left to right, expected over random orders, under strided orders, and an ELBO.

Every token of the split counts once, end-of-text and the last, partly filled row included; rows are independent.
Bits per byte = total nats / ln 2 / UTF-8 bytes of the original text, and only a lossless tokenizer has them.
"""

import dataclasses
import functools
import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from armd_jax.config import OrderConfig
from armd_jax.core import objective
from armd_jax.core import order as orders
from armd_jax.core.order import Order
from armd_jax.data import loader
from armd_jax.data.manifest import Counts
from armd_jax.data.packing import PreparedData
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel

_XZ_LIMIT = 64 * 2**20  # bytes; beyond this xz -9e takes minutes and its dictionary no longer holds the training text


@functools.partial(jax.jit, static_argnames=("config", "make_order"))
def _nll(params, config, tokens_BN, valid_BN, key, make_order):
    order = orders.padding_last(make_order(key, *tokens_BN.shape), valid_BN)
    return objective.loss_sums(params, config, tokens_BN, order).nll


def total_nats(
    lm: LanguageModel,
    data: PreparedData,
    split: str,
    make_order: Callable[[jax.Array, int, int], Order],
    batch_size: int = 16,
    seed: int = 0,
    progress: str | None = None,
) -> float:
    """Nats of all tokens of the split under `make_order(key, batch, length)`, in float64. `progress`: a label."""
    key = jax.random.key(seed)
    steps = -(-data.num_rows(split) // batch_size)
    total = 0.0
    batches = loader.eval_batches(data, split, batch_size)
    for number, (tokens, valid) in enumerate(tqdm(batches, progress, steps, disable=progress is None, leave=False)):
        batch_key = jax.random.fold_in(key, number)
        total += float(
            _nll(lm.params, lm.config, jnp.asarray(tokens), jnp.asarray(valid), batch_key, make_order=make_order)
        )
    return total


def figures(nats: float, counts: Counts, lossless: bool) -> dict[str, float | None]:
    """Per-token, per-word and per-byte figures of a total; bits per byte is None where the tokenizer is lossy."""
    return {
        "nats_per_token": nats / counts.tokens,
        "perplexity_per_token": _exp(nats / counts.tokens),
        "perplexity_per_word": _exp(nats / max(counts.words, 1)),
        "bits_per_byte": nats / math.log(2) / counts.bytes if lossless else None,
    }


def _exp(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)  # NaN stays NaN


def _left_to_right(key: jax.Array, batch: int, length: int) -> Order:
    del key
    return orders.left_to_right(batch, length)


def _strided(streams: int, key: jax.Array, batch: int, length: int) -> Order:
    del key
    return orders.strided(batch, length, streams)


@functools.cache
def _strided_order(streams: int) -> Callable[[jax.Array, int, int], Order]:
    return functools.partial(_strided, streams)


@functools.cache
def _elbo_order(order: OrderConfig) -> Callable[[jax.Array, int, int], Order]:
    return lambda key, batch, length: orders.masked_diffusion(
        key, batch, length, order.diffusion_steps, order.noise_schedule
    )


def unigram_nats(data: PreparedData, split: str) -> float:
    """Nats of the split under the training split's token frequencies (add-one smoothing)."""
    size = data.tokenizer.vocab_size
    train, held_out = (np.zeros(size) for _ in range(2))
    for name, counts in (("train", train), (split, held_out)):
        for tokens, valid in loader.eval_batches(data, name, 256):
            counts += np.bincount(tokens[valid], minlength=size)
    return float(-(held_out * np.log((train + 1) / (train.sum() + size))).sum())


def xz_bits_per_byte(data: PreparedData, split: str) -> float | None:
    """Bits a byte that `xz -9e` needs for the split's text after the training text; None where that cannot be known.

    Of the training text after itself nothing would be left to compress: None too.
    """
    counts = [data.counts(name) for name in ("train", split)]
    if split == "train" or not data.tokenizer.lossless or sum(c.bytes for c in counts) > _XZ_LIMIT:
        return None
    texts = []
    for name in ("train", split):
        ids = np.concatenate([tokens[valid] for tokens, valid in loader.eval_batches(data, name, 256)])
        texts.append(data.tokenizer.decode(ids.tolist()).encode())
    size = [len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in (texts[0], texts[0] + texts[1])]
    return 8 * (size[1] - size[0]) / len(texts[1])


def evaluate(
    lm: LanguageModel,
    data: PreparedData,
    split: str,
    streams: Sequence[int] = (2, 4, 8),
    draws: int = 1,
    elbo: OrderConfig | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """All figures of a split, as written to `eval.json`.

    draws: random orders a row. elbo: the masked-diffusion order to bound the likelihood with, None for none.
    Raises UserError where the model's vocabulary is not the data's, or its rows are longer than the model's.
    """
    check_data(lm, data)
    counts, lossless = data.counts(split), data.tokenizer.lossless

    def under(make_order: Callable, label: str, repeat: int = 1) -> dict[str, float | None]:
        name = label if progress else None
        nats = [total_nats(lm, data, split, make_order, batch_size, seed + i, name) for i in range(repeat)]
        return figures(float(np.mean(nats)), counts, lossless)

    result: dict[str, Any] = {"split": split, "lossless": lossless, **dataclasses.asdict(counts)}
    result["left_to_right"] = under(_left_to_right, "left to right")
    if draws:
        result["random_orders"] = under(orders.uniform, "random orders", draws) | {"draws": draws}
    fitting = [s for s in streams if s > 1 and data.length % s == 0]
    result["strided"] = {str(s): under(_strided_order(s), f"strided S={s}") for s in fitting}
    if elbo is not None:
        result["elbo"] = under(_elbo_order(elbo), "ELBO", max(draws, 1)) | {"diffusion_steps": elbo.diffusion_steps}
    result["unigram"] = figures(unigram_nats(data, split), counts, lossless)
    result["xz_bits_per_byte"] = xz_bits_per_byte(data, split)
    return result


def check_data(lm: LanguageModel, data: PreparedData) -> None:
    """Raises UserError where the model was made for another vocabulary or for shorter rows than the data's."""
    if data.length > lm.config.max_length:
        raise UserError(
            f"{data.folder}: rows of {data.length} tokens are longer than the model's"
            f" max_length={lm.config.max_length}; prepare the text at that length"
        )
    theirs = data.tokenizer
    if lm.config.vocab_size != theirs.vocab_size or (lm.tokenizer is not None and lm.tokenizer.hash != theirs.hash):
        raise UserError(
            f"the checkpoint was made for another vocabulary ({lm.config.vocab_size} tokens) than the data in"
            f" {data.folder} ({theirs.vocab_size} tokens): prepare the text with the checkpoint's tokenizer folder"
        )


def table(result: dict[str, Any]) -> str:
    """The figures as text lines for a terminal."""
    rows = [("left to right (exact)", result["left_to_right"])]
    if "random_orders" in result:
        rows.append(("random orders (expected)", result["random_orders"]))
    rows += [(f"strided, S = {s}", value) for s, value in result["strided"].items()]
    if "elbo" in result:
        rows.append((f"ELBO, T = {result['elbo']['diffusion_steps']}", result["elbo"]))
    rows.append(("unigram of the training split", result["unigram"]))
    lines = [f"{result['split']}: {result['bytes']:,} bytes, {result['tokens']:,} tokens, {result['words']:,} words"]
    lines.append(f"{'':<30} {'bits/byte':>11} {'ppl/token':>12} {'ppl/word':>14}")
    for name, value in rows:
        bits = value["bits_per_byte"]
        shown = f"{bits:.4f}" if bits is not None else "n/a (lossy)"
        lines.append(
            f"{name:<30} {shown:>11} {value['perplexity_per_token']:>12.3f} {value['perplexity_per_word']:>14.3f}"
        )
    if result["xz_bits_per_byte"] is not None:
        lines.append(f"{'xz -9e after the training text':<30} {result['xz_bits_per_byte']:>11.4f}")
    return "\n".join(lines)

"""Samples with their speed: what `armd sample` prints and `samples.json` holds."""

import platform
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from armd_jax.errors import UserError
from armd_jax.inference.draw import Draw
from armd_jax.inference.language_model import LanguageModel


def draw(
    lm: LanguageModel,
    streams: Sequence[int],
    *,
    batch: int,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt: str = "",
    suffix: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Samples for every number of streams; each is drawn twice and the second time taken, so compiling is left out.

    prompt, suffix: text at the beginning and at the end; the tokens between are generated.
    Raises UserError where they do not fit into `length`, and where `lm.generate` does.
    """
    if lm.tokenizer is None:
        raise UserError("this model has no tokenizer: use lm.generate")
    lm.check_shape(batch, length, seed)
    Draw.make(temperature, top_k, top_p)
    tokenizer = lm.tokenizer
    before, after = tokenizer.encode(prompt), tokenizer.encode(suffix)
    if len(before) + len(after) > length:
        raise UserError(
            f"--prompt and --suffix: their {len(before)} + {len(after)} tokens are longer than length={length}"
        )
    evidence = np.full((length,), -1, np.int32)
    evidence[: len(before)] = before
    evidence[length - len(after) :] = after
    samples = []
    for count in streams:
        options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, evidence_BN=evidence)
        lm.generate(batch, length, count, **options, seed=seed)
        begin = time.perf_counter()
        out = lm.generate(batch, length, count, **options, seed=seed)
        seconds = time.perf_counter() - begin
        generated = batch * (length - len(before) - len(after))
        for tokens, calls in zip(out.tokens_BN.tolist(), out.call_BN.tolist(), strict=True):
            samples.append(
                {
                    "streams": count,
                    "num_calls": out.num_calls,
                    "tokens_per_second": generated / seconds,
                    "text": tokenizer.decode(tokens),
                    "tokens": tokens,
                    "pieces": [tokenizer.token_text(token) for token in tokens],
                    "calls": calls,
                }
            )
    device = jax.devices()[0]
    return {
        "length": length,
        "batch": batch,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "hardware": f"{jax.device_count()} x {device.device_kind} ({platform.machine()})",
        "samples": samples,
    }


def table(result: dict[str, Any]) -> str:
    """The samples as text for a terminal."""
    parts = []
    for sample in result["samples"]:
        head = (
            f"S = {sample['streams']}: {sample['num_calls']} network calls, {sample['tokens_per_second']:,.0f} tokens/s"
        )
        parts.append(f"--- {head}\n{sample['text']}")
    return "\n".join(parts)

"""Samples of a model in one or several parallel streams, and how fast they were drawn."""

import functools
import platform
import time
from collections.abc import Sequence

import jax
import numpy as np

from armd_jax.errors import UserError
from armd_jax.evaluation.results import Sample, Samples
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
) -> Samples:
    """Draws `batch` texts of `length` tokens in each of the numbers of streams.

    Each batch is drawn twice and the second time counts, so that the speed does not include compilation.

    temperature, top_k, top_p: see `LanguageModel.generate`.
    prompt, suffix: text at the beginning and at the end; the tokens between them are generated.
    Raises UserError if prompt and suffix are longer than `length`, or if `lm.generate` cannot take the settings.
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
        generate = functools.partial(
            lm.generate, batch, length, count, temperature, top_k, top_p, evidence_BN=evidence, seed=seed
        )
        generate()  # compiles
        begin = time.perf_counter()
        out = generate()
        seconds = time.perf_counter() - begin
        generated = batch * (length - len(before) - len(after))
        for tokens, calls in zip(out.tokens_BN.tolist(), out.call_BN.tolist(), strict=True):
            samples.append(
                Sample(
                    streams=count,
                    num_calls=out.num_calls,
                    tokens_per_second=generated / seconds,
                    text=tokenizer.decode(tokens),
                    tokens=tuple(tokens),
                    pieces=tuple(tokenizer.token_text(token) for token in tokens),
                    calls=tuple(calls),
                )
            )
    return Samples(
        length=length,
        batch=batch,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        hardware=f"{jax.device_count()} x {jax.devices()[0].device_kind} ({platform.machine()})",
        samples=tuple(samples),
    )


def as_text(drawn: Samples) -> str:
    """The samples as text for a terminal."""
    parts = []
    for sample in drawn.samples:
        speed = f"{sample.num_calls:,} network calls (NFE), {sample.tokens_per_second:,.0f} tokens per second"
        parts.append(f"--- S = {sample.streams}: {speed}\n{sample.text}")
    return "\n".join(parts)

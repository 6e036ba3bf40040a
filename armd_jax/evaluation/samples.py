"""Samples of a model in one or several parallel streams, or of a denoiser, and how fast they were drawn."""

import dataclasses
import functools
import platform
import time
from collections.abc import Sequence
from typing import Any, Literal, assert_never

import jax
import numpy as np

from armd_jax.errors import UserError
from armd_jax.evaluation.results import Sample, Samples
from armd_jax.inference import denoise
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import DecodingMode, DenoisingSampler


def draw(
    lm: LanguageModel,
    streams: Sequence[int | Literal["auto"]],
    *,
    batch: int,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt: str = "",
    suffix: str = "",
    seed: int = 0,
    sampler: DenoisingSampler | None = None,
    steps: Sequence[int] = (),
    max_new_tokens: int | None = None,
    mode: DecodingMode = "strided",
    **how: Any,
) -> Samples:
    """Draws `batch` texts of `length` tokens in each of the numbers of streams, or of steps if the model is a denoiser.

    Each batch is drawn twice and the second time counts, so that the speed does not include compilation.

    streams, mode: of an ARMD. sampler, steps: of a denoiser, whose streams are empty; see `inference.denoise`.
    temperature, top_k, top_p, how: see `language_model.How`.
    max_new_tokens: instead of `length`, how many tokens stand between prompt and suffix.
    prompt, suffix: text at the beginning and at the end; the tokens between them are generated.
    Raises UserError if prompt and suffix are longer than `length`, or if `lm.generate` cannot take the settings.
    """
    if lm.tokenizer is None:
        raise UserError("this model has no tokenizer: use lm.generate")
    tokenizer = lm.tokenizer
    before, after = tokenizer.encode(prompt), tokenizer.encode(suffix)
    if max_new_tokens is not None:
        if max_new_tokens < 0:
            raise UserError(f"--max-new-tokens={max_new_tokens}: must be at least 0")
        length = len(before) + max_new_tokens + len(after)
    if not 1 <= length <= lm.config.max_length:
        raise UserError(f"length={length}: must be in 1 .. {lm.config.max_length}, the model's max_length")
    if len(before) + len(after) > length:
        raise UserError(
            f"--prompt and --suffix: their {len(before)} + {len(after)} tokens are longer than length={length}"
        )
    evidence = np.full((length,), -1, np.int32)
    evidence[: len(before)] = before
    evidence[length - len(after) :] = after
    free = length - len(before) - len(after)
    if too_many := [count for count in streams if mode == "strided" and isinstance(count, int) and count > free > 0]:
        raise UserError(f"streams={too_many[0]} exceeds the {free} positions left to generate: use fewer streams")
    samples = []
    for count, way in _ways(lm, streams, mode, sampler, steps, free):
        generate = functools.partial(
            lm.generate,
            batch,
            length,
            streams=count,
            mode=mode,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            evidence_BN=evidence,
            seed=seed,
            sampler=way.sampler,
            steps=way.steps,
            **how,
        )
        generate()  # compiles
        begin = time.perf_counter()
        out = generate()
        seconds = time.perf_counter() - begin
        drawn, texts = int((out.call_BN > 0).sum()), lm.texts(out)
        for row, end in enumerate(out.end_B.tolist()):
            tokens, calls = out.tokens_BN[row, :end].tolist(), out.call_BN[row, :end].tolist()
            samples.append(
                dataclasses.replace(
                    way,
                    streams=None if way.streams is None else out.streams,
                    num_calls=out.num_calls,
                    tokens_per_second=drawn / seconds,
                    text=texts[row],
                    tokens=tuple(tokens),
                    pieces=tuple(tokenizer.token_text(token) for token in tokens),
                    calls=tuple(calls),
                    cut=int((out.call_BN[row, end:] > 0).sum()),
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


def _ways(
    lm: LanguageModel,
    streams: Sequence[int | Literal["auto"]],
    mode: DecodingMode,
    sampler: DenoisingSampler | None,
    steps: Sequence[int],
    free: int,
) -> list[tuple[int | Literal["auto"], Sample]]:
    """Ways in which the model is asked to write `free` tokens: the number of streams, and a sample without a text."""
    match lm.config.kind, sampler or "first_hitting":
        case "armd", _:
            if sampler is not None or steps:
                raise UserError("--sampler and --steps belong to a denoiser (model.kind); choose --streams instead")
            kept = None if mode == "strided" else mode
            return [(count, Sample(streams=0 if count == "auto" else count, mode=kept)) for count in streams]
        case "denoiser", _ if streams or mode != "strided":
            raise UserError("--streams, --mode: a denoiser has no streams; choose --sampler and --steps instead")
        case "denoiser", "first_hitting" if not steps:
            return [(1, Sample(sampler="first_hitting"))]
        case "denoiser", chosen:
            return [
                (1, Sample(sampler=chosen, steps=denoise.number_of_steps(chosen, free, number)))
                for number in (steps or (None,))
            ]
        case _:
            assert_never(lm.config.kind)


def as_text(drawn: Samples) -> str:
    """The samples as text for a terminal."""
    parts = []
    for sample in drawn.samples:
        speed = f"{sample.num_calls:,} network calls (NFE), {sample.tokens_per_second:,.0f} tokens per second"
        parts.append(f"--- {sample.label}: {speed}\n{sample.text}")
    return "\n".join(parts)

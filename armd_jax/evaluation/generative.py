"""Generation metrics (`armd eval --judge`): how good and how varied the texts are that a model writes, and how fast.

Every text has the same number of tokens, in the model's tokenizer: end-of-text is drawn and counted like any other
token and ends nothing, so that texts of all modes and real text can be compared. In the rows of the training it is so
too, unless the model was trained with `data.reset=document`.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import assert_never

import jax
import numpy as np
from tqdm import tqdm

from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError
from armd_jax.evaluation import generative_judge, generative_results, generative_tokens
from armd_jax.evaluation.completions import fingerprint
from armd_jax.evaluation.generative_judge import Judge, Scores
from armd_jax.evaluation.generative_reference import Real
from armd_jax.evaluation.generative_results import Entry, Setting
from armd_jax.inference import denoise
from armd_jax.inference.draw import Draw
from armd_jax.inference.generation import Generation
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import DecodingMode, DenoisingSampler

_EXAMPLE = 600  # characters of the text that is kept with an entry


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of writing, as in `generative_results.Setting`."""

    mode: DecodingMode | None = None
    streams: int | None = None
    sampler: DenoisingSampler | None = None
    steps: int | None = None


def ways_of_armd(modes: Sequence[DecodingMode], streams: Sequence[int], length: int) -> list[Way]:
    """Every mode with every number of streams. Raises UserError if a text has no room for so many streams."""
    for mode in modes:
        match mode:
            case "strided" if max(streams) > length:
                raise UserError(f"--streams={max(streams)}: exceeds the {length} tokens of a text: use fewer streams")
            case "strided" | "lossless" | "confident":
                pass
            case _:
                assert_never(mode)
    return [Way(mode=mode, streams=count) for mode in modes for count in streams]


def ways_of_denoiser(samplers: Sequence[DenoisingSampler], steps: Sequence[int], length: int) -> list[Way]:
    """Every sampler of a denoiser with every number of steps, of which first-hitting sampling has no choice.

    Raises UserError if steps are given and none of the samplers takes a number of them.
    """
    found: list[Way] = []
    for sampler in samplers:
        match sampler:
            case "first_hitting":
                found.append(Way(sampler=sampler))
            case "ancestral" | "confidence":
                numbers = steps or (None,)
                found += [Way(sampler=sampler, steps=denoise.number_of_steps(sampler, length, n)) for n in numbers]
            case _:
                assert_never(sampler)
    if steps and all(way.steps is None for way in found):
        raise UserError(
            f"--steps={','.join(map(str, steps))}: --samplers={','.join(samplers)} takes one step per token; leave"
            " --steps out, or name ancestral or confidence too"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Written:
    """Texts that a model wrote.

    rows: token ids. own_nats_T: nats per token of each under the order it was written in; None for a denoiser.
    calls_T: the last network call that made a token of each text.
    """

    rows: list[list[int]]
    own_nats_T: np.ndarray | None
    calls_T: np.ndarray
    num_calls: int
    tokens_per_second: float


def write_texts(lm: LanguageModel, setting: Setting, advance: Callable[[int], object]) -> Written:
    """Draws the texts of a setting, in batches. Only the first batch is drawn twice: its second drawing is timed.

    advance: told after every batch how many texts there are more.
    """
    rows: list[list[int]] = []
    own: list[np.ndarray] = []
    calls: list[np.ndarray] = []
    num_calls, rate = 0, 0.0
    for start in range(0, setting.samples, setting.batch):
        count = min(setting.batch, setting.samples - start)
        draw = functools.partial(_draw, lm, setting, start, count)
        if not start:
            draw()  # compiles
        began = time.perf_counter()
        made = draw()
        if not start:
            rate = made.tokens_BN.size / (time.perf_counter() - began)
            num_calls = made.num_calls
        rows += made.tokens_BN.tolist()
        calls.append(made.call_BN.max(axis=1))
        if made.log_prob_BN is not None:
            own.append(-made.log_prob_BN.mean(axis=1, dtype=np.float64))
        advance(count)
    return Written(rows, np.concatenate(own) if own else None, np.concatenate(calls), num_calls, rate)


def _draw(lm: LanguageModel, setting: Setting, start: int, count: int) -> Generation:
    drawn = functools.partial(
        lm.generate,
        count,
        setting.length,
        temperature=1.0 if setting.temperature is None else setting.temperature,
        top_p=setting.top_p,
        stop_at_end=False,
    )
    if setting.sampler is not None:
        return drawn(sampler=setting.sampler, steps=setting.steps, seed=setting.seed + start)
    seeds = range(setting.seed + start, setting.seed + start + count)
    return drawn(mode=setting.mode or "strided", streams=setting.streams or 1, seed=list(seeds))


def evaluate(
    lm: LanguageModel,
    judge: Judge,
    ways: Sequence[Way],
    temperatures: Sequence[float],
    *,
    samples: int,
    length: int,
    batch: int,
    seed: int,
    top_p: float | None = None,
    real: Real | None = None,
    known: Sequence[Entry] = (),
    keep: Callable[[Entry], object] = lambda entry: None,
    progress: bool = True,
) -> list[Entry]:
    """The figures of every way of writing at every temperature, and of real text.

    batch: texts that are drawn together, and scored together. seed: see `Setting`.
    known: entries of earlier calls; those with the same settings are returned and not measured again.
    keep: called with every entry as soon as it is finished, so that it can be written.
    Raises UserError if the model cannot write in such a way, or if the settings are impossible.
    """
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise UserError("this model has no tokenizer, and judges read texts")
    if not 1 <= length <= lm.config.max_length:
        raise UserError(f"--length={length}: must be in 1 .. {lm.config.max_length}, the model's max_length")
    if seed + samples > 2**31:
        raise UserError(f"--seed={seed}: with --samples={samples} it must be at most {2**31 - samples}")
    for temperature in temperatures:
        Draw.make(temperature, None, top_p)  # raises before the work begins
    _, judged_by = generative_judge.ids_for(judge, tokenizer, [])
    shared = Setting(
        samples=samples, length=length, batch=min(batch, samples), seed=seed, top_p=top_p,
        weights=fingerprint(lm), judge=judged_by,
    )  # fmt: skip
    settings = [
        dataclasses.replace(shared, temperature=temperature, **dataclasses.asdict(way))
        for way, temperature in itertools.product(ways, temperatures)
    ]
    compares = real is not None and _mauve_is_installed()
    real_text = (real.name, real.digest) if compares and real else ("", "")
    found_before = {
        entry.setting: entry
        for entry in known
        if entry.text or not compares or (entry.mauve_text, entry.mauve_digest) == real_text
    }
    measured: list[Entry] = []

    def finish(entry: Entry, fresh: bool = True) -> None:
        measured.append(entry)
        if fresh:
            keep(entry)

    missing = [setting for setting in settings if setting not in found_before]
    real_scores: Scores | None = None
    if real is not None:
        setting = dataclasses.replace(shared, text=real.name, text_digest=real.digest)
        if setting in found_before and not (compares and missing):
            finish(found_before[setting], fresh=False)
        else:
            entry, real_scores = _judged(setting, judge, tokenizer, real.rows, compares)
            finish(entry)
    total = len(missing) * samples
    with tqdm(desc="texts", total=total, unit="text", disable=not (progress and total), leave=False) as bar:
        for setting in settings:
            if setting in found_before:
                finish(found_before[setting], fresh=False)
                continue
            bar.set_postfix_str(f"{setting.label}, temperature {setting.temperature:g}")
            written = write_texts(lm, setting, bar.update)
            entry, scores = _judged(setting, judge, tokenizer, written.rows, compares)
            own = written.own_nats_T
            finish(
                dataclasses.replace(
                    entry,
                    own_nats_per_token=None if own is None else float(own.mean()),
                    mauve=mauve_score(scores, real_scores),
                    mauve_text=real_text[0],
                    mauve_digest=real_text[1],
                    tokens_per_second=written.tokens_per_second,
                    num_calls=written.num_calls,
                    calls_per_token=float(written.calls_T.mean()) / length,
                    hardware=f"{jax.device_count()} x {jax.devices()[0].device_kind} ({platform.machine()})",
                )
            )
    return measured


def _judged(
    setting: Setting, judge: Judge, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], features: bool
) -> tuple[Entry, Scores]:
    """The figures of texts that do not depend on who wrote them, and their scores."""
    ids, _ = generative_judge.ids_for(judge, tokenizer, rows)
    scores = judge.score(ids, features)
    perplexity, error = generative_results.perplexity_of_corpus(scores.nats_T, scores.tokens_T)
    entry = Entry(
        **{field.name: getattr(setting, field.name) for field in dataclasses.fields(setting)},
        **dataclasses.asdict(generative_tokens.variety(rows)),
        texts=len(rows),
        judge_tokens=int(scores.tokens_T.sum()),
        windowed=int((scores.windows_T > 1).sum()),
        generative_perplexity=perplexity,
        standard_error=None if np.isnan(error) else error,
        example=tokenizer.decode(rows[0])[:_EXAMPLE],
    )
    return entry, scores


def _mauve_is_installed() -> bool:
    try:
        import mauve  # noqa: F401
    except ImportError:
        return False
    return True


def mauve_score(scores: Scores, real: Scores | None) -> float | None:
    """MAUVE between texts and real text, if the library is installed (extra `mauve`)."""
    if real is None or scores.features_TD is None or real.features_TD is None:
        return None
    import mauve

    features = scores.features_TD.astype(np.float32), real.features_TD.astype(np.float32)
    with _quiet():
        return float(mauve.compute_mauve(p_features=features[0], q_features=features[1], verbose=False).mauve)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what is written to stderr: the clustering of MAUVE, in C++, warns there of few texts, each time."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

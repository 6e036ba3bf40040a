"""What a request asks for: the fields of `/v1/completions`, and those of the page, checked."""

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Any, TypeVar

from armd_jax import typed
from armd_jax.config import ModelConfig
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.errors import UserError, shown
from armd_jax.evaluation.completions import with_gaps
from armd_jax.inference.schedule import FREE
from armd_jax.names import DecodingMode
from armd_jax.serving.batching import Asked

MAX_STREAMS = 32  # each number of streams is a program of its own
_MAX_STOPS = 4
_WHERE = "request"
T = TypeVar("T", bound="Drawing")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    body: bytes. choices: texts, that is n times the number of prompts. max_tokens: drawn tokens of each text, and of a
    prompt, both at most the model's max_length together.
    """

    body: int = 1 << 20
    choices: int = 32
    max_tokens: int = 1 << 30


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The fields that say how to draw, of both kinds of requests. The last three are extensions of OpenAI's API.

    seed: of the first choice; the next ones have the numbers after it. None: drawn at random.
    """

    temperature: float = typed.field(1.0, at_least=0)
    top_p: float = typed.field(1.0, above=0, fraction="closed")
    seed: int | None = None
    mode: DecodingMode = "strided"
    streams: int = typed.field(1, at_least=1)
    ignore_eos: bool = False

    def asked(self, known: Sequence[int], number: int = 0) -> Asked:
        """A text with these places, as choice `number` of a request. `seed` has to be a number."""
        assert self.seed is not None
        seed = (self.seed + number) % 2**31
        how = self.temperature, self.top_p, self.mode, self.streams, not self.ignore_eos
        return Asked(tuple(known), seed, *how)


@dataclasses.dataclass(frozen=True)
class _StreamOptions:
    include_usage: bool = False
    include_obfuscation: bool = False  # taken, and without effect


@dataclasses.dataclass(frozen=True)
class _CompletionFields(Drawing):
    """The fields of a completion, with OpenAI's defaults.

    `prompt` and `stop` have more forms than a field can declare. They are here for messages about unknown fields.
    """

    model: str = ""
    prompt: str = ""
    suffix: str = ""
    max_tokens: int = typed.field(16, at_least=0)
    n: int = typed.field(1, at_least=1)
    stop: str = ""
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    logprobs: int | None = None
    echo: bool = False
    user: str = ""  # taken, and without effect


@dataclasses.dataclass(frozen=True)
class Prompt:
    """text: as it was given, or as its ids decode."""

    ids: list[int]
    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request for completions. texts: n for each prompt, in this order."""

    prompts: tuple[Prompt, ...]
    texts: tuple[Asked, ...]
    n: int
    max_tokens: int
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool


@dataclasses.dataclass(frozen=True)
class PageFields(Drawing):
    """A request of the page. text: with gaps such as [[8 tokens]]. max_tokens: drawn behind the text."""

    text: str = ""
    max_tokens: int = typed.field(0, at_least=0)


def body(content: bytes) -> dict[str, Any]:
    """The object of a request's body. Raises UserError if it is none."""
    try:
        values = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise UserError(f"the body is {shown(values)}, and not a JSON object")
    return {name: value for name, value in values.items() if value is not None}  # null: the default


def completion(values: dict[str, Any], config: ModelConfig, tokenizer: Tokenizer, limits: Limits) -> Completion:
    """The request of a body. Raises UserError, which names the field, if it is none that can be answered."""
    values = dict(values)
    given, stop = values.pop("prompt", ""), values.pop("stop", [])
    for name, without in (("presence_penalty", (0,)), ("frequency_penalty", (0,)), ("logit_bias", ({},))):
        if values.pop(name, without[0]) not in without:
            raise UserError(f"{_WHERE}.{name} is not supported")
    best_of = values.pop("best_of", None)
    fields = _built(_CompletionFields, values)
    if best_of not in (None, fields.n):
        raise UserError(f"{_WHERE}.best_of is not supported, unless it is n")
    if fields.logprobs is not None and not 0 <= fields.logprobs <= 5:
        raise UserError(f"{_WHERE}.logprobs={fields.logprobs}: must be in 0 .. 5")
    if fields.max_tokens > limits.max_tokens:
        raise UserError(f"{_WHERE}.max_tokens={fields.max_tokens}: this server writes at most {limits.max_tokens}")
    prompts = _prompts(given, limits.choices, config.vocab_size, tokenizer)
    if len(prompts) * fields.n > limits.choices:
        raise UserError(
            f"{_WHERE}.n={fields.n} of {len(prompts)} prompts: this server writes at most {limits.choices} texts for a"
            " request"
        )
    suffix = tokenizer.encode(fields.suffix)
    texts: list[Asked] = []
    for prompt in prompts:
        length = len(prompt.ids) + fields.max_tokens + len(suffix)
        _check_length(length, "prompt", "prompt, suffix and max_tokens", config)
        for _ in range(fields.n):
            known = [*prompt.ids, *[FREE] * fields.max_tokens, *suffix]
            texts.append(fields.asked(known, len(texts)))
    return Completion(
        prompts=prompts,
        texts=tuple(texts),
        n=fields.n,
        max_tokens=fields.max_tokens,
        stop=_stops(stop),
        logprobs=fields.logprobs,
        echo=fields.echo,
        stream=fields.stream,
        include_usage=fields.stream_options.include_usage,
    )


def page(values: dict[str, Any], config: ModelConfig, tokenizer: Tokenizer, limits: Limits) -> Asked:
    """The text that the page asks for. Raises UserError if it cannot be written."""
    fields = _built(PageFields, values)
    parts = [*with_gaps(fields.text, tokenizer), fields.max_tokens]
    # Summed up before a list is made: a gap may claim to be larger than memory.
    length = sum(part if isinstance(part, int) else len(part) for part in parts)
    free = sum(part for part in parts if isinstance(part, int))
    _check_length(length, "text", "text, gaps and max_tokens", config)
    if not 1 <= free <= limits.max_tokens:
        raise UserError(f"{_WHERE}.max_tokens: {free} tokens to write; must be in 1 .. {limits.max_tokens}")
    return fields.asked([token for part in parts for token in ([FREE] * part if isinstance(part, int) else part)])


def model_name(values: dict[str, Any]) -> str:
    """The model that a request names; empty if it names none."""
    return values["model"] if isinstance(values.get("model"), str) else ""


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _built(cls: type[T], values: dict[str, Any]) -> T:
    fields = typed.build(cls, values, _WHERE, largest=2**63, any_text=True)
    typed.check(fields, _WHERE)
    if fields.streams > MAX_STREAMS:
        raise UserError(f"{_WHERE}.streams={fields.streams}: must be in 1 .. {MAX_STREAMS}")
    if fields.seed is None:
        return dataclasses.replace(fields, seed=secrets.randbelow(2**31))
    if not 0 <= fields.seed < 2**31:
        raise UserError(f"{_WHERE}.seed={fields.seed}: must be in [0, 2**31)")
    return fields


def _check_length(length: int, field: str, what: str, config: ModelConfig) -> None:
    if length > config.max_length:
        raise UserError(
            f"{_WHERE}.{field}: {what} are {shown(length)} tokens, more than {config.max_length}, the model's"
            " max_length"
        )
    if length < 1:
        raise UserError(f"{_WHERE}.{field}: there is nothing to read and nothing to write")


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"{_WHERE}.stop={shown(given)}: expected a text, or a list of at most {_MAX_STOPS} texts")
    if not all(stops):
        raise UserError(f"{_WHERE}.stop: an empty text would end every text")
    for stop in stops:
        typed.check_text(stop, f"{_WHERE}.stop")
    return tuple(stops)


def _prompts(given: Any, most: int, vocab_size: int, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The prompts: a text, a list of texts, token ids, or a list of lists of those."""
    several = isinstance(given, list) and given and not _is_ids(given)
    prompts = given if several else [given]
    if not prompts or len(prompts) > most:
        raise UserError(f"{_WHERE}.prompt: {len(prompts)} prompts; this server takes 1 .. {most}")
    if all(isinstance(prompt, str) for prompt in prompts):
        for prompt in prompts:
            typed.check_text(prompt, f"{_WHERE}.prompt")
        return tuple(map(Prompt, tokenizer.encode_batch(prompts), prompts))
    if not all(_is_ids(prompt) for prompt in prompts):
        raise UserError(
            f"{_WHERE}.prompt: expected a text, a list of texts, token ids, or a list of lists of token ids"
        )
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < vocab_size:
            raise UserError(f"{_WHERE}.prompt: id {shown(token)} is outside the vocabulary of {vocab_size}")
    return tuple(Prompt(prompt, tokenizer.decode(prompt)) for prompt in prompts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)

"""What a body may ask for: every field is checked, and the message names it."""

import json
import re

import pytest

from armd_jax import typed
from armd_jax.config import ModelConfig
from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.errors import UserError
from armd_jax.inference.schedule import FREE
from armd_jax.names import DecodingMode
from armd_jax.serving import api
from armd_jax.serving.api import Completion, Limits
from armd_jax.serving.batching import Asked

CONFIG = ModelConfig(vocab_size=257, max_length=64)
TOKENIZER = BytesTokenizer()
LIMITS = Limits(choices=4, max_tokens=32)


def _completion(**fields: object) -> Completion:
    return api.completion(api.body(json.dumps(fields).encode()), CONFIG, TOKENIZER, LIMITS)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        ("", [[]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([97, 256], [[97, 256]]),
        ([[97], []], [[97], []]),
        ([], [[]]),
    ],
)
def test_every_form_of_a_prompt(prompt, ids):
    """A text, texts, ids, or lists of ids; each choice has a seed of its own."""
    asked = _completion(prompt=prompt, n=2, max_tokens=3, seed=2**31 - 1)
    assert [each.ids for each in asked.prompts] == ids
    assert [list(text.known) for text in asked.texts] == [[*each, *[FREE] * 3] for each in ids for _ in range(2)]
    assert [text.seed for text in asked.texts] == [2**31 - 1, 0, 1, 2][: 2 * len(ids)]


def test_defaults_are_those_of_openai():
    """16 tokens at temperature 1 from a random seed; null means the default."""
    asked = _completion(prompt="a", temperature=None, stop=None, logprobs=None, seed=None, best_of=None, suffix=None)
    (text,) = asked.texts
    assert (text.temperature, text.top_p, text.streams, text.stop_at_end) == (1.0, 1.0, 1, True)
    assert (len(text.known), asked.stop, asked.logprobs, asked.echo, asked.stream) == (17, (), None, False, False)
    assert len({_completion(prompt="a").texts[0].seed for _ in range(4)}) > 1


def test_a_suffix_is_known():
    """It stands behind the tokens to draw."""
    assert _completion(prompt="a", suffix="b", max_tokens=2).texts[0].known == (97, FREE, FREE, 98)


WRONG = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "a" * 60}, "prompt"),
    ({"prompt": "", "max_tokens": 0}, "prompt"),
    ({"prompt": ["a"] * 5}, "prompt"),
    ({"n": 5}, "n"),
    ({"prompt": ["a", "b"], "n": 3}, "n"),
    ({"n": 0}, "n"),
    ({"n": 10**12}, "n"),
    ({"n": "1"}, "n"),
    ({"max_tokens": 33}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**18}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**31}, "seed"),
    ({"mode": "fast"}, "mode"),
    ({"streams": 0}, "streams"),
    ({"streams": 33}, "streams"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", "\ud800"]}, "stop"),
    ({"suffix": "\udfff"}, "suffix"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"stream_options": {"usage": True}}, "stream_options"),
    ({"presence_penalty": 1}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"temprature": 1}, "temprature"),
]


@pytest.mark.parametrize(("fields", "named"), WRONG, ids=[json.dumps(fields)[:40] for fields, _ in WRONG])
def test_what_cannot_be_answered_names_its_field(fields, named):
    """One line, which is short however long the value is."""
    with pytest.raises(UserError, match=rf"request\.{named}\b") as raised:
        _completion(**{"prompt": "a"} | fields)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("field", ["prompt", "suffix", "stop", "user"])
def test_half_a_surrogate_pair_is_called_what_it_is(field):
    """A NUL is a character, and may be in a text."""
    with pytest.raises(UserError, match="holds half a surrogate pair, which is no character"):
        _completion(**{"prompt": "a", field: "b\ud800"})
    _completion(**{"prompt": "a", field: "b\0"})


def test_an_unknown_field_is_compared_with_every_field():
    """Also with those that have several forms."""
    for wrong, right in (("promt", "prompt"), ("stops", "stop"), ("temprature", "temperature")):
        with pytest.raises(UserError, match=f"did you mean 'request.{right}'"):
            _completion(**{wrong: "a"})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"a"', b"\xff", b'{"n": NaN}', b"[" * 100_000, b"1" * 10_000])
def test_what_is_no_object_is_refused(content):
    """Also if it would exhaust the parser."""
    with pytest.raises(UserError, match="the body is"):
        api.body(content)


def _page(**fields: object) -> Asked:
    return api.page(dict(fields), CONFIG, TOKENIZER, LIMITS)


def test_the_page_asks_for_gaps_and_a_continuation():
    """Gaps as in a file of prompts, and behind the text as many tokens as are asked for."""
    asked = _page(text="a[[2]]b[[1 token]]", max_tokens=1, streams=2, seed=7)
    assert asked.known == (97, FREE, FREE, 98, FREE, FREE) and (asked.streams, asked.seed) == (2, 7)


@pytest.mark.parametrize("mode", typed.choices(DecodingMode))
def test_every_mode_can_be_asked_for(mode):
    """Both by the page and by a completion."""
    assert _page(text="a", max_tokens=1, mode=mode).mode == _completion(prompt="a", mode=mode).texts[0].mode == mode


@pytest.mark.parametrize("text", ["", "a", f"[[{'9' * 900}]]", "[[33]]", "[[20]]" + "a" * 60])
def test_what_the_page_cannot_write_is_refused(text):
    """Nothing to write, too much of it, or no room; a gap larger than memory costs nothing."""
    with pytest.raises(UserError, match=r"request\.(max_tokens|text)") as raised:
        _page(text=text)
    assert not re.search("9{400}", str(raised.value))

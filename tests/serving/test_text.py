"""Texts that grow token by token: whole characters, nothing lost, and nothing of a stop string."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.serving.text import Decoder, Written

TOKENIZER = BytesTokenizer()
# Bytes of all kinds: letters, beginnings and insides of characters, and such as occur in none.
BYTES = st.lists(st.sampled_from([*b"ab ", *"éß€𝄞\ufffd".encode(), 0xC0, 0xFF, 0x80]), max_size=12)


@given(BYTES, BYTES)
@example(list("€".encode()[:1]), list("€".encode()[1:]))
@example([], list("a€".encode()[:3]))
def test_pieces_are_the_text(before, ids):
    """Joined, the pieces are what the whole decodes to behind what was there before."""
    decoder = Decoder(TOKENIZER, before)
    pieces = [*map(decoder.push, ids), decoder.flush()]
    whole, known = TOKENIZER.decode([*before, *ids]), TOKENIZER.decode(before)
    if whole.startswith(known):
        assert known + "".join(pieces) == whole
    else:  # what came before ends inside a character, which belongs to the pieces
        assert known.rstrip("\ufffd") + "".join(pieces) == whole


@given(st.text(max_size=8))
def test_pieces_are_whole_characters(text):
    """No byte of a character is given before all of them are there."""
    decoder, ids = Decoder(TOKENIZER), TOKENIZER.encode(text)
    given_so_far = ""
    for token in ids:
        given_so_far += decoder.push(token)
        assert text.startswith(given_so_far)
    assert given_so_far + decoder.flush() == text


def _write(text: str, *stop: str) -> tuple[Written, list[str]]:
    """A text of bytes, and what was certain after each of them."""
    written, seen = Written(TOKENIZER, [], stop), []
    for token in TOKENIZER.encode(text):
        written.push(token, -1.0)
        seen.append(written.text)
    return written, seen


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_a_text(text, stop):
    """The text is what stands before the first stop string that is complete, and nothing of it was given before."""
    written, seen = _write(text, *stop)
    ends = [size for size in range(len(text) + 1) if any(each in text[:size] for each in stop)]
    wanted = text if not ends else text[: min(at for each in stop if (at := text[: ends[0]].find(each)) >= 0)]
    assert all(wanted.startswith(each) for each in seen)
    assert (written.finish == "stop") == bool(ends) and written.count == (ends[0] if ends else len(text))
    written.end("length")
    assert written.text == wanted and [piece.offset for piece in written.pieces] == list(range(len(wanted)))


def test_a_beginning_of_a_stop_string_is_held_back():
    """Only until it is clear that it is none."""
    assert _write("a\n\nb", "\n\n\n")[1] == ["a", "a", "a", "a\n\nb"]


@pytest.mark.parametrize(("stop", "text", "reason"), [("€", "a", "stop"), ("x", "a€", "length")])
def test_pieces_have_places_in_the_text(stop, text, reason):
    """The bytes of a character stand where it stands; those of a stop string are no part of the text."""
    written, _ = _write("a€", stop)
    written.end("length")
    assert (written.text, written.finish) == (text, reason)
    assert [piece.offset for piece in written.pieces] == ([0] if text == "a" else [0, 1, 1, 1])

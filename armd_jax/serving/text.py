"""Token ids that become text piece by piece, with whole characters only and nothing behind a stop string."""

import dataclasses
from collections.abc import Sequence

from armd_jax.data.tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no character, or none yet


class Decoder:
    """Decodes ids one by one. The pieces, joined, are the text of all ids.

    Only ids since the last but one piece are decoded again: the earlier of the two pieces says how the later begins,
    with a space for example, and a piece never ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """before: ids that stand before the first one."""
        self._tokenizer, self._ids = tokenizer, list(before)
        self._known = 0  # where the ids begin that are decoded again
        self._read = len(self._ids)  # ids whose text was given

    def push(self, token: int) -> str:
        """The text that is whole with this id; empty in the middle of a character."""
        self._ids.append(token)
        return self._new(whole=True)

    def flush(self) -> str:
        """The text of what is left, if no id follows: bytes that form no character become U+FFFD."""
        return self._new(whole=False)

    def _new(self, whole: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._known : self._read])
        text = self._tokenizer.decode(self._ids[self._known :])
        if whole and text.endswith(_REPLACEMENT):
            return ""
        if not text.startswith(before):  # ids that were given may end inside a character
            before = before.rstrip(_REPLACEMENT)
        self._known, self._read = self._read, len(self._ids)
        return text[len(before) :]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of a text. offset: in the text, in characters, where what was whole before it ends."""

    token: int
    log_prob: float
    offset: int


class Written:
    """The text of one choice as it grows from left to right.

    text: what is certain to be part of it. pieces: its tokens. count: tokens that were made for it, those of a stop
    string included. finish: why it ended: "stop" (an end-of-text or a stop string) or "length"; None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        """before: ids that stand before its first one. stop: strings that end it, without being part of it."""
        self._decoder, self._stop = Decoder(tokenizer, before), stop
        self._whole = ""
        self._pieces: list[Piece] = []
        self._cut = False  # by a stop string
        self.count = 0
        self.finish: str | None = None

    def push(self, token: int, log_prob: float) -> None:
        """One more token. Nothing happens if the text has ended."""
        if self.finish is None:
            self._pieces.append(Piece(token, log_prob, len(self._whole)))
            self.count += 1
            self._add(self._decoder.push(token))

    def end(self, reason: str) -> None:
        """Nothing follows. A stop string that the very last bytes complete still counts."""
        if self.finish is None:
            self._add(self._decoder.flush())
            self.finish = self.finish or reason

    def _add(self, new: str) -> None:
        longest = max(map(len, self._stop), default=0)
        start = max(len(self._whole) - longest, 0)
        self._whole += new
        stops = [at for stop in self._stop if (at := self._whole.find(stop, start)) >= 0]
        if new and stops:
            self._whole = self._whole[: min(stops)]
            self._cut, self.finish = True, "stop"

    @property
    def text(self) -> str:
        """What is certain: without an end that may become a stop string."""
        held = 0
        if self.finish is None:
            for stop in self._stop:
                sizes = (size for size in range(len(stop) - 1, held, -1) if self._whole.endswith(stop[:size]))
                held = max(held, next(sizes, 0))
        return self._whole[: len(self._whole) - held]

    @property
    def pieces(self) -> list[Piece]:
        """The tokens of `text`: those that begin before its end, unless all of them belong to it."""
        if self.finish is not None and not self._cut:
            return self._pieces
        size = len(self.text)
        return [each for each in self._pieces if each.offset < size]

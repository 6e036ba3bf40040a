"""The error for a user's mistake, and helpers that keep its message to one readable line."""

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 200


class UserError(ValueError):
    """A mistake in what the user gave. The command line prints it as one line `error: …` and exits with code 2."""


def shown(value: Any) -> str:
    """`repr(value)` for a message. Long or deeply nested values are cut, so that the message stays one line."""
    return _shorten.repr(value)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'x'?`, or the known names if none is similar."""
    close = difflib.get_close_matches(name[:200], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"

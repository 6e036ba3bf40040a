"""The error for a user's mistake, and helpers that keep its message to one readable line."""

import difflib
import errno
import re
import reprlib
from collections.abc import Sequence
from typing import Any

# The exit code after a signal stopped a command and everything was saved; the same command continues. It is EX_TEMPFAIL
# of sysexits.h.
STOPPED = 75

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


# How XLA, NumPy, C++ and the kernel say that memory ran out. RESOURCE_EXHAUSTED alone may also be a full disk.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|bad_alloc|(?:cannot|unable to|failed to) allocate|RESOURCE_EXHAUSTED.*(?:alloc|memory|reserve|hbm)",
    re.IGNORECASE | re.DOTALL,
)
_ASKED_FOR = re.compile(r"(?:allocat|reserv|used)\D{0,20}?(\d[\d,]*\.?\d*) ?([KMGTP]?)(?:bytes|i?B)?\b", re.IGNORECASE)
_UNITS = ("", "K", "M", "G", "T", "P")


def out_of_memory(error: BaseException) -> str | None:
    """What a message says after "out of memory": how many bytes were asked for, or nothing if the error does not tell.

    None if neither the error nor what it was raised from is about memory.
    """
    cause: BaseException | None = error
    while cause is not None:
        of_memory = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        if of_memory or (not isinstance(cause, UserError) and _OUT_OF_MEMORY.search(str(cause))):
            asked = _ASKED_FOR.search(str(cause))
            if asked is None:
                return ""
            size = float(asked[1].replace(",", "")) * 1024 ** _UNITS.index(asked[2].upper())
            return f": {size:,.0f} bytes ({size / 2**30:,.2f} GiB) were asked for at once"
        cause = cause.__cause__ or cause.__context__
    return None

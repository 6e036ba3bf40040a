"""Standard output and error that never decide what a program does: what cannot be written there is dropped."""

import contextlib
import os
import sys
from collections.abc import Generator
from typing import Any, TextIO, cast


class Forgiving:
    """A text stream around another one. What cannot be written is dropped, and `fault` is the first reason.

    Reasons are a reader of a pipe that went away, a terminal that was lost, a log file on a full disk, or a stream that
    was closed. Text that the stream's encoding does not have is not among them: that still raises UnicodeEncodeError.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """stream: None if the process was started without it, as Python then says itself."""
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.fault: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes or drops the text. Returns its length."""
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, if that is possible."""
        with self._forgiven():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiven(self) -> Generator[None]:
        try:
            yield
        except UnicodeError:  # also a ValueError
            raise
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.fault = self.fault or error

    def let_go(self) -> None:
        """To be called at the end of a program: Python's own last flush then finds nothing that it could fail at."""
        self.flush()
        if self.fault is not None:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
                self._stream.flush()


@contextlib.contextmanager
def forgiving() -> Generator[tuple[Forgiving, Forgiving]]:
    """Makes standard output and error, which it yields, forgiving for the time of the block."""
    standard: tuple[Any, Any] = sys.stdout, sys.stderr
    if all(isinstance(stream, Forgiving) for stream in standard):  # a caller made them so already
        yield standard
        return
    _hold_descriptors()
    output, errors = Forgiving(sys.stdout), Forgiving(sys.stderr)
    with (
        contextlib.redirect_stdout(cast(TextIO, output)),
        contextlib.redirect_stderr(cast(TextIO, errors)),
    ):
        yield output, errors


def _hold_descriptors() -> None:
    """Opens the null device at each standard descriptor that is closed.

    Otherwise the next file that is opened, a checkpoint for example, would get its number, and libraries that print
    there without Python would write into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            os.set_inheritable(opened, True)

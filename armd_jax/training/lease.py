"""The lease of a run in object storage: one training at a time writes it, though a bucket knows no locks.

Leases are numbered objects, `.lock/00000001` and so on, and the highest one holds. An object that does not exist yet is
created on the condition that it does not exist, so of several that want the next number one gets it. The holder writes
its own object again every few seconds; one that no longer does so has died, and the next number may be taken. A holder
that was only stalled finds the higher number at its next beat and stores nothing any more.
"""

import contextlib
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Generator

from armd_jax import remote
from armd_jax.errors import UserError
from armd_jax.remote import Copy

BEAT = 5.0  # seconds between two beats
LEASE = 30.0  # seconds without a beat after which the holder counts as dead
_POLL = 0.5
_RELEASED = "released"


class Lease:
    """A lease that is held. A thread beats, and stores what changed in the run's copy."""

    def __init__(self, copy: Copy, number: int, token: str) -> None:
        self._copy, self._number, self._token = copy, number, token
        self._beats = 0
        self._over = threading.Event()
        self._last = time.monotonic()
        self.lost = False
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._thread.start()

    def store(self) -> None:
        """Stores what changed in the run. Raises UserError if it cannot be stored or the lease is lost."""
        if time.monotonic() - self._last > LEASE / 2:
            self._check()  # whoever was stalled for long may have been taken for dead
        if self.lost:
            raise UserError(f"{self._copy.address}: another training has taken over this run")
        self._copy.store()

    def release(self) -> None:
        """Stores what is left, and lets the next training in."""
        self._over.set()
        self._thread.join()
        if not self.lost:
            self._copy.store()
            self._copy.write_small(_name(self._number), _content(self._token, self._beats, _RELEASED))

    def _beat_on(self) -> None:
        while not self._over.wait(BEAT) and not self.lost:
            with contextlib.suppress(UserError):  # the store may be back at the next beat
                self._check()
                if not self.lost:
                    self._beats += 1
                    self._copy.write_small(_name(self._number), _content(self._token, self._beats))
                    self._last = time.monotonic()
                    self._copy.store()

    def _check(self) -> None:
        self.lost = self.lost or self._copy.read_small(_name(self._number + 1)) is not None


_held: dict[str, Lease] = {}


def of(workdir: pathlib.Path) -> Lease | None:
    """The lease that this process holds of a run in object storage; None for a run on a disk."""
    copy = remote.copy_of(workdir)
    return None if copy is None else _held.get(copy.address)


@contextlib.contextmanager
def held(copy: Copy) -> Generator[None]:
    """Holds the run against other trainings. Raises UserError if another one is running in it."""
    number, token = _taken(copy), secrets.token_hex(8)
    while not copy.write_small(_name(number), _content(token, 0), new=True):
        number = _taken(copy)  # somebody was faster
    for old in copy.names_below(".lock"):
        if old.isdecimal() and int(old) < number:
            copy.remove_small(f".lock/{old}")
    lease = _held[copy.address] = Lease(copy, number, token)
    try:
        copy.fetch()  # what the last holder stored before its lease ended
        yield
    finally:
        del _held[copy.address]
        lease.release()


def _taken(copy: Copy) -> int:
    """The number to take: the next one, once its last holder is gone. Raises UserError if that one is alive."""
    listed = [int(name) for name in copy.names_below(".lock") if name.isdecimal()]
    number = max(listed, default=0)
    while copy.read_small(_name(number + 1)) is not None:  # a listing may lag behind
        number += 1
    first = copy.read_small(_name(number)) if number else None
    if first is None or first.endswith(_RELEASED) or _has_died(first):
        return number + 1
    until = time.monotonic() + LEASE
    while time.monotonic() < until:
        time.sleep(_POLL)
        now = copy.read_small(_name(number))
        if now is None or now.endswith(_RELEASED):
            return number + 1
        if now != first:
            owner = first.splitlines()[1]
            raise UserError(f"--workdir={copy.address}: a training is running in it ({owner})")
    return number + 1


def _name(number: int) -> str:
    return f".lock/{number:08d}"


def _content(token: str, beats: int, state: str = "held") -> str:
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    return "\n".join([token, owner, _machine(), str(os.getpid()), str(beats), state])


def _machine() -> str:
    """What has the same processes: a start of a kernel, and a namespace of process numbers; empty if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _has_died(content: str) -> bool:
    """Whether the holder was a process of this machine that is no more. Others have to be watched."""
    lines = content.splitlines()
    if len(lines) < 4 or not lines[2] or lines[2] != _machine() or not lines[3].isdecimal():
        return False
    try:
        os.kill(int(lines[3]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

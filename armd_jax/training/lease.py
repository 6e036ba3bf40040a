"""The lease of a run in object storage: one training at a time writes it, though a bucket knows no locks.

Leases are numbered objects, `.lock/00000001` and so on, and the highest one holds. An object that does not exist yet is
created on the condition that it does not exist, so of several that want the next number one gets it. The holder writes
its own object again every few seconds; one that no longer does so has died, and the next number may be taken. A holder
that was only stalled finds a higher number before the next object that it stores, and stores nothing any more.
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
    """A lease that is held.

    One thread beats. Another one stores what changed in the run's copy, which may take longer than a lease lasts.
    """

    def __init__(self, copy: Copy, number: int, token: str) -> None:
        self._copy, self._number, self._token = copy, number, token
        self._beats = 0
        self._stored, self._over = threading.Event(), threading.Event()  # no more storing; no more beats
        self._last = time.monotonic()
        self.lost = False
        self._beating = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._storing: threading.Thread | None = None
        self._beating.start()

    def begin_storing(self) -> None:
        """From now on, what changes in the copy is stored. Before it was fetched, it would be taken for removed."""
        self._storing = threading.Thread(target=self._store_on, name="store", daemon=True)
        self._storing.start()

    def store(self) -> None:
        """Stores what changed in the run. Raises UserError if it cannot be stored or the lease is lost."""
        self._check_held()
        self._copy.store(self._check_held)

    def release(self) -> None:
        """Stores what is left, and lets the next training in. Raises UserError if it cannot be stored."""
        self._stored.set()
        try:
            if self._storing is not None:
                self._storing.join()
                self._look()
                if not self.lost:
                    self.store()
        finally:
            self._over.set()
            self._beating.join()
        if not self.lost:
            self._copy.write_small(_name(self._number), _content(self._token, self._beats, _RELEASED))

    def _beat_on(self) -> None:
        while not self._over.wait(BEAT) and not self.lost:
            with contextlib.suppress(UserError):  # the store may be back at the next beat
                self._look()
                if not self.lost:
                    self._beats += 1
                    self._copy.write_small(_name(self._number), _content(self._token, self._beats))
                    self._last = time.monotonic()

    def _store_on(self) -> None:
        while not self._stored.wait(BEAT) and not self.lost:
            with contextlib.suppress(UserError):  # the store may be back the next time
                self.store()

    def _check_held(self) -> None:
        """Raises UserError if the lease is lost. Whoever was stalled for long may have been taken for dead."""
        if time.monotonic() - self._last > LEASE / 2:
            self._look()
        if self.lost:
            raise UserError(f"{self._copy.address}: another training has taken over this run")

    def _look(self) -> None:
        """Looks for a higher number, that of the next holder or, if that one is gone too, of a later one."""
        if not self.lost and self._copy.read_small(_name(self._number + 1)) is None:
            self.lost = any(number > self._number for number in _numbers(self._copy))
        else:
            self.lost = True


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
    for old in _numbers(copy):
        if old < number:
            copy.remove_small(_name(old))
    lease = _held[copy.address] = Lease(copy, number, token)
    try:
        copy.fetch()  # what the last holder stored before its lease ended
        lease.begin_storing()
        yield
    finally:
        del _held[copy.address]
        lease.release()


def _taken(copy: Copy) -> int:
    """The number to take: the next one, once its last holder is gone. Raises UserError if that one is alive."""
    number = max(_numbers(copy), default=0)
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
            owner = [*first.splitlines(), "", "another process"][1] or "another process"
            raise UserError(f"--workdir={copy.address}: a training is running in it ({owner})")
    return number + 1


def _numbers(copy: Copy) -> list[int]:
    return [int(name) for name in copy.names_below(".lock") if name.isdecimal()]


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

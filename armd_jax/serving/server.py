"""The server from its start to its end: a socket, who may ask, and a way to stop without losing what is half done."""

import asyncio
import ipaddress
import signal
import socket
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool

from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.serving import app
from armd_jax.serving.api import Limits
from armd_jax.serving.batching import Batcher

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LAST_SECONDS = 0.5  # for what is said when the time is up


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, which may be connected to at once; port 0: any that is free.

    Raises UserError if it cannot be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port={port}: must be in 0 .. 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={host} --port={port}: {getattr(error, 'strerror', None) or error}") from error
    return listener


def url(listener: socket.socket) -> str:
    """The address of the page."""
    host, port = listener.getsockname()[:2]
    return f"http://{_in_url(host)}:{port}"


def hosts(listener: socket.socket, asked: str) -> tuple[str, ...]:
    """The names under which a server at this socket may be asked (see `app.make`). asked: what `listen` was given."""
    bound = listener.getsockname()[0].partition("%")[0]  # without the interface of a link-local address
    if ipaddress.ip_address(bound).is_unspecified:
        return ("*",)
    return tuple(map(_in_url, (*_LOOPBACK, bound, asked)))


def _in_url(host: str) -> str:
    """A name or an address as a URL and the header Host have it: that of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


class Server(uvicorn.Server):
    """Serves a model with its batcher until a signal, or somebody who sets `should_exit`, ends it."""

    def __init__(
        self, lm: LanguageModel, name: str, batcher: Batcher, limits: Limits, hosts: tuple[str, ...], grace: float
    ) -> None:
        """For name, limits and hosts see `app.make`. grace: seconds that requests have to be finished in the end."""
        made = app.make(lm, name, batcher, limits, hosts)
        super().__init__(uvicorn.Config(made, log_level="warning", access_log=False, lifespan="on", ws="none"))
        self._batcher, self._grace = batcher, grace

    def run_until_signal(self, listener: socket.socket) -> None:
        """Serves in the main thread until SIGTERM or SIGINT. A second SIGINT gives up what is half done."""

        def stop(*_: Any) -> None:
            self.should_exit = True

        # uvicorn puts its own handlers in their place while it serves, and then raises the signal for those before.
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.run([listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no new requests, and lets those that are there be finished in the time that they have."""
        ending = asyncio.create_task(self._end_in_time())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_in_time(self) -> None:
        """When the time is up, fails what is half done, and leaves clients that neither send nor read any more."""
        await asyncio.sleep(self._grace)
        self._batcher.close()
        await run_in_threadpool(self._batcher.join)
        await asyncio.sleep(_LAST_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

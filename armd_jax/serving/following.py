"""Waiting for the texts of a request while its client is there."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request

from armd_jax.serving.batching import Batcher, Closed, QueueFull, Ticket
from armd_jax.serving.errors import refusal


class Gone(Exception):
    """The client went away."""


async def changes(request: Request, batcher: Batcher, ticket: Ticket) -> AsyncGenerator[None]:
    """Puts the ticket into the queue, and gives an item whenever one of its texts has changed, without an end.

    Whoever has seen enough closes the iterator. The texts leave the queue and their batches then, and also if the
    client goes away, which raises Gone. Raises Refused if there is no room in the queue, or if a text failed.
    """
    gone = False

    async def listen() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        batcher.drop(ticket)
        ticket.changed.set()

    try:
        batcher.submit(ticket)
    except (QueueFull, Closed) as error:
        raise refusal(error) from error
    listening = asyncio.create_task(listen())
    try:
        while True:
            await ticket.changed.wait()
            ticket.changed.clear()
            if gone:
                raise Gone
            for text in ticket.texts:
                if text.failure is not None:
                    raise refusal(text.failure) from text.failure
            yield
    finally:
        batcher.drop(ticket)
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening

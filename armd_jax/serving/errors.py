"""Answers that refuse a request, in the JSON form that clients of OpenAI's API expect."""

import re

from starlette.responses import JSONResponse

from armd_jax.errors import UserError, out_of_memory
from armd_jax.serving.batching import Closed, QueueFull


class Refused(Exception):
    """A request that gets no text. status: the HTTP status. code: a word that programs can look for."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    @property
    def content(self) -> dict[str, dict[str, str | None]]:
        """The JSON object of the answer. Its `param` is the field that the message names as `request.field`."""
        field = re.search(r"\brequest\.(\w+)", self.message)
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": field and field[1], "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse(self.content, self.status, headers)


def refusal(error: Exception) -> Refused:
    """What a client is told of an error. What is nobody's mistake is told without its details."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(400, str(error))
    if isinstance(error, QueueFull):
        return Refused(503, "the queue is full; try again later", "queue_full")
    if isinstance(error, Closed):
        return Refused(503, "the server is shutting down", "shutting_down")
    if (asked := out_of_memory(error)) is not None:
        return Refused(500, f"out of memory{asked}", "out_of_memory")
    return Refused(500, f"the server failed: {type(error).__name__}", "server_error")

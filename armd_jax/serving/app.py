"""The paths of the server, and what stands around them: sizes, hosts, errors and figures."""

import base64
import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armd_jax import typed
from armd_jax.errors import UserError, shown
from armd_jax.inference.language_model import LanguageModel
from armd_jax.names import DecodingMode
from armd_jax.serving import api, live, metrics
from armd_jax.serving.api import Limits
from armd_jax.serving.batching import Batcher, Ticket
from armd_jax.serving.completions import Answer
from armd_jax.serving.errors import Refused, refusal
from armd_jax.serving.following import Gone, changes
from armd_jax.serving.metrics import Metrics

_LOG = logging.getLogger(__name__)
_SHORT = 1 << 14  # bytes of a body that is read at once
_CLIENT_CLOSED = 499  # as in the logs of other servers: the client did not wait for its answer


def make(lm: LanguageModel, name: str, batcher: Batcher, limits: Limits, hosts: Sequence[str]) -> Starlette:
    """The application. name: of the model. hosts: names under which it may be asked, as in a URL; "*": any.

    The names protect a server on this machine from pages of other servers, whose names may be made to mean this
    machine. For the same reason it lets no other origin read its answers, and a body has to be sent as JSON.
    A request that is larger than the whole queue is refused like one that is beyond the limits.
    """
    limits = dataclasses.replace(limits, choices=min(limits.choices, batcher.max_queue))
    paths = _Paths(lm, name, batcher, limits)
    routes = [
        Route("/", paths.page),
        Route("/api/about", paths.about),
        Route("/api/generate", paths.generate, methods=["POST"]),
        Route("/v1/completions", paths.completions, methods=["POST"]),
        Route("/v1/models", paths.models),
        Route("/v1/models/{name:path}", paths.model),
        Route("/health", paths.health),
        Route("/metrics", paths.metrics),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        batcher.start()
        yield
        batcher.close()
        await run_in_threadpool(batcher.join)

    return Starlette(
        lifespan=lifespan,
        routes=routes,
        middleware=[
            Middleware(_Counted, metrics=batcher.metrics, routes=routes),
            Middleware(_Known, hosts=hosts),
        ],
        exception_handlers={Exception: _failed}
        | {kind: _failed for kind in (HTTPException, Refused, Gone, ClientDisconnect)},
    )


def _failed(_: Request, error: Exception) -> Response:
    if isinstance(error, Gone | ClientDisconnect):
        return Response(status_code=_CLIENT_CLOSED)
    if isinstance(error, HTTPException):
        response = Refused(error.status_code, error.detail).response()
        response.headers.update(error.headers or {})
        return response
    return refusal(error).response()


class _Counted:
    """Counts the answers of an application by path and status, and measures how long they take."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, whole, began = 500, False, time.perf_counter()
        found = [route.path_format for route in self._routes if route.matches(scope)[0] != Match.NONE]
        path = found[0] if found else "other"

        async def receiving() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and not whole:
                status = _CLIENT_CLOSED
            return message

        async def sending(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start" and status != _CLIENT_CLOSED:
                status = message["status"]
            if message["type"] == "http.response.body" and not message.get("more_body"):
                whole = True
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_seconds.labels(path).observe(time.perf_counter() - began)


class _Known:
    """Refuses what is asked of this server under a name that is none of its own."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self._hosts:
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", ""))
            if host.lower() not in self._hosts:
                refused = Refused(400, f"Host: {shown(host)} is no name of this server", "unknown_host")
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Paths:
    """What is answered at each path."""

    def __init__(self, lm: LanguageModel, name: str, batcher: Batcher, limits: Limits) -> None:
        assert lm.tokenizer is not None
        self._lm, self._tokenizer, self._name = lm, lm.tokenizer, name
        self._batcher, self._limits, self._began = batcher, limits, int(time.time())
        self._page = (importlib.resources.files("armd_jax.serving") / "page.html").read_text(encoding="utf-8")
        self._policy = _policy(self._page)

    async def page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": self._policy, "X-Content-Type-Options": "nosniff"}
        return Response(self._page, media_type="text/html", headers=headers)

    async def about(self, _: Request) -> Response:
        """What the page has to know of the model."""
        config = self._lm.config
        modes = typed.choices(DecodingMode)
        about = {"model": self._name, "max_length": config.max_length, "modes": modes, "max_streams": api.MAX_STREAMS}
        return JSONResponse(about)

    async def health(self, _: Request) -> Response:
        batcher = self._batcher
        return JSONResponse({"status": "ok", "queue": batcher.num_waiting(), "active": batcher.num_active()})

    async def metrics(self, _: Request) -> Response:
        return Response(self._batcher.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._began, "owned_by": "armd-jax"}

    def _check_model(self, name: str) -> None:
        if name not in ("", self._name):
            raise Refused(404, f"request.model: this server has the model {self._name!r} alone", "model_not_found")

    async def completions(self, request: Request) -> Response:
        values, size = await self._body(request)
        self._check_model(api.model_name(values))
        asked = await self._checked(api.completion, values, size)
        ticket = Ticket(asked.texts)
        answer = Answer(self._lm, self._name, asked, ticket.texts)
        changing = changes(request, self._batcher, ticket)
        if asked.stream:
            parts = answer.parts(changing)
            return await _streamed(parts, changing, "text/event-stream", "data: ", "\n\n", "data: [DONE]\n\n")
        async with contextlib.aclosing(changing):
            return JSONResponse(await answer.whole(changing))

    async def generate(self, request: Request) -> Response:
        asked = await self._checked(api.page, *await self._body(request))
        ticket = Ticket([asked])
        changing = changes(request, self._batcher, ticket)
        parts = live.lines(self._tokenizer, ticket.texts[0], changing)
        return await _streamed(parts, changing, "application/x-ndjson", "", "\n", "")

    async def _checked(self, read: Callable[..., Any], values: dict[str, Any], size: int) -> Any:
        """What a function of `api` makes of a body. A long one is read in a thread: its text takes time to encode."""
        given = values, self._lm.config, self._tokenizer, self._limits
        try:
            return await run_in_threadpool(read, *given) if size > _SHORT else read(*given)
        except UserError as error:
            raise Refused(400, str(error)) from error

    async def _body(self, request: Request) -> tuple[dict[str, Any], int]:
        """The object of a body, and the size of the body in bytes."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body has to be sent with Content-Type: application/json")
        content, most = b"", self._limits.body
        too_large = Refused(413, f"the body is larger than {most:,} bytes", "body_too_large")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        async for chunk in request.stream():
            content += chunk
            if len(content) > most:
                raise too_large
        try:
            return api.body(content), len(content)
        except UserError as error:
            raise Refused(400, str(error)) from error


async def _streamed(
    parts: AsyncIterator[dict[str, Any]],
    changing: AsyncGenerator[None],
    kind: str,
    before: str,
    after: str,
    end: str,
) -> Response:
    """Objects as lines of a stream. It begins with the first one, so that a refusal still has a status of its own."""
    try:
        first = await anext(parts)
    except BaseException:
        await changing.aclose()
        raise

    async def lines() -> AsyncIterator[str]:
        try:
            yield before + json.dumps(first) + after
            async for part in parts:
                yield before + json.dumps(part) + after
            yield end
        except Gone:
            pass
        except Exception as error:
            if not isinstance(error, Refused | UserError):
                _LOG.error("a stream failed", exc_info=error)
            yield before + json.dumps(refusal(error).content) + after
        finally:
            await changing.aclose()

    return StreamingResponse(lines(), media_type=kind, headers={"Cache-Control": "no-store"})


def _policy(page: str) -> str:
    """What the page may load: its own style and script, by their digests, and answers of this server."""

    def digest(element: str) -> str:
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {digest('style')}; script-src {digest('script')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

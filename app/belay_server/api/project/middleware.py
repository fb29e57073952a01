"""Run the middleware of the project's ASGI app around every request, Belay's own routes included.

As in LangGraph's server, the middleware may add headers, answer instead, and rewrite requests and
responses. It runs in the event loop of the project's app, in a native thread. The request's
greenlet passes its messages on to the web server; Belay answers in a greenlet of its own:

    web server <-> greenlet of the request <-> middleware (event loop) <-> greenlet of Belay

Nothing is buffered: each chunk waits until the one before it has been taken. WebSockets go through
middleware, too (`socket_middleware`).
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from functools import partial
from typing import Any

from a2wsgi.asgi import build_scope

from belay_server.api.http.bodies.unread_bodies import CountedBody, count_body
from belay_server.api.project.asgi_bridge import is_stream, is_text
from belay_server.api.project.code_access import act_as_server
from belay_server.api.project.exchange import (
    EXCHANGE,
    BelayGreenlet,
    Environ,
    Exchange,
    Message,
    Receive,
    Send,
    WsgiApp,
    environ_of,
    error_response,
    has_line_break,
    headers_of,
    status_line,
)
from belay_server.api.project.socket_middleware import SocketExchange, socket_scope

log = logging.getLogger(__name__)

_STEP = 64 * 1024
#: The longest body that goes through middleware, which may hold it in memory. Belay's own routes
#: have their own limit.
_LONGEST = 64 * 1024 * 1024


def middleware_of(app: Any) -> list[Any]:
    """Return the middleware that a Starlette or FastAPI app was given; [] for other apps."""
    return list(getattr(app, "user_middleware", None) or [])


def without_middleware(app: Any) -> Any:
    """Return a copy of a Starlette or FastAPI app that has its routes but not its middleware."""
    if not middleware_of(app):
        return app
    bare = copy.copy(app)
    bare.user_middleware = []
    bare.middleware_stack = None
    return bare


def allows_origins(app: Any) -> bool:
    """Return whether an app's middleware adds CORS headers."""
    return any("CORS" in getattr(one.cls, "__name__", "") for one in middleware_of(app))


class ProjectMiddleware:
    """A WSGI app: `app`, inside the middleware of a project's ASGI app."""

    def __init__(
        self,
        app: WsgiApp,
        project: Any,
        loop: asyncio.AbstractEventLoop,
        state: MutableMapping[str, Any],
        *,
        before: Callable[[Environ], WsgiApp | None] = lambda _environ: None,
        opens_socket: Callable[[Environ], bool] = lambda _environ: False,
    ) -> None:
        """`loop` and `state` are those of the project's running app. `before` may answer a request
        before any middleware: it returns a WSGI app, or None. `opens_socket` returns whether a
        request opens a WebSocket of Belay's."""
        self._app = app
        self._opens_socket = opens_socket
        self._project = project
        self._loop = loop
        self._state = state
        self._before = before
        stack: Any = _answer_by_belay
        for one in reversed(middleware_of(project)):
            stack = one.cls(stack, *one.args, **one.kwargs)
        self._stack = stack

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        if not is_text(environ["PATH_INFO"]):  # ASGI cannot represent it
            return self._app(environ, start_response)
        is_socket = self._opens_socket(environ)
        body = count_body(environ)
        if _length_of(environ) > _LONGEST:
            return _before_discard(error_response(start_response, 413), environ, body)
        act_as_server()  # the middleware's task inherits it
        if (refusal := self._before(environ)) is not None:
            return _before_discard(refusal(environ, start_response), environ, body)
        make = SocketExchange if is_socket else _Exchange
        exchange = make(self._app, environ, self._loop)
        described = {
            **(socket_scope(environ) if is_socket else build_scope(environ)),  # type: ignore[arg-type]
            "app": self._project,
            "state": dict(self._state),
            EXCHANGE: exchange,
        }
        exchange.begin(partial(self._stack, described))
        return exchange.respond(start_response)


async def _answer_by_belay(scope: Message, receive: Receive, send: Send) -> None:
    """Answer a request by Belay: the innermost ASGI app of the stack."""
    await scope[EXCHANGE].answer_by_belay(scope, receive, send)


class _Exchange(Exchange):
    """An HTTP request."""

    def __init__(self, app: WsgiApp, environ: Environ, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(app, environ, loop)
        self._body_ended = False
        is_chunked = bool(environ.get("HTTP_TRANSFER_ENCODING"))
        self._left = None if is_chunked else _length_of(environ)
        self._received = 0
        self._has_body = self._left != 0

    # -- in the request's greenlet ------------------------------------------------------------

    def respond(self, start_response: Any) -> Iterator[bytes]:
        """Yield the chunks of the response. The web server closes this when the client is gone."""
        started = ended = False
        try:
            while not ended:
                kind, content, taken = self._messages.get()
                if kind == "receive":
                    self._answer(taken, self._read_body())
                elif kind == "start":
                    started, headers = True, headers_of(content)
                    if has_line_break(headers):
                        log.error("the middleware has sent a header with a line break")
                        yield from error_response(start_response, 500)
                        return
                    start_response(status_line(content["status"]), headers)
                    if is_stream(content):
                        yield b""  # the web server sends the headers with the first part
                    self._answer(taken, None)
                elif kind == "body":
                    yield content
                    self._answer(taken, None)
                else:
                    ended = True
                    if not started:
                        yield from error_response(start_response, 422 if self._is_broken else 500)
                    elif kind == "failed":
                        raise ConnectionError("the middleware failed within a response")
        finally:
            if not ended:  # the client is gone
                self._end_task()
            _discard(self._environ, count_body(self._environ))

    def _read_body(self) -> Message:
        """Return the next part of the request's body."""
        size = _STEP if self._left is None else min(_STEP, self._left)
        body = self._environ["wsgi.input"]
        try:
            data = body.read(size) if size else b""
        except Exception as error:  # noqa: BLE001  (the web server's, such as for invalid chunks)
            log.debug("cannot read the body of a request: %r", error)
            return self._refuse_body(body)
        self._received += len(data)
        ended_early = not data and bool(self._left)
        if ended_early or self._received > _LONGEST:
            return self._refuse_body(body)
        if self._left is not None:
            self._left -= len(data)
        more = bool(data) and self._left != 0
        return {"type": "http.request", "body": data, "more_body": more}

    def _refuse_body(self, body: Any) -> Message:
        self._is_broken = body.failed = True
        return {"type": "http.disconnect"}

    # -- in the event loop --------------------------------------------------------------------

    async def receive(self) -> Message:
        """Return the next part of the body; after its end, wait for the client to be gone."""
        if self._body_ended:
            await asyncio.get_running_loop().create_future()
        message: Message = await self._request("receive")
        self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._request("start", message)
        elif message["type"] == "http.response.body":
            if message.get("body"):
                await self._request("body", message["body"])
            if not message.get("more_body", False):
                self._post("end")  # the rest of the task, such as background work, goes on

    async def answer_by_belay(self, scope: Message, receive: Receive, send: Send) -> None:
        environ = environ_of(scope, self._environ)
        belay = BelayGreenlet(self._app, self._loop)
        if receive != self.receive and self._has_body:
            # The middleware may have read or replaced the body, so its length is unknown.
            environ.pop("CONTENT_LENGTH", None)
            environ["HTTP_TRANSFER_ENCODING"] = "chunked"
            environ["wsgi.input_terminated"] = True
            environ["wsgi.input"] = _Received(belay)
        await self._relay(belay, environ, receive, send)


class _Received:
    """A request's body, as the middleware passes it on. It has the interface of `wsgi.input`."""

    #: The request's greenlet discards what is left of the body.
    is_discarded_elsewhere = True

    def __init__(self, belay: BelayGreenlet) -> None:
        self._belay = belay
        self._buffer = bytearray()
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        while not self._ended and (size < 0 or len(self._buffer) < size):
            self._receive()
        return self._take(len(self._buffer) if size < 0 else size)

    def readline(self, size: int = -1) -> bytes:
        while not self._ended and b"\n" not in self._buffer and not 0 <= size <= len(self._buffer):
            self._receive()
        end = self._buffer.find(b"\n") + 1 or len(self._buffer)
        return self._take(end if size < 0 else min(end, size))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _take(self, size: int) -> bytes:
        data = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return data

    def _receive(self) -> None:
        message = self._belay.request("receive")
        if message["type"] == "http.disconnect":
            self._ended = True
            raise ConnectionError("the client has disconnected")
        self._buffer += message.get("body") or b""
        self._ended = not message.get("more_body", False)


def _length_of(environ: Environ) -> int:
    length = environ.get("CONTENT_LENGTH") or "0"
    return int(length) if length.isdecimal() else 0


def _before_discard(
    response: Iterable[bytes], environ: Environ, body: CountedBody | None
) -> Iterator[bytes]:
    """Yield a response that needs no more of the request's body, then discard the body."""
    try:
        yield from response
    finally:
        _discard(environ, body)


def _discard(environ: Environ, body: CountedBody | None) -> None:
    """Read what is left of a request's body, or let the web server close the connection."""
    if body is not None and "gunicorn.socket" in environ:
        body.discard(environ["gunicorn.socket"])

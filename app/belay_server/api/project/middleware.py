"""Run the middleware of the project's ASGI app around every request, Belay's own routes included.

As in LangGraph's server, the middleware may add headers, answer instead, and rewrite requests and
responses. It runs in the event loop of the project's app, in a native thread. The request's
greenlet passes its messages on to the web server; Belay answers in a greenlet of its own:

    web server <-> greenlet of the request <-> middleware (event loop) <-> greenlet of Belay

Nothing is buffered: each chunk waits until the one before it has been taken. WebSockets do not go
through middleware.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from functools import partial
from http import HTTPStatus
from typing import Any

import gevent
import orjson
from a2wsgi.asgi import build_scope
from gevent.event import AsyncResult
from gevent.queue import SimpleQueue

from belay_server.api.http.unread_bodies import CountedBody, count_body
from belay_server.api.project.asgi_bridge import is_stream, is_text
from belay_server.api.project.code_access import act_as_server

log = logging.getLogger(__name__)

Environ = dict[str, Any]
WsgiApp = Callable[..., Iterable[bytes]]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_STEP = 64 * 1024
#: The longest body that goes through middleware, which may hold it in memory. Belay's own routes
#: have their own limit.
_LONGEST = 64 * 1024 * 1024
#: Key in a scope of the exchange that it belongs to. Middleware passes a scope's keys on.
_EXCHANGE = "belay.exchange"


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
        goes_around: Callable[[Environ], bool] = lambda _environ: False,
    ) -> None:
        """`loop` and `state` are those of the project's running app. `before` may answer a request
        before any middleware: it returns a WSGI app, or None. `goes_around` returns whether a
        request opens a WebSocket."""
        self._app = app
        self._goes_around = goes_around
        self._project = project
        self._loop = loop
        self._state = state
        self._before = before
        stack: Any = _answer_by_belay
        for one in reversed(middleware_of(project)):
            stack = one.cls(stack, *one.args, **one.kwargs)
        self._stack = stack

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        if not is_text(environ["PATH_INFO"]):  # ASGI cannot represent it, and no route has it
            return _error(start_response, 404)
        if self._goes_around(environ):
            return self._app(environ, start_response)
        body = count_body(environ)
        if _length_of(environ) > _LONGEST:
            return _before_discard(_error(start_response, 413), environ, body)
        act_as_server()  # the middleware's task inherits it
        if (refusal := self._before(environ)) is not None:
            return _before_discard(refusal(environ, start_response), environ, body)
        exchange = _Exchange(self._app, environ, self._loop)
        scope = {
            **build_scope(environ),  # type: ignore[arg-type]
            "app": self._project,
            "state": dict(self._state),
            _EXCHANGE: exchange,
        }
        exchange.begin(partial(self._stack, scope))
        return exchange.respond(start_response)


async def _answer_by_belay(scope: Message, receive: Receive, send: Send) -> None:
    """Answer a request by Belay: the innermost ASGI app of the stack."""
    await scope[_EXCHANGE].answer_by_belay(scope, receive, send)


class _Exchange:
    """One request. Its methods run in the request's greenlet or, if they are coroutines, in the
    event loop of the middleware."""

    def __init__(self, app: WsgiApp, environ: Environ, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._environ = environ
        self._loop = loop
        self._hub = gevent.get_hub()
        #: What the event loop sends to the request's greenlet, with a future for the answer.
        self._messages: SimpleQueue[tuple[str, Any, asyncio.Future[Any] | None]] = SimpleQueue()
        self._task: asyncio.Task[None] | None = None
        self._body_ended = False
        is_chunked = bool(environ.get("HTTP_TRANSFER_ENCODING"))
        self._left = None if is_chunked else _length_of(environ)
        self._received = 0
        self._has_body = self._left != 0
        #: Whether the body could not be read.
        self._is_broken = False

    # -- in the request's greenlet ------------------------------------------------------------

    def begin(self, stack: Callable[[Receive, Send], Awaitable[None]]) -> None:
        def start() -> None:
            self._task = asyncio.ensure_future(self._run(stack))

        self._loop.call_soon_threadsafe(start)

    def respond(self, start_response: Any) -> Iterator[bytes]:
        """Yield the chunks of the response. The web server closes this when the client is gone."""
        started = ended = False
        try:
            while not ended:
                kind, content, taken = self._messages.get()
                if kind == "receive":
                    self._answer(taken, self._read_body())
                elif kind == "start":
                    started = True
                    start_response(_status(content["status"]), _headers(content))
                    if is_stream(content):
                        yield b""  # the web server sends the headers with the first part
                    self._answer(taken, None)
                elif kind == "body":
                    yield content
                    self._answer(taken, None)
                else:
                    ended = True
                    if not started:
                        yield from _error(start_response, 422 if self._is_broken else 500)
                    elif kind == "failed":
                        raise ConnectionError("the middleware failed within a response")
        finally:
            if not ended:  # the client is gone
                self._loop.call_soon_threadsafe(self._cancel)
            _discard(self._environ, count_body(self._environ))

    def _answer(self, future: asyncio.Future[Any] | None, value: Any) -> None:
        def answer() -> None:
            if future is not None and not future.done():
                future.set_result(value)

        self._loop.call_soon_threadsafe(answer)

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
        if self._received > _LONGEST:
            return self._refuse_body(body)
        if self._left is not None:
            self._left -= len(data)
        more = bool(data) and self._left != 0
        return {"type": "http.request", "body": data, "more_body": more}

    def _refuse_body(self, body: Any) -> Message:
        self._is_broken = body.failed = True
        return {"type": "http.disconnect"}

    # -- in the event loop --------------------------------------------------------------------

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _post(self, kind: str, content: Any = None, taken: Any = None) -> None:
        self._hub.loop.run_callback_threadsafe(self._messages.put, (kind, content, taken))

    async def _request(self, kind: str, content: Any = None) -> Any:
        """Send a message to the request's greenlet, and return its answer."""
        taken = self._loop.create_future()
        self._post(kind, content, taken)
        return await taken

    async def _run(self, stack: Callable[[Receive, Send], Awaitable[None]]) -> None:
        try:
            await stack(self.receive, self._send)
        except asyncio.CancelledError:  # the client is gone, or the middleware awaited such a task
            self._post("failed")
            raise
        except BaseException:
            if not self._is_broken:
                log.exception("the middleware of the project's app failed")
            self._post("failed")
        else:
            self._post("end")

    async def receive(self) -> Message:
        """Return the next part of the body; after its end, wait for the client to be gone."""
        if self._body_ended:
            await asyncio.get_running_loop().create_future()
        message: Message = await self._request("receive")
        self._body_ended = not message.get("more_body", False)
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._request("start", message)
        elif message["type"] == "http.response.body":
            if message.get("body"):
                await self._request("body", message["body"])
            if not message.get("more_body", False):
                self._post("end")  # the rest of the task, such as background work, goes on

    async def answer_by_belay(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let Belay answer in a greenlet of its own, which is ended with this coroutine."""
        environ = _environ_of(scope, self._environ)
        requests: asyncio.Queue[Any] = asyncio.Queue()
        belay = _Belay(self._app, self._loop, requests)
        if receive != self.receive and self._has_body:
            # The middleware may have read or replaced the body, so its length is unknown.
            environ.pop("CONTENT_LENGTH", None)
            environ["HTTP_TRANSFER_ENCODING"] = "chunked"
            environ["wsgi.input_terminated"] = True
            environ["wsgi.input"] = _Received(belay)
        self._hub.loop.run_callback_threadsafe(belay.start, environ)
        try:
            while True:
                kind, content, taken = await requests.get()
                if kind == "end":
                    return
                if kind == "failed":
                    raise content
                answer = await (receive() if kind == "receive" else send(content))
                self._hub.loop.run_callback_threadsafe(taken.set, answer)
        finally:
            self._hub.loop.run_callback_threadsafe(belay.stop)


class _Belay:
    """Answers one request by Belay's WSGI app, in a greenlet."""

    def __init__(
        self, app: WsgiApp, loop: asyncio.AbstractEventLoop, requests: asyncio.Queue[Any]
    ) -> None:
        self._app = app
        self._loop = loop
        self._requests = requests
        self._greenlet: gevent.Greenlet[..., None] | None = None
        self._start: Message | None = None

    def start(self, environ: Environ) -> None:
        self._greenlet = gevent.spawn(self._run, environ)

    def stop(self) -> None:
        """End the greenlet. Its response is closed, as the web server would close it."""
        if self._greenlet is not None and not self._greenlet.dead:
            self._greenlet.kill(block=False)

    def request(self, kind: str, content: Any = None) -> Any:
        """Send a message to the event loop, and return its answer."""
        taken = AsyncResult()
        self._post(kind, content, taken)
        return taken.get()

    def _post(self, kind: str, content: Any = None, taken: AsyncResult | None = None) -> None:
        self._loop.call_soon_threadsafe(self._requests.put_nowait, (kind, content, taken))

    def _run(self, environ: Environ) -> None:
        try:
            self._respond(environ)
        except Exception as error:  # noqa: BLE001  (it is raised in the event loop)
            self._post("failed", error)
        else:
            self._post("end")

    def _respond(self, environ: Environ) -> None:
        chunks = self._app(environ, self._start_response)
        try:
            for chunk in chunks:
                self._send_start()
                if chunk:
                    self._send_body(chunk, more=True)
            self._send_start()
            self._send_body(b"", more=False)
        finally:
            if hasattr(chunks, "close"):
                chunks.close()

    def _start_response(self, status: str, headers: list[tuple[str, str]], *_: Any) -> None:
        self._start = {
            "type": "http.response.start",
            "status": int(status.partition(" ")[0]),
            "headers": [
                (name.lower().encode("latin1"), value.encode("latin1")) for name, value in headers
            ],
        }

    def _send_start(self) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            self.request("send", start)

    def _send_body(self, chunk: bytes, *, more: bool) -> None:
        self.request("send", {"type": "http.response.body", "body": chunk, "more_body": more})


class _Received:
    """A request's body, as the middleware passes it on. It has the interface of `wsgi.input`."""

    #: The request's greenlet discards what is left of the body.
    is_discarded_elsewhere = True

    def __init__(self, belay: _Belay) -> None:
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


def _environ_of(scope: Message, environ: Environ) -> Environ:
    """Return the environment of a request as the middleware has changed it."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("HTTP_") and name not in ("CONTENT_TYPE", "CONTENT_LENGTH")
    }
    for name, value in scope["headers"]:
        key = name.decode("latin1").upper().replace("-", "_")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        text = value.decode("latin1")
        kept[key] = f"{kept[key]},{text}" if key in kept else text
    root = environ.get("SCRIPT_NAME", "").encode("latin1").decode()
    return {
        **kept,
        "REQUEST_METHOD": scope["method"],
        "PATH_INFO": scope["path"].removeprefix(root).encode().decode("latin1"),
        "QUERY_STRING": scope["query_string"].decode("latin1"),
    }


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


def _status(code: int) -> str:
    try:
        return f"{code} {HTTPStatus(code).phrase}"
    except ValueError:
        return f"{code} Unknown"


def _headers(message: Message) -> list[tuple[str, str]]:
    return [
        (name.decode("latin1"), value.decode("latin1").strip())
        for name, value in message.get("headers", ())
    ]


_DETAILS = {
    404: "Not Found",
    413: "The request body may have at most 64 MiB",
    422: "The request body could not be read",
    500: "Internal Server Error",
}


def _error(start_response: Any, status: int) -> Iterator[bytes]:
    body = orjson.dumps({"detail": _DETAILS[status]})
    headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
    start_response(_status(status), headers)
    yield body

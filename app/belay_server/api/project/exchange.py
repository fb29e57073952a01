"""Exchange messages between a request's greenlet and the event loop of the project's app.

A request that goes through middleware has a greenlet of the web server, a task in the event loop,
which runs in a native thread, and a greenlet in which Belay answers:

    web server <-> greenlet of the request <-> middleware (event loop) <-> greenlet of Belay

Each side waits until its message has been taken, so nothing is buffered.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from http import HTTPStatus
from typing import Any

import gevent
import orjson
from gevent.event import AsyncResult
from gevent.queue import SimpleQueue

from belay_server.api.http.client_socket import CLIENT_LEFT, has_disconnected

log = logging.getLogger(__name__)

Environ = dict[str, Any]
WsgiApp = Callable[..., Iterable[bytes]]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
#: What the event loop sends to the request's greenlet, with a future for the answer.
Sent = tuple[str, Any, asyncio.Future[Any] | None]


class Exchange:
    """One request. Its methods run in the request's greenlet or, if they are coroutines, in the
    event loop of the middleware."""

    def __init__(self, app: WsgiApp, environ: Environ, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._environ = environ
        self._loop = loop
        self._hub = gevent.get_hub()
        self._messages: SimpleQueue[Sent] = SimpleQueue()
        self._task: asyncio.Task[None] | None = None
        #: Whether the client's data could not be read.
        self._is_broken = False
        #: Whether the client had disconnected when the web server ended the request. It closes the
        #: socket then, before Belay's greenlet is ended.
        self._client_left = False
        environ[CLIENT_LEFT] = lambda: self._client_left

    # -- in the request's greenlet ------------------------------------------------------------

    def begin(self, stack: Callable[[Receive, Send], Awaitable[None]]) -> None:
        """Start the middleware. `messages` gets what it sends, then `end` or `failed`."""

        def start() -> None:
            self._task = asyncio.ensure_future(self._run(stack))

        self._loop.call_soon_threadsafe(start)

    def _end_task(self) -> None:
        """Cancel the middleware's task. The client is gone, or the server shuts down."""
        client_socket = self._environ.get("gunicorn.socket")
        self._client_left = client_socket is not None and has_disconnected(client_socket)
        self._loop.call_soon_threadsafe(self._cancel)

    def _answer(self, future: asyncio.Future[Any] | None, value: Any) -> None:
        def answer() -> None:
            if future is not None and not future.done():
                future.set_result(value)

        self._loop.call_soon_threadsafe(answer)

    # -- in the event loop --------------------------------------------------------------------

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _in_hub(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the thread of the greenlets, soon."""
        self._hub.loop.run_callback_threadsafe(function, *args)

    def _post(self, kind: str, content: Any = None, taken: Any = None) -> None:
        self._in_hub(self._messages.put, (kind, content, taken))

    async def _request(self, kind: str, content: Any = None) -> Any:
        """Send a message to the request's greenlet, and return its answer."""
        taken = self._loop.create_future()
        self._post(kind, content, taken)
        return await taken

    async def _run(self, stack: Callable[[Receive, Send], Awaitable[None]]) -> None:
        try:
            await stack(self.receive, self.send)
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
        """Return the next message of the client."""
        raise NotImplementedError

    async def send(self, message: Message) -> None:
        """Take a message of the middleware."""
        raise NotImplementedError

    async def answer_by_belay(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let Belay answer: the innermost ASGI app of the stack."""
        raise NotImplementedError

    async def _relay(
        self, belay: BelayGreenlet, environ: Environ, receive: Receive, send: Send
    ) -> None:
        """Exchange messages with Belay in a greenlet, which is ended with this coroutine."""
        self._in_hub(belay.start, environ)
        try:
            while True:
                kind, content, taken = await belay.requests.get()
                if kind == "end":
                    return
                if kind == "failed":
                    raise content
                if kind == "receive":
                    await self._receive_for(taken, receive)
                else:
                    await send(content)
                    self._in_hub(taken.set, None)
        finally:
            self._in_hub(belay.stop)

    async def _receive_for(self, taken: AsyncResult, receive: Receive) -> None:
        """Give Belay the next message."""
        self._in_hub(taken.set, await receive())


#: Seconds after which a greenlet is killed that was stopped, and has not ended.
_KILL_SECONDS = 60.0


class _Stopped(ConnectionError):
    """The client is gone, or the middleware has ended the request."""


class BelayGreenlet:
    """Answers one request by Belay's WSGI app, in a greenlet."""

    def __init__(self, app: WsgiApp, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop
        #: The greenlet's messages for the event loop, each with a result to set.
        self.requests: asyncio.Queue[tuple[str, Any, AsyncResult]] = asyncio.Queue()
        self._greenlet: gevent.Greenlet[..., None] | None = None
        self._start: Message | None = None
        self._is_stopped = False
        #: What the greenlet waits for.
        self._taken: AsyncResult | None = None

    def start(self, environ: Environ) -> None:
        self._greenlet = gevent.spawn(self._run, environ)

    def stop(self) -> None:
        """End the greenlet at its message, or its next one. Its response is closed, as the web
        server would close it. What it does until then is completed: it may be canceling the run of
        a client that has left."""
        self._is_stopped = True
        if self._taken is not None:
            self._taken.set_exception(_Stopped())
        if self._greenlet is not None and not self._greenlet.dead:
            gevent.spawn_later(_KILL_SECONDS, self._greenlet.kill, block=False)

    def request(self, kind: str, content: Any = None) -> Any:
        """Send a message to the event loop, and return its answer. Raises _Stopped."""
        if self._is_stopped:
            raise _Stopped
        taken = self._taken = AsyncResult()
        try:
            self._post(kind, content, taken)
            return taken.get()
        finally:
            self._taken = None

    def _post(self, kind: str, content: Any = None, taken: AsyncResult | None = None) -> None:
        self._loop.call_soon_threadsafe(self.requests.put_nowait, (kind, content, taken))

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

    #: What the types of the messages of a response start with.
    response = "http.response"

    def _start_response(self, status: str, headers: list[tuple[str, str]], *_: Any) -> None:
        self._start = {
            "type": f"{self.response}.start",
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
        self.request("send", {"type": f"{self.response}.body", "body": chunk, "more_body": more})


#: Key in a scope of the exchange that it belongs to. Middleware passes a scope's keys on.
EXCHANGE = "belay.exchange"
#: Key in a request's environment of what the middleware has added to its scope, such as `user`,
#: `auth`, `session` and `state`.
ADDED_TO_SCOPE = "belay.added_to_scope"
_LINE_BREAK = re.compile(r"[\r\n\0]")
#: The keys of a scope that describe the request, and `app`, which every app sets itself.
_OF_REQUEST = {
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "server", "client", "extensions", "wsgi_environ", "subprotocols"),
    *("app", EXCHANGE),
}


def environ_of(scope: Message, environ: Environ) -> Environ:
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
        ADDED_TO_SCOPE: {key: scope[key] for key in scope if key not in _OF_REQUEST},
    }


def status_line(code: int) -> str:
    """Return the status string of a WSGI response (PEP 3333), such as `200 OK`."""
    try:
        return f"{code} {HTTPStatus(code).phrase}"
    except ValueError:
        return f"{code} Unknown"


def headers_of(message: Message) -> list[tuple[str, str]]:
    """Return the headers of an ASGI message as the pairs of strings that WSGI expects."""
    return [
        (name.decode("latin1"), value.decode("latin1").strip())
        for name, value in message.get("headers", ())
    ]


def has_line_break(headers: list[tuple[str, str]]) -> bool:
    """Return whether a header has a character that would end it, which web servers refuse."""
    return any(_LINE_BREAK.search(text) for header in headers for text in header)


_DETAILS = {
    403: "Forbidden",
    404: "Not Found",
    413: "The request body may have at most 64 MiB",
    422: "The request body could not be read",
    500: "Internal Server Error",
}


def error_response(start_response: Any, status: int) -> Iterator[bytes]:
    """Yield the body of an error in JSON. The response is started at the first iteration."""
    yield from json_response(start_response, status, _DETAILS[status], {})


def json_response(
    start_response: Any, status: int, detail: str, more_headers: dict[str, str]
) -> list[bytes]:
    """Start a response, and return its body: `{"detail": …}`."""
    body = orjson.dumps({"detail": detail})
    headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
    start_response(status_line(status), [*headers, *more_headers.items()])
    return [body]

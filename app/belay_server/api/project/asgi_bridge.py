"""Serve an ASGI app (FastAPI, Starlette) as a WSGI app.

a2wsgi translates each request. This module adds an event loop in a native thread (under gevent, two
greenlets cannot both have a running event loop, and a slow handler must not block other requests),
the app's lifespan, and what happens when a client disconnects: the request ends, `receive` returns
`http.disconnect`, a stream is cancelled. A handler without a response yet goes on, as with uvicorn.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import tempfile
import threading
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from functools import partial
from typing import Any

from a2wsgi.asgi import ASGIResponder, SyncEvent

from belay_server.api.http.client_socket import watch_socket
from belay_server.api.project.code_access import act_as_server
from belay_server.api.project.exchange import ADDED_TO_SCOPE
from belay_server.domain.errors import InvalidRequest
from belay_server.runtime.event_loop import loop_in_a_real_thread

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
AsgiApp = Callable[
    [Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

#: Limits of a chunked body, in bytes: in total, and of the part that is held in memory.
_LONGEST_IN_CHUNKS = 64 * 1024 * 1024
_IN_MEMORY = 1024 * 1024
_STEP = 64 * 1024
_LIFESPAN_SECONDS = 60.0
_CLOSE_SECONDS = 2.0
_DISCONNECTED = object()
#: Statuses of responses that have no body.
_WITHOUT_BODY = (204, 304)
_ASGI = {"version": "3.0", "spec_version": "2.5"}


class AsgiBridge:
    """A WSGI app around an ASGI app. It starts an event loop; `start` and `close` run the ASGI
    app's lifespan."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self._state: dict[str, Any] = {}
        self._loop = loop_in_a_real_thread()
        self._lifespan = _Lifespan(app, self._state)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop in which the app runs."""
        return self._loop

    @property
    def state(self) -> dict[str, Any]:
        """The state that the app's lifespan has yielded."""
        return self._state

    def start(self) -> None:
        """Run the app's startup. Raises RuntimeError with the app's message when it fails."""
        self._call(self._lifespan.start(), _LIFESPAN_SECONDS)

    def close(self) -> None:
        """Run the app's shutdown and stop the event loop. Call it before the process ends."""
        try:
            self._call(self._lifespan.stop(), _CLOSE_SECONDS)
        except Exception:
            log.exception("the project's app failed to shut down, stopping its event loop")
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, work: Any, seconds: float) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ.get("HTTP_TRANSFER_ENCODING") and not _measure_body(environ):
            start_response("413 Request Entity Too Large", [("Content-Type", "text/plain")])
            return [b"A chunked body may have at most 64 MiB"]
        app = partial(self._respond, environ.get(ADDED_TO_SCOPE) or {})
        return _Answer(_Responder(app, self._loop), environ, start_response)

    async def _respond(self, added: Mapping[str, Any], scope: Any, receive: Any, send: Any) -> None:
        """Respond to a request, whose scope gets the lifespan's state and what was `added`."""
        scope = {**scope, "state": dict(self._state), **added}

        async def send_headers_at_once(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.start" and is_stream(message):
                await send({"type": "http.response.body", "body": b"", "more_body": True})

        try:
            await self._app(scope, receive, send_headers_at_once)
        except (SystemExit, KeyboardInterrupt) as error:  # they would end the web process
            raise RuntimeError(f"the project's app raised {type(error).__name__}") from error


def is_stream(start: Message) -> bool:
    """Return whether a response has a body without a length, so that its first part may come much
    later than its headers."""
    return start["status"] not in _WITHOUT_BODY and all(
        name.lower() != b"content-length" for name, _ in start.get("headers", ())
    )


def is_text(path_info: str) -> bool:
    """Return whether a path is UTF-8. WSGI passes each of its bytes as a character."""
    if path_info.isascii():
        return True
    try:
        path_info.encode("latin1").decode()
    except UnicodeDecodeError:
        return False
    return True


def _measure_body(environ: dict[str, Any]) -> bool:
    """Read a chunked body into a file and set CONTENT_LENGTH, without which a2wsgi would pass an
    empty body on. Return False when the body is too long. Raises InvalidRequest."""
    body = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  (the app reads it)
    length = 0
    while chunk := _read(environ["wsgi.input"]):
        length += len(chunk)
        if length > _LONGEST_IN_CHUNKS:
            body.close()
            return False
        body.write(chunk)
    body.seek(0)
    del environ["HTTP_TRANSFER_ENCODING"]
    environ["CONTENT_LENGTH"] = str(length)
    environ["wsgi.input"] = body
    return True


class _WholeBody:
    """A body that raises InvalidRequest where it ends early. a2wsgi would read an empty string
    again and again."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, size: int) -> bytes:
        if data := _read(self._body, size):
            return data
        raise InvalidRequest("The request body ended early")


def _read(body: Any, size: int = _STEP) -> bytes:
    try:
        chunk: bytes = body.read(size)
    except Exception as error:  # the web server's, for invalid chunks or a lost connection
        raise InvalidRequest("The request body could not be read") from error
    return chunk


class _Messages(SyncEvent):
    """The app's messages for the request's greenlet, one at a time."""

    def __init__(self) -> None:
        self._arrived = threading.Event()
        self._message: Any = None
        self.is_disconnected = False
        self.has_started = False
        #: Whether the response is complete. What the app does then is work in the background.
        self.has_ended = False
        self._has_failed = False

    def set(self, message: Any) -> None:
        self._message = message
        self._arrived.set()

    def disconnect(self) -> None:
        """Have `wait` raise an error: the client has disconnected."""
        self.is_disconnected = True
        self._arrived.set()

    def fail(self) -> None:
        """Have `wait` return an error: nothing more of the response will come."""
        error = RuntimeError("the project's app returned without a complete response")
        self.set({"type": "a2wsgi.error", "exception": (RuntimeError, error, None)})

    def refuse_incomplete(self) -> None:
        """Raise an error if the response has started and not ended. a2wsgi may stop before it gets
        the message of `fail`."""
        if self.has_started and not self.has_ended and not self._has_failed:
            raise RuntimeError("the project's app returned without a complete response")

    def wait(self) -> Any:
        self._arrived.wait()
        self._arrived.clear()
        if self.is_disconnected:
            raise (
                _reset_error()
                if self.has_started
                else InvalidRequest("The client has disconnected")
            )
        message, self._message = self._message, None
        kind = message["type"]
        self.has_started = self.has_started or kind == "http.response.start"
        self.has_ended = kind == "http.response.body" and not message.get("more_body", False)
        self._has_failed = kind == "a2wsgi.error"
        return message


def _reset_error() -> OSError:
    """Return the error that web servers expect where a client has disconnected."""
    return ConnectionResetError(errno.ECONNRESET, "the client has disconnected")


class _Responder(ASGIResponder):
    """An a2wsgi responder that can end the request's task, and logs the task's error."""

    task: asyncio.Task[None] | None = None

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(app, loop)
        self.sync_event: _Messages = _Messages()
        #: Done when the client has disconnected.
        self._disconnected: asyncio.Future[None] = loop.create_future()

    async def start_asgi_app(self, environ: Any) -> asyncio.Task[None]:
        self.task = await super().start_asgi_app(environ)
        return self.task

    def asgi_done_callback(self, future: asyncio.Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and self.is_disconnected:
            log.debug("the project's app ended without its client: %r", error)
        elif error is not None:
            log.error("unexpected error in the project's app", exc_info=error)
        elif not (future.cancelled() or self.sync_event.has_ended or self.is_disconnected):
            log.error("the project's app returned without a complete response")
            self.sync_event.fail()
        super().asgi_done_callback(future)

    async def asgi_receive(self) -> Any:
        received = await self._until_disconnect(super().asgi_receive())
        return {"type": "http.disconnect"} if received is _DISCONNECTED else received

    async def asgi_send(self, message: Any) -> None:
        """Send a message. Without a client nothing is sent; a stream raises OSError."""
        sent = await self._until_disconnect(super().asgi_send(message))
        if sent is _DISCONNECTED and message.get("more_body"):
            raise _reset_error()

    async def _until_disconnect(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of `work`, or `_DISCONNECTED` if the client disconnects before that."""
        if self._disconnected.done():
            work.close()
            return _DISCONNECTED
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait((working, self._disconnected), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else _DISCONNECTED
        finally:
            working.cancel()

    @property
    def is_disconnected(self) -> bool:
        return self.sync_event.is_disconnected

    def on_disconnect(self) -> None:
        """End the request, and a stream. Called once, when the client has disconnected."""
        self.sync_event.disconnect()
        self.loop.call_soon_threadsafe(self._disconnected.set_result, None)
        if self.sync_event.has_started:
            self.cancel_unread()

    def cancel_unread(self) -> None:
        """Cancel the task of a response that nobody reads. Work after a complete response goes
        on."""
        if self.sync_event.has_ended:
            self.send_event.set(None)
        elif self.task is not None:
            self.loop.call_soon_threadsafe(self.task.cancel)


class _Answer:
    """The chunks of a response body. The server also closes it when the connection is lost."""

    def __init__(self, responder: _Responder, environ: Any, start_response: Any) -> None:
        self._responder = responder
        self._stop_watching: Callable[[], object] = lambda: None
        if (client := environ.get("gunicorn.socket")) is not None:
            self._stop_watching = watch_socket(client, responder.on_disconnect)
        environ["wsgi.input"] = _WholeBody(environ["wsgi.input"])
        self._chunks: Any = responder(environ, start_response)

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._chunks
            self._responder.sync_event.refuse_incomplete()
        except BaseException:
            self._stop_watching()
            if not self._responder.is_disconnected:
                # Before the response has started, the WSGI server does not call `close`.
                self._responder.cancel_unread()
            raise

    def close(self) -> None:
        self._stop_watching()
        self._chunks.close()
        self._responder.cancel_unread()


class _Lifespan:
    """Runs the app's startup and shutdown in one task, as ASGI's lifespan protocol requires."""

    def __init__(self, app: AsgiApp, state: dict[str, Any]) -> None:
        self._app = app
        self._state = state
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())
        answer = await self._ask("lifespan.startup")
        if answer["type"] == "lifespan.startup.failed":
            raise RuntimeError(answer.get("message") or "its startup failed")

    async def stop(self) -> None:
        if self._task is not None and not self._task.done():
            await self._ask("lifespan.shutdown")

    async def _ask(self, kind: str) -> Message:
        await self._events.put({"type": kind})
        return await self._answers.get()

    async def _run(self) -> None:
        act_as_server()
        scope = {"type": "lifespan", "asgi": _ASGI, "state": self._state}
        try:
            await self._app(scope, self._events.get, self._answers.put)
        except Exception as error:  # noqa: BLE001  (an app without a lifespan raises any error)
            log.debug("the project's app has no lifespan: %s", error)
        await self._answers.put({"type": "the end"})

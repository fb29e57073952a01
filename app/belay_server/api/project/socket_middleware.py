"""Let a WebSocket of Belay's pass through the middleware of the project's app.

The request's greenlet answers the handshake when the middleware accepts it, and sends what the
middleware sends. A second greenlet reads from the client, one message whenever the middleware asks
for it. Belay's view gets a `MiddlewareSocket` in place of the web server's socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import gevent
from a2wsgi.asgi import build_scope
from gevent.event import AsyncResult
from gevent.queue import SimpleQueue
from simple_websocket import ConnectionClosed
from wsproto.utilities import RemoteProtocolError

from belay_server.api.http.web_socket import BoundedServer, handshake_refusal
from belay_server.api.project.exchange import (
    BelayGreenlet,
    Environ,
    Exchange,
    Message,
    Receive,
    Send,
    WsgiApp,
    environ_of,
    error_response,
    headers_of,
    json_response,
    status_line,
)

#: Key in a request's environment of a function that accepts its WebSocket and returns it, where
#: that goes through middleware.
ACCEPT = "belay.accept_socket"
_GONE = (ConnectionClosed, OSError)
#: Close codes of RFC 6455, section 7.4.1: no code was given; an error of the server.
_NO_CODE, _SERVER_ERROR = 1005, 1011


def socket_scope(environ: Environ) -> Message:
    """Return the ASGI scope of a request that opens a WebSocket."""
    scope: Message = {**build_scope(environ)}  # type: ignore[arg-type]
    scope.pop("method")
    offered = environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", "")
    return {
        **scope,
        "type": "websocket",
        "scheme": "wss" if scope["scheme"] == "https" else "ws",
        "subprotocols": [word.strip() for word in offered.split(",") if word.strip()],
        "extensions": {"websocket.http.response": {}},
    }


class SocketExchange(Exchange):
    """One WebSocket, or the refusal to open it."""

    def __init__(self, app: WsgiApp, environ: Environ, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(app, environ, loop)
        self._server: BoundedServer | None = None
        #: The middleware's requests for the next message of the client.
        self._wanted: SimpleQueue[asyncio.Future[Any]] = SimpleQueue()
        self._is_connected = False
        #: The message that Belay waits for.
        self._receiving: asyncio.Future[Message] | None = None
        #: The response of a refusal.
        self._start: Message | None = None
        self._body = b""

    # -- in the request's greenlet ------------------------------------------------------------

    def respond(self, start_response: Any) -> Iterable[bytes]:
        """Pass messages on until the middleware has ended. Return the response of a refusal.

        Raises StopIteration when the socket was used, which gunicorn accepts as the end of the
        response.
        """
        reader = gevent.spawn(self._read)
        kind = "failed"
        try:
            while True:
                kind, message, taken = self._messages.get()
                if kind != "send":
                    break
                if (refusal := self._take(message, start_response)) is not None:
                    return refusal
                self._answer(taken, None)
        finally:
            reader.kill(block=False)
            self._end_task()
            self._close(_SERVER_ERROR if kind == "failed" else None, None)
        if self._server is not None:
            raise StopIteration
        if self._start is None:
            return list(error_response(start_response, 500 if kind == "failed" else 403))
        start_response(status_line(self._start["status"]), headers_of(self._start))
        return [self._body]

    def _take(self, message: Message, start_response: Any) -> list[bytes] | None:
        """Carry out a message of the middleware. Return a response to an invalid handshake. Raises
        StopIteration when the client has disconnected."""
        kind = message["type"]
        if kind == "websocket.accept":
            try:
                self._server = BoundedServer(self._environ)
            except RemoteProtocolError as error:
                return json_response(start_response, *handshake_refusal(self._environ, error))
            except OSError as error:  # the client has disconnected; there is no response
                raise StopIteration from error
        elif kind == "websocket.send" and self._server is not None:
            data = message.get("text")
            with suppress(*_GONE):  # the reader reports it
                self._server.send(message["bytes"] if data is None else data)
        elif kind == "websocket.close":
            self._close(message.get("code"), message.get("reason"))
        elif kind == "websocket.http.response.start":
            self._start = message
        elif kind == "websocket.http.response.body":
            self._body += message.get("body") or b""
        return None

    def _close(self, code: int | None, reason: str | None) -> None:
        if self._server is not None and self._server.connected:
            with suppress(*_GONE):
                self._server.close(code, reason)

    def _read(self) -> None:
        """Read a message of the client for each request of the middleware for one."""
        while True:
            taken = self._wanted.get()
            self._answer(taken, self._next_message())

    def _next_message(self) -> Message:
        server = self._server
        data, code = None, _NO_CODE
        if server is not None:
            try:
                data = server.receive()
            except ConnectionClosed as closed:
                code = int(closed.reason or _NO_CODE)
            except OSError:
                code = _NO_CODE
        if data is None:
            return {"type": "websocket.disconnect", "code": code}
        is_text = isinstance(data, str)
        return {"type": "websocket.receive", "text" if is_text else "bytes": data}

    # -- in the event loop --------------------------------------------------------------------

    async def receive(self) -> Message:
        """Return the next message of the client. The first one is its request to connect."""
        if not self._is_connected:
            self._is_connected = True
            return {"type": "websocket.connect"}
        taken = self._loop.create_future()
        self._in_hub(self._wanted.put, taken)
        message: Message = await taken
        return message

    async def send(self, message: Message) -> None:
        await self._request("send", message)

    async def answer_by_belay(self, scope: Message, receive: Receive, send: Send) -> None:
        environ = environ_of({**scope, "method": "GET"}, self._environ)
        belay = _BelaySocket(self._app, self._loop)
        environ[ACCEPT] = belay.accept
        try:
            await self._relay(belay, environ, receive, send)
        finally:
            if self._receiving is not None:
                self._receiving.cancel()

    async def _receive_for(self, taken: AsyncResult, receive: Receive) -> None:
        """Give Belay the next message when there is one. It may send some until then."""
        self._receiving = asyncio.ensure_future(receive())
        self._receiving.add_done_callback(_passed_on(self._in_hub, taken))


def _passed_on(
    in_hub: Callable[..., None], taken: AsyncResult
) -> Callable[[asyncio.Future[Message]], None]:
    """Return a callback that gives a message to a greenlet, or a disconnect if there is none."""

    def pass_on(received: asyncio.Future[Message]) -> None:
        failed = received.cancelled() or received.exception() is not None
        message = {"type": "websocket.disconnect"} if failed else received.result()
        in_hub(taken.set, message)

    return pass_on


class _BelaySocket(BelayGreenlet):
    """Answers a request that opens a WebSocket. A response is a refusal."""

    response = "websocket.http.response"

    def accept(self) -> MiddlewareSocket:
        self.request("receive")  # the request to connect
        self.request("send", {"type": "websocket.accept"})
        return MiddlewareSocket(self)

    def _respond(self, environ: Environ) -> None:
        # A view that has used the socket raises it, as there is no response to send.
        with suppress(StopIteration):
            super()._respond(environ)


class MiddlewareSocket:
    """A WebSocket behind middleware. It has those methods of a `BoundedServer` that Belay uses."""

    def __init__(self, belay: _BelaySocket) -> None:
        self._belay = belay
        self._is_closed = False

    def receive(self) -> str | bytes | None:
        """Return the next message; None when the socket is closed."""
        message = self._belay.request("receive")
        if message["type"] != "websocket.receive":
            self._is_closed = True
            return None
        data: str | bytes | None = message.get("text")
        return bytes(message["bytes"]) if data is None else data

    def send(self, text: str) -> None:
        if self._is_closed:
            raise BrokenPipeError("the socket is closed")
        self._belay.request("send", {"type": "websocket.send", "text": text})

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._belay.request("send", {"type": "websocket.close", "code": 1000})

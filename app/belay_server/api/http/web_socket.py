"""A WebSocket server with limits, based on simple-websocket.

A client may send anything, and may not read. So messages are not compressed (a kilobyte of deflate
may be a megabyte of text), have a size limit, and are read one at a time. While a message waits or
is being processed, nothing is read from the socket, and TCP applies backpressure to the client.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from simple_websocket import Server
from wsproto.utilities import RemoteProtocolError

from belay_server.runtime.turns import wait_for_turn

#: The size limit of a message, in bytes. Larger commands can be sent by HTTP.
MOST_BYTES = 1024 * 1024
#: The interval of pings. A ping without a pong detects a client that does not read.
_PING_SECONDS = 25
#: The most bytes that are received at once. A frame may have two bytes, and takes 20 µs.
_MOST_AT_ONCE = 512
#: How often a paused reader checks whether the socket has been closed.
_CHECK_SECONDS = 1.0


#: The only version of the WebSocket protocol.
_VERSION = "13"


def handshake_refusal(
    environ: Mapping[str, Any], error: Exception
) -> tuple[int, str, dict[str, str]]:
    """Return the status, the detail and the headers of the response to a handshake that is invalid
    according to RFC 6455. The header is from section 4.4."""
    is_other_version = environ.get("HTTP_SEC_WEBSOCKET_VERSION") != _VERSION
    detail = f"The WebSocket handshake is not valid: {error}"
    return 426 if is_other_version else 400, detail, {"Sec-WebSocket-Version": _VERSION}


class _Socket:
    """A socket whose `send` sends all data, as simple-websocket expects, and whose `recv` waits.

    Messages and pings are sent by different threads, and gevent allows only one at a time.
    """

    def __init__(self, wrapped: Any, until_calm: Callable[[], None]) -> None:
        self._wrapped = wrapped
        self._until_calm = until_calm
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        """Send all data. Raises OSError when the client does not read the previous data."""
        if not self._sending.acquire(timeout=_PING_SECONDS):
            raise BrokenPipeError("the client does not read")
        try:
            self._wrapped.sendall(data)
        finally:
            self._sending.release()

    def recv(self, size: int) -> bytes:
        self._until_calm()
        received: bytes = self._wrapped.recv(min(size, _MOST_AT_ONCE))
        wait_for_turn()  # the caller parses the frames now
        return received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class BoundedServer(Server):
    """A WebSocket server that reads one message at a time. The next call of `receive` means that
    the previous message has been processed."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        """Accept the connection of a request. Raises RemoteProtocolError for an invalid handshake,
        and OSError if the client has disconnected."""
        self._calm = threading.Condition()
        self._answering = False
        offered = {**environ, "gunicorn.socket": _Socket(environ["gunicorn.socket"], self._wait)}
        # Without an offered extension, compression is not negotiated.
        offered.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)
        try:
            super().__init__(offered, ping_interval=_PING_SECONDS, max_message_size=MOST_BYTES)
        except UnicodeDecodeError as error:
            raise RemoteProtocolError("a header is not ASCII") from error

    def receive(self, timeout: float | None = None) -> str | bytes | None:
        with self._calm:
            self._answering = False
            self._calm.notify_all()
        message: str | bytes | None = super().receive(timeout)
        self._answering = True
        return message

    def _wait(self) -> None:
        """Pause the reader while a message waits or is being processed."""
        with self._calm:
            while self.connected and (self.input_buffer or self._answering):
                self._calm.wait(_CHECK_SECONDS)

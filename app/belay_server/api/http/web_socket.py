"""A WebSocket of ours: simple-websocket's server within bounds.

A client may send what it likes, and need not read. So messages are not compressed (a kilobyte of
deflate is a megabyte of text), have a largest size, and are read one at a time: while one waits or
is being answered nothing more is taken from the socket, and TCP holds the client up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from simple_websocket import Server

#: Of one message, in bytes. A command with more input than that is sent by HTTP.
MOST_BYTES = 1024 * 1024
#: A socket that nobody reads is found out by a ping without an answer.
_PING_SECONDS = 25
#: How often a reader that is held up looks whether the socket has been closed.
_LOOK_SECONDS = 1.0


class _Socket:
    """Sends everything, as simple-websocket takes it to do, and receives when it may.

    Messages and pings come from different threads, and gevent allows one at a time to send.
    """

    def __init__(self, wrapped: Any, until_calm: Callable[[], None]) -> None:
        self._wrapped = wrapped
        self._until_calm = until_calm
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError when the client does not read what is sent before."""
        if not self._sending.acquire(timeout=_PING_SECONDS):
            raise BrokenPipeError("the client does not read")
        try:
            self._wrapped.sendall(data)
        finally:
            self._sending.release()

    def recv(self, size: int) -> bytes:
        self._until_calm()
        received: bytes = self._wrapped.recv(size)
        return received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class BoundedServer(Server):
    """`receive` gives one message, and says with its next call that it has been answered."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._calm = threading.Condition()
        self._answering = False
        offered = {**environ, "gunicorn.socket": _Socket(environ["gunicorn.socket"], self._wait)}
        # An extension that was not offered is not agreed to.
        offered.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)
        super().__init__(offered, ping_interval=_PING_SECONDS, max_message_size=MOST_BYTES)

    def receive(self, timeout: float | None = None) -> str | bytes | None:
        with self._calm:
            self._answering = False
            self._calm.notify_all()
        message: str | bytes | None = super().receive(timeout)
        self._answering = True
        return message

    def _wait(self) -> None:
        """Hold the reader up while a message waits or is being answered."""
        with self._calm:
            while self.connected and (self.input_buffer or self._answering):
                self._calm.wait(_LOOK_SECONDS)

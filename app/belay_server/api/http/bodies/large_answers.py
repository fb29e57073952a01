"""Limit the memory of large responses that are being sent.

A response is held in memory until its client has read it, which may be never. All responses
together may use `BELAY_MAX_ANSWERS_BYTES`, and those of one caller half of that. The kernel closes
the connection of a client that reads nothing for too long.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from flask import Request, Response, current_app

from belay_server.api.http.bodies.chunks import in_chunks
from belay_server.domain.errors import TooMany
from belay_server.runtime.shares import Shares

#: Smaller responses are not counted. Most of them fit into a socket's buffers.
_COUNTED = 1024 * 1024
LARGE_ANSWERS = "belay.large_answers"


def large_answers() -> LargeAnswers:
    """Return the LargeAnswers of this web process."""
    found: LargeAnswers = current_app.extensions[LARGE_ANSWERS]
    return found


class LargeAnswers:
    """Counts the large responses of one web process."""

    def __init__(
        self, most: int, largest: int, *, seconds: float, whose: Callable[[], str]
    ) -> None:
        """`most` limits all responses together and `largest` one response, in bytes. `seconds` is
        how long a client may read nothing. `whose` returns the caller of the current request."""
        self._shares = Shares(most, largest)
        self._whose = whose
        self._milliseconds = int(seconds * 1000)

    def hold(self, request: Request, response: Response) -> None:
        """Count a response until it has been sent. Raises TooMany."""
        size = 0 if response.is_streamed else response.calculate_content_length() or 0
        if size <= _COUNTED:
            return
        caller, size = self._whose(), min(size, self._shares.share)
        if not self._shares.hold(caller, size):
            # The exception's traceback keeps the response, until the next garbage collection.
            response.response = []
            raise TooMany("Too many large responses at once; read the others first, then retry")
        response.call_on_close(partial(self._shares.release, caller, size))
        body = response.get_data()
        response.response = in_chunks(body)
        response.headers["Content-Length"] = str(len(body))
        client_socket = request.environ.get("gunicorn.socket")
        if client_socket is not None:
            _set_send_timeout(client_socket, self._milliseconds)
            response.call_on_close(partial(_set_send_timeout, client_socket, 0))

    def share_of(self, request: Request) -> StreamShare:
        """Return the share of a response that is streamed."""
        client_socket = request.environ.get("gunicorn.socket")
        return StreamShare(self._shares, self._whose(), client_socket, self._milliseconds)


class StreamShare:
    """Counts the large parts of one streamed response, each while it is read and sent."""

    __slots__ = ("_held", "_milliseconds", "_shares", "_socket", "caller")

    def __init__(self, shares: Shares, caller: str, client_socket: Any, milliseconds: int) -> None:
        self._shares = shares
        self.caller = caller
        self._socket = client_socket
        self._milliseconds = milliseconds
        self._held = 0

    def hold(self, size: int, *, seconds: float) -> bool:
        """Reserve `size` bytes. Wait up to `seconds` for other responses to be sent; return False
        on timeout."""
        if size <= _COUNTED:
            return True
        size = min(size, self._shares.share)
        if not self._shares.hold(self.caller, size, seconds=seconds):
            return False
        self._held += size
        if self._socket is not None:
            _set_send_timeout(self._socket, self._milliseconds)
        return True

    def shrink(self, size: int) -> None:
        """Release what is held beyond `size` bytes."""
        if size < self._held:
            self._shares.release(self.caller, self._held - size)
            self._held = size

    def release(self) -> None:
        """Release everything, when it has been sent."""
        if self._held:
            self.shrink(0)
            if self._socket is not None:
                _set_send_timeout(self._socket, 0)


def _set_send_timeout(client_socket: Any, milliseconds: int) -> None:
    """Set how long sent data may stay unacknowledged or unread; 0 sets the system's default. A
    closed socket is ignored."""
    with suppress(OSError):
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

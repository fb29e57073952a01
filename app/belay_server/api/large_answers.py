"""Bounds the memory of large responses that are being sent.

A response is held in memory until its client has read it, which may be never. All of them together
may have `BELAY_MAX_ANSWERS_BYTES`, and those of one caller half of that. The kernel closes the
connection of a client that reads nothing for too long.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from flask import Request, Response

from belay_server.api.byte_shares import ByteShares
from belay_server.domain.errors import TooMany

#: Smaller answers are not counted; most of them fit into the buffers of a socket.
_COUNTED = 1024 * 1024


class LargeAnswers:
    """Counts the large responses of one web process."""

    def __init__(
        self, most: int, largest: int, *, seconds: float, whose: Callable[[], str]
    ) -> None:
        """`most` and `largest` are in bytes, of all responses and of one. A client may read nothing
        for `seconds`. `whose` returns the caller of the current request."""
        self._shares = ByteShares(most, largest)
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
            raise TooMany("You have not read your other large answers; read them, then ask again")
        response.call_on_close(partial(self._shares.release, caller, size))
        client_socket = request.environ.get("gunicorn.socket")
        if client_socket is not None:
            _set_patience(client_socket, self._milliseconds)
            response.call_on_close(partial(_set_patience, client_socket, 0))


def _set_patience(client_socket: Any, milliseconds: int) -> None:
    """Set how long sent data may stay unacknowledged or unread; 0 is the system's default. A socket
    that has been closed meanwhile is ignored."""
    with suppress(OSError):
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

"""Bounds what large answers cost a web process while their clients read them.

An answer is held in memory until the client has read it, which may be never. So all that are on
their way have so many bytes together, one caller's at most half of them; and a client that reads
nothing of one for too long is disconnected by the kernel.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from typing import Any

from flask import Request, Response

from belay_server.api.byte_shares import ByteShares
from belay_server.domain.errors import TooMany

#: Smaller answers are not counted; most of them fit into the buffers of a socket.
_COUNTED = 1024 * 1024


class LargeAnswers:
    """Of one web process. `most` and `largest` are in bytes, of all answers and of one."""

    def __init__(self, most: int, largest: int, *, seconds: float) -> None:
        self._shares = ByteShares(most, largest)
        #: How long a client may read nothing of one.
        self._milliseconds = int(seconds * 1000)

    def hold(self, request: Request, response: Response, caller: str) -> None:
        """Count an answer until it is sent. Raises TooMany."""
        size = 0 if response.is_streamed else response.calculate_content_length() or 0
        if size <= _COUNTED:
            return
        size = min(size, self._shares.share)
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
    """How long what was sent may stay unread; 0: as long as the system's default."""
    with suppress(OSError):
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

"""Detect that a client has disconnected during a request that sends nothing."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

#: Key in a request's environment of a function that returns whether the client had left when the
#: web server closed the socket. Only behind middleware of the project.
CLIENT_LEFT = "belay.client_left"
#: libev's flag for a socket that can be read.
_READABLE = 1
#: Seconds between two checks of a socket with unread data, which hides the end of the stream.
_CHECK_SECONDS = 2.0
#: The states of a TCP connection whose other side has closed it (`tcp_states.h`).
_CLOSED_STATES = (7, 8)


def watch_socket(client_socket: Any, on_disconnect: Callable[[], None]) -> Callable[[], bool]:
    """Call `on_disconnect` once, in gevent's hub, when the client closes the connection. Return a
    function that ends the watch and returns whether the client has closed it.

    When it does, the socket becomes readable without data. Waiting for a write to fail would take
    until the second write, and a response that is not written to would wait for ever.
    """
    # Only gunicorn's gevent worker provides this socket.
    import gevent  # noqa: PLC0415

    # A watcher of the event loop takes a tenth of the memory of a waiting greenlet.
    loop = gevent.get_hub().loop
    watchers = [loop.io(client_socket.fileno(), _READABLE)]

    def stop_watchers() -> None:
        for watcher in watchers:
            watcher.stop()
            watcher.close()
        watchers.clear()

    def look() -> None:
        if has_disconnected(client_socket):
            stop_watchers()
            on_disconnect()
        elif len(watchers) == 1:  # the body, or a next request
            watchers[0].stop()
            watchers.append(loop.timer(_CHECK_SECONDS, _CHECK_SECONDS))
            watchers[1].start(look)

    watchers[0].start(look)

    def stop() -> bool:
        stop_watchers()
        return has_disconnected(client_socket)

    return stop


def has_disconnected(client_socket: Any) -> bool:
    """Return whether the client has closed the connection."""
    try:
        # The underlying socket of gevent's, so that the call does not wait.
        below = client_socket._sock
        if below.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
            return True
        return _is_closed_behind_data(below)
    except ConnectionError:
        return True
    except (BlockingIOError, InterruptedError):
        return False
    except (OSError, ValueError):
        return False  # the server has closed the socket, because it is shutting down


def _is_closed_behind_data(below: socket.socket) -> bool:
    if sys.platform != "linux" or below.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return below.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _CLOSED_STATES

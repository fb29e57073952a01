"""Read large request bodies, and discard those that the application has not read, without blocking
other requests.

A request may be refused because of its headers. Its body must still be read, or the client would
get a connection reset instead of the response. gunicorn reads it a kilobyte at a time, from a
buffer that it copies each time: 30 MB block all other requests for nine seconds. So it is read
here, in large steps, yielding to other requests, and up to a limit; then the connection is closed.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from io import BytesIO
from typing import Any

from flask import Request
from gunicorn.http.errors import ParseException

from belay_server.runtime.turns import wait_for_turn

#: Smaller bodies are left to the web server.
_SMALL = 64 * 1024
_STEP = 1024 * 1024
#: The most bytes of a body that are discarded, and the time limit for it.
_MOST = 64 * 1024 * 1024
_SECONDS = 5.0
#: The value of SO_LINGER for which closing the socket does not wait.
_RESET = struct.pack("ii", 1, 0)


#: Chunks of a body that are parsed before yielding to other requests. Each takes 10 to 100 µs.
_CHUNKS_AT_ONCE = 64
#: A body of more chunks than this is refused if they have fewer bytes each, on average.
_MOST_SMALL_CHUNKS = 16_384
_SMALL_CHUNK = 16


class _BufferedBody:
    """A request body that is received from gunicorn in large steps, into a buffer.

    gunicorn copies its own buffer, of up to a megabyte, at each read, and Werkzeug reads 64 KiB at
    a time.
    """

    def __init__(self, body: Any) -> None:
        self._of_gunicorn = body
        self._buffer = bytearray()

    @property
    def failed(self) -> bool:
        """Whether the end of the body is unknown, so that gunicorn must close the connection. It
        would otherwise take what follows for the next request."""
        return bool(getattr(self._of_gunicorn, "failed", False))

    @failed.setter
    def failed(self, value: bool) -> None:
        if self._of_gunicorn is not None:
            self._of_gunicorn.failed = value

    def _receive(self) -> bool:
        """Add what comes next to the buffer. Return False at the end of the body."""
        raise NotImplementedError

    def read(self, size: int = -1) -> bytes:
        while (size < 0 or len(self._buffer) < size) and self._receive():
            pass
        return self._take(len(self._buffer) if size < 0 else size)

    def readline(self, size: int = -1) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if 0 <= size <= searched or not self._receive():
                end = searched
                break
        return self._take(end + 1 if size < 0 else min(end + 1, size))

    def _take(self, size: int) -> bytes:
        with memoryview(self._buffer) as view, view[:size] as part:
            data = bytes(part)
        del self._buffer[:size]
        return data


class _SizedBody(_BufferedBody):
    """A body with a Content-Length."""

    def __init__(self, body: Any, length: int) -> None:
        super().__init__(body)
        self._left = length

    def _receive(self) -> bool:
        data = self._of_gunicorn.read(min(self._left, _STEP)) if self._left > 0 else b""
        self._left -= len(data)
        self._buffer += data
        if data and self._left > 0:
            wait_for_turn()  # the data of a fast client is there without waiting
        return bool(data)


class _Chunks(_BufferedBody):
    """A body in chunked encoding, read from gunicorn's parser.

    gunicorn's own `read` parses chunks without yielding.
    """

    def __init__(self, parser: Iterator[bytes], body: Any = None) -> None:
        """Read from `parser`, the one of gunicorn's `body`."""
        super().__init__(body)
        self._parser = parser
        self._count = 0
        self._size = 0

    def _receive(self) -> bool:
        """Parse one more chunk. Raises ValueError for invalid encoding, also from `read` and
        `readline`."""
        try:
            chunk = next(self._parser, None)
        except ParseException as error:
            self.failed = True
            raise ValueError("invalid chunked encoding") from error
        except BaseException:
            self.failed = True
            raise
        if chunk is None:
            return False
        self._buffer += chunk
        self._count += 1
        self._size += len(chunk)
        if self._count > _MOST_SMALL_CHUNKS and self._size < self._count * _SMALL_CHUNK:
            self.failed = True
            raise ValueError("the chunks are too small")
        if self._count % _CHUNKS_AT_ONCE == 0:
            wait_for_turn()
        return True


class CountedBody:
    """A request's body that counts how much of it has been read."""

    def __init__(self, body: Any, length: int | None) -> None:
        self._body = body
        self._left = length
        self._ended = False

    @property
    def failed(self) -> bool:
        """Whether the end of the body is unknown, so that gunicorn must close the connection."""
        return bool(self._body.failed)

    @failed.setter
    def failed(self, value: bool) -> None:
        self._body.failed = value

    def read(self, size: int = -1) -> bytes:
        return self._count(self._body.read(size), size)

    def readline(self, size: int = -1) -> bytes:
        return self._count(self._body.readline(size), size)

    def __iter__(self) -> CountedBody:
        return self

    def __next__(self) -> bytes:
        if line := self.readline():
            return line
        raise StopIteration

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    def _count(self, data: bytes, size: int) -> bytes:
        if self._left is not None:
            self._left -= len(data)
        self._ended = self._ended or self._left == 0 or (not data and size != 0)
        return data

    def discard(self, client_socket: Any) -> None:
        """Read the rest of the body. Close the connection when that is too much or too slow, and
        when the end of the body is unknown."""
        if self._ended and not self._body.failed:
            return
        with _Deadline(_SECONDS), suppress(OSError, EOFError, ValueError):
            for _ in range(_MOST // _STEP):
                if self._body.failed:
                    break
                if self._ended:
                    return
                self.read(_STEP)
                wait_for_turn()
        if self._body.failed:
            _linger(client_socket)
        elif _is_sending(client_socket):
            # Reset the connection: the client would otherwise wait for the window to open.
            with suppress(OSError):
                client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client_socket.shutdown(socket.SHUT_RD)
        # gunicorn then closes the connection, and reads no more of it.
        self._body.failed = True


def _linger(client_socket: Any) -> None:
    """Send the end of the stream, and discard what the client has sent: closing a socket with
    unread data resets the connection, which may destroy the response."""
    with _Deadline(_SECONDS), suppress(OSError, ValueError):
        client_socket.shutdown(socket.SHUT_WR)
        for _ in range(_MOST // _SMALL):
            if not client_socket.recv(_SMALL):
                return


def _is_sending(client_socket: Any) -> bool:
    """Return whether the socket has unread data."""
    # The underlying socket of gevent's, so that the call does not wait.
    below = getattr(client_socket, "_sock", client_socket)
    try:
        return bool(below.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


class _Deadline:
    """A context manager that ends its block after `seconds` under gevent; otherwise it does
    nothing."""

    def __init__(self, seconds: float) -> None:
        self._timeout: Any = None
        if "gevent.monkey" in sys.modules:
            import gevent  # noqa: PLC0415

            self._timeout = gevent.Timeout(seconds, False)

    def __enter__(self) -> _Deadline:
        if self._timeout is not None:
            self._timeout.start()
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> bool:
        if self._timeout is None:
            return False
        self._timeout.close()
        return error is self._timeout


def count_body(environ: MutableMapping[str, Any]) -> CountedBody | None:
    """Wrap a large request body to count what is read of it. Return None for a small one, and for
    one that another greenlet discards. A body that is wrapped already is returned as it is."""
    given = environ["wsgi.input"]
    if isinstance(given, CountedBody) or getattr(given, "is_discarded_elsewhere", False):
        return given if isinstance(given, CountedBody) else None
    if environ.get("HTTP_TRANSFER_ENCODING"):
        length = None
    else:
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
        except ValueError:
            return None
        if length <= _SMALL:
            return None
    body = environ["wsgi.input"]
    if length is not None:
        body = _SizedBody(body, length)
    elif parser := getattr(getattr(body, "reader", None), "parser", None):
        body = _Chunks(parser, body)
    counted = CountedBody(body, length)
    environ["wsgi.input"] = counted
    return counted


class _Kept(BytesIO):
    """A body that has been read, to be read again."""

    failed = False


def keep_body(request: Request, environ: MutableMapping[str, Any]) -> None:
    """Let another request on this environment read a body that this one has read already."""
    data = request.__dict__.get("_cached_data")
    if data is None:
        return
    environ["wsgi.input"] = _Kept(data)
    environ["CONTENT_LENGTH"] = str(len(data))
    environ.pop("HTTP_TRANSFER_ENCODING", None)

"""Gets rid of a large body that nobody has read, without holding up others.

A request may be refused by its headers. What it still sends has to be read, or the client would get
a reset instead of the answer; and the web server reads it a kilobyte at a time, from a buffer that
it copies each time: thirty megabytes stop all other requests for nine seconds. So it is done here,
in large steps, with turns for others, and only so far: then the connection is closed.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from typing import Any

#: Smaller bodies are left to the web server.
_SMALL = 64 * 1024
_STEP = 1024 * 1024
#: How much of a refused body is read for the sake of the answer, and for how long.
_MOST = 64 * 1024 * 1024
_SECONDS = 5.0
#: Closing does not wait.
_RESET = struct.pack("ii", 1, 0)


#: Chunks of a body that are parsed before yielding to other requests; each takes microseconds.
_CHUNKS_AT_ONCE = 256


class _Chunks:
    """A request body in chunked encoding, read from gunicorn's parser.

    gunicorn's own `read` parses chunks without yielding, and copies its whole buffer at each call.
    """

    def __init__(self, parser: Iterator[bytes]) -> None:
        self._parser = parser
        self._buffer = bytearray()
        self._count = 0

    def read(self, size: int = -1) -> bytes:
        while (size < 0 or len(self._buffer) < size) and self._parse():
            pass
        return self._take(len(self._buffer) if size < 0 else size)

    def readline(self, size: int = -1) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if 0 <= size <= searched or not self._parse():
                end = searched
                break
        return self._take(end + 1 if size < 0 else min(end + 1, size))

    def _parse(self) -> bool:
        """Parse one more chunk. Returns False at the end of the body."""
        chunk = next(self._parser, None)
        if chunk is None:
            return False
        self._buffer += chunk
        self._count += 1
        if self._count % _CHUNKS_AT_ONCE == 0:
            time.sleep(0)
        return True

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


class CountedBody:
    """A request's body that knows how much of it has been read."""

    def __init__(self, body: Any, length: int | None) -> None:
        self._body = body
        self._left = length
        self._ended = False

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
        """Read what is left, or close the connection where that is too much, or too slow."""
        if self._ended:
            return
        with _Deadline(_SECONDS), suppress(OSError, EOFError, ValueError):
            for _ in range(_MOST // _STEP):
                if self._ended:
                    return
                self.read(_STEP)
                time.sleep(0)
        if _is_sending(client_socket):
            # Reset: it would otherwise wait for a window that never opens.
            with suppress(OSError):
                client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client_socket.shutdown(socket.SHUT_RD)
        # gunicorn then closes the connection, and reads no more of it.
        self._body.failed = True


def _is_sending(client_socket: Any) -> bool:
    """Whether anything has come that nobody has read."""
    # Of the socket below gevent's, which is told not to wait.
    below = getattr(client_socket, "_sock", client_socket)
    try:
        return bool(below.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


class _Deadline:
    """Ends what is done within it after so long, where the web server's greenlets can be woken."""

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
    """Have a large body counted; None for one that is small."""
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
    if length is None and (parser := getattr(getattr(body, "reader", None), "parser", None)):
        body = _Chunks(parser)
    counted = CountedBody(body, length)
    environ["wsgi.input"] = counted
    return counted

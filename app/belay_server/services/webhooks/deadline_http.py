"""Make an HTTP call with a time limit for the whole call.

HTTP clients have a timeout for each read, so a receiver that sends one byte before each timeout
could hold a call open for ever. Here the timeout of every operation is the time left for the whole
call. A receiver could also send intermediate responses (`100 Continue`) without end, so the bytes
before the final response are limited.
"""

from __future__ import annotations

import ssl
import time
from functools import cache
from typing import Any

import httpcore
import httpx


def post(
    url: httpcore.URL, *, body: bytes, headers: dict[str, str], sni_hostname: str, seconds: float
) -> int:
    """Send a POST request without proxies or redirects, and return the status of the response. The
    response body is not read.

    The URL has its parts, since httpcore drops the parameters (`;x`) of a path that it parses.

    Raises one of ERRORS; httpcore's TimeoutException after `seconds`.
    """
    backend = _Backend(time.monotonic() + seconds)
    with (
        httpcore.ConnectionPool(ssl_context=_ssl_context(), network_backend=backend) as pool,
        pool.stream(
            "POST",
            url,
            headers=[*headers.items(), ("content-length", str(len(body)))],
            content=body,
            extensions={"sni_hostname": sni_hostname},
        ) as response,
    ):
        return response.status


@cache
def _ssl_context() -> ssl.SSLContext:
    """Return the context of all calls. Loading its certificates takes about 30 ms of CPU time."""
    return httpx.create_ssl_context(trust_env=False)


class _Backend(httpcore.SyncBackend):
    def __init__(self, ends_at: float) -> None:
        self._ends_at = ends_at

    def connect_tcp(self, host: str, port: int, *_args: Any, **_kwargs: Any) -> _Stream:
        left = _left(self._ends_at, httpcore.ConnectTimeout)
        return _Stream(super().connect_tcp(host, port, timeout=left), self._ends_at)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, ends_at: float) -> None:
        self._stream = stream
        self._ends_at = ends_at
        self._read = 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        if self._read > _MOST_READ:
            raise httpcore.RemoteProtocolError(f"no response within {_MOST_READ} bytes")
        received = self._stream.read(max_bytes, _left(self._ends_at, httpcore.ReadTimeout))
        self._read += len(received)
        return received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        # Each write may wait, so the time left is computed before each piece.
        for start in range(0, len(buffer), _PIECE):
            left = _left(self._ends_at, httpcore.WriteTimeout)
            self._stream.write(buffer[start : start + _PIECE], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> _Stream:
        left = _left(self._ends_at, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._ends_at)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


_PIECE = 64 * 1024
#: The most bytes read of a response up to the end of its headers.
_MOST_READ = 64 * 1024


def _left(ends_at: float, error: type[httpcore.TimeoutException]) -> float:
    left = ends_at - time.monotonic()
    if left <= 0:
        raise error("the call exceeded its time limit")
    return left


#: The errors that a call may raise.
ERRORS: tuple[type[Exception], ...] = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.UnsupportedProtocol,
    httpcore.ProxyError,
    OSError,
    ValueError,
)

"""Clients that send headers or bodies slowly, or do not read, on every route. Other requests are
not delayed, and no connection is left afterwards."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import psutil
import pytest

from tests.attacks.conftest import watching
from tests.attacks.test_bodies import routes
from tests.waiting import wait_until


def connected(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def slow_headers(server, method: str, path: str) -> socket.socket:
    opened = connected(server)
    opened.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".encode())
    return opened


def slow_body(server, method: str, path: str) -> socket.socket:
    opened = connected(server)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    opened.sendall(f"{head}Content-Length: 100000\r\n\r\n{{".encode())
    return opened


def no_reading(server, method: str, path: str) -> socket.socket:
    """Send many requests on one connection and read none of the responses."""
    opened = connected(server)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.settimeout(0.05)
    with suppress(TimeoutError, ConnectionError):
        opened.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode() * 50)
    return opened


WAYS: tuple[Callable, ...] = (slow_headers, slow_body, no_reading)


def established(server) -> int:
    """Return the number of connections from clients to the web processes."""
    found = 0
    for process in server.find("gunicorn"):
        with suppress(psutil.Error):
            found += sum(
                1
                for one in process.net_connections(kind="tcp")
                if one.status == psutil.CONN_ESTABLISHED and one.laddr.port == server.port
            )
    return found


def some(server, number: int) -> Iterator[tuple[str, str]]:
    found = list(routes(server))
    for index in range(number):
        yield found[index % len(found)]


@pytest.mark.parametrize("way", WAYS)
def test_slow_clients_do_not_delay_other_requests(open_server, way):
    before = established(open_server)
    with ExitStack() as stack, watching(open_server) as stalls:
        for method, path in some(open_server, 80):
            stack.callback(way(open_server, method, path).close)
        answer = httpx.post(
            f"{open_server.url}/runs/wait",
            json={"assistant_id": "counter", "input": {"count": 1}},
            timeout=60,
        )
        assert answer.json() == {"count": 2}
        assert stalls.seconds
    wait_until(lambda: established(open_server) <= before + 2, 40, "their connections to close")


@pytest.mark.long
@pytest.mark.parametrize("way", [slow_headers, slow_body])
def test_the_connection_of_a_slow_client_is_closed(open_server, way):
    """The server closes the connection, even if the client sends a byte now and then."""
    method, path = next(routes(open_server))
    with way(open_server, method, path) as opened:
        opened.settimeout(0.3)
        ends_at = time.monotonic() + 60
        while time.monotonic() < ends_at:
            try:
                if opened.recv(4096) == b"":
                    return
            except TimeoutError:
                with suppress(ConnectionError):
                    opened.sendall(b" ")
            except ConnectionError:
                return
    pytest.fail("nobody gave it up")


@pytest.mark.long
@pytest.mark.parametrize("path", ["/ok", "/nowhere", "/info"])
def test_pipelined_requests_do_not_starve_other_clients(open_server, path):
    """A connection whose next request was always ready was once served alone, without end."""
    many = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 500
    over = threading.Event()

    def send(one: socket.socket) -> None:
        while not over.is_set():
            one.sendall(many)

    def read(one: socket.socket) -> None:
        while one.recv(1 << 20):
            pass

    with connected(open_server) as one, ThreadPoolExecutor(2) as both:
        sending, reading = both.submit(send, one), both.submit(read, one)
        with httpx.Client(base_url=open_server.url, timeout=30) as client:
            for _ in range(3):
                assert client.get("/ok").status_code == 200
        assert not sending.done()
        assert not reading.done()
        over.set()
        sending.result(60)
        one.shutdown(socket.SHUT_RDWR)


@pytest.mark.long
@pytest.mark.parametrize("path", ["/nowhere", "/ok", "/threads"])
def test_a_body_of_many_chunks_does_not_starve_other_clients(open_server, path):
    """A million one-byte chunks once took three seconds in one go. Here they are endless."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    over = threading.Event()

    def send(one: socket.socket) -> None:
        with suppress(OSError):
            one.sendall(head.encode())
            while not over.is_set():
                one.sendall(b"1\r\n \r\n" * 10_000)

    def read(one: socket.socket) -> None:
        with suppress(OSError):
            while one.recv(1 << 20):
                pass

    with connected(open_server) as one, ThreadPoolExecutor(2) as both:
        both.submit(send, one)
        both.submit(read, one)
        with httpx.Client(base_url=open_server.url, timeout=30) as client:
            for _ in range(20):
                assert client.get("/ok").status_code == 200
        over.set()
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)

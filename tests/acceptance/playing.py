"""Helpers of the acceptance tests: coroutines with the async client, and raw server-sent events."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import pytest
from langgraph_sdk.client import LangGraphClient

from tests.servers import LiveServer
from tests.waiting import wait_until

_T = TypeVar("_T")
ALL_STEPS = ["s1", "s2", "s3", "s4"]
UNKNOWN = "00000000-0000-4000-8000-000000000000"
ENDED = ("success", "error", "timeout", "interrupted")


def play(
    make_client: Callable[[], LangGraphClient], scene: Callable[[LangGraphClient], Awaitable[_T]]
) -> _T:
    """Run a coroutine function with an async SDK client in a new event loop."""

    async def run() -> _T:
        async with make_client() as client:
            return await scene(client)

    return asyncio.run(run())


def refused(response: httpx.Response, status: int) -> str:
    """Return the detail of an error response, whose body is always `{"detail": "<string>"}`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["detail"]
    detail = body["detail"]
    assert isinstance(detail, str)
    return detail


def new_thread(http: httpx.Client, **body: Any) -> str:
    response = http.post("/threads", json=body)
    assert response.status_code == 200, response.text
    thread_id: str = response.json()["thread_id"]
    return thread_id


def run_of(
    http: httpx.Client, thread_id: str, assistant: str, input: Any = None, **options: Any
) -> str:
    """Create a run by raw HTTP and return its id."""
    body = {"assistant_id": assistant, "input": input, **options}
    response = http.post(f"/threads/{thread_id}/runs", json=body)
    assert response.status_code == 200, response.text
    run_id: str = response.json()["run_id"]
    return run_id


def wait_for(
    http: httpx.Client, thread_id: str, assistant: str, input: Any = None, **options: Any
) -> Any:
    """Run a graph to its end by raw HTTP and return the body of the response to `wait`."""
    body = {"assistant_id": assistant, "input": input, **options}
    response = http.post(f"/threads/{thread_id}/runs/wait", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def status_of(http: httpx.Client, thread_id: str, run_id: str) -> str:
    status: str = http.get(f"/threads/{thread_id}/runs/{run_id}").json()["status"]
    return status


def until_status(http: httpx.Client, thread_id: str, run_id: str, *wanted: str) -> None:
    wait_until(
        lambda: status_of(http, thread_id, run_id) in wanted, 20, f"run {run_id} to be {wanted}"
    )


def hang_up(response: httpx.Response) -> None:
    """Close a stream that another thread reads, without waiting for its next byte."""
    with suppress(OSError):
        stream = response.extensions["network_stream"]
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    response.close()


@dataclass(frozen=True)
class Frame:
    event: str
    data: Any
    id: str | None = None


def frames_of(lines: Iterable[str]) -> list[Frame]:
    """Return the server-sent events in the order received, without comments."""
    frames: list[Frame] = []
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            data = json.loads(fields["data"])
            frames.append(Frame(fields["event"], data, fields.get("id")))
            fields = {}
    assert not fields, f"the last event is cut: {fields}"
    return frames


class StreamReader:
    """Reads a stream of events in its own thread, so that the test can inspect it meanwhile."""

    def __init__(self, http: httpx.Client, method: str, path: str, **kwargs: Any) -> None:
        self.lines: list[str] = []
        self.ended = threading.Event()
        self.response = http.send(http.build_request(method, path, **kwargs), stream=True)
        assert self.response.status_code == 200, self.response.read()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(httpx.HTTPError):
            for line in self.response.iter_lines():
                self.lines.append(line)
        self.ended.set()

    @property
    def frames(self) -> list[Frame]:
        return frames_of(list(self.lines))

    def close(self) -> None:
        hang_up(self.response)
        self._reader.join(10)


def stream(
    http: httpx.Client, method: str, path: str, **kwargs: Any
) -> tuple[httpx.Response, list[Frame]]:
    """Read a whole stream by raw HTTP and return its response and its frames."""
    with http.stream(method, path, **kwargs) as response:
        if response.status_code != 200:
            response.read()
            raise AssertionError(f"{response.status_code} {response.text}")
        return response, frames_of(response.iter_lines())


@pytest.fixture
def stops_all(http: httpx.Client) -> Iterator[None]:
    """Cancel all runs that are in flight after the test."""
    yield
    http.post("/runs/cancel", json={"status": "all"})


def leave_handshakes(port: int, thread_id: str, key: str) -> None:
    """Begin to open WebSockets of a thread, and reset the connections instead of waiting."""
    head = (
        f"GET /threads/{thread_id}/stream/events HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {key}\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(head.encode())
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)


def socket_url(server: LiveServer, thread: str) -> str:
    return server.url.replace("http", "ws") + f"/threads/{thread}/stream/events"

"""Helpers of the acceptance tests: coroutines with the async client, and raw server-sent events."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.waiting import wait_until

ALL_STEPS = ["s1", "s2", "s3", "s4"]
UNKNOWN = "00000000-0000-4000-8000-000000000000"
ENDED = ("success", "error", "timeout", "interrupted")


def play(make_client, scene):
    """Run a coroutine function with an async SDK client in a new event loop."""

    async def run():
        async with make_client() as client:
            return await scene(client)

    return asyncio.run(run())


def refused(response, status: int) -> str:
    """Return the detail of an error response, whose body is always `{"detail": "<string>"}`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["detail"]
    assert isinstance(body["detail"], str)
    return body["detail"]


def new_thread(http, **body: Any) -> str:
    response = http.post("/threads", json=body)
    assert response.status_code == 200, response.text
    return response.json()["thread_id"]


def run_of(http, thread_id: str, assistant: str, input: Any = None, **options: Any):
    """Create a run by raw HTTP and return its id."""
    body = {"assistant_id": assistant, "input": input, **options}
    response = http.post(f"/threads/{thread_id}/runs", json=body)
    assert response.status_code == 200, response.text
    return response.json()["run_id"]


def wait_for(http, thread_id: str, assistant: str, input: Any = None, **options: Any):
    """Run a graph to its end by raw HTTP and return the body of the response to `wait`."""
    body = {"assistant_id": assistant, "input": input, **options}
    response = http.post(f"/threads/{thread_id}/runs/wait", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def status_of(http, thread_id: str, run_id: str) -> str:
    return http.get(f"/threads/{thread_id}/runs/{run_id}").json()["status"]


def until_status(http, thread_id: str, run_id: str, *wanted: str) -> None:
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


def stream(http, method: str, path: str, **kwargs: Any):
    """Read a whole stream by raw HTTP and return its response and its frames."""
    with http.stream(method, path, **kwargs) as response:
        if response.status_code != 200:
            response.read()
            raise AssertionError(f"{response.status_code} {response.text}")
        return response, frames_of(response.iter_lines())


@pytest.fixture
def stops_all(http):
    """Cancel all runs that are in flight after the test."""
    yield
    http.post("/runs/cancel", json={"status": "all"})

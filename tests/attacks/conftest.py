"""Servers for the attacks, and a monitor of their response times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from tests.servers import LiveServer


@pytest.fixture(scope="session")
def open_server(make_server: Callable[..., LiveServer]) -> Iterator[LiveServer]:
    """Yield a server with the default limits, as a new user has it, and short client timeouts."""
    live = make_server("attacked-open", BELAY_BODY_SECONDS="3", BELAY_HEADER_SECONDS="3")
    yield live.start()
    live.stop()


@dataclass
class Stalls:
    """The response times of `/ok` during other requests, in seconds."""

    seconds: list[float] = field(default_factory=list)

    @property
    def longest(self) -> float:
        return max(self.seconds, default=0.0)


@contextmanager
def watching(server: LiveServer) -> Iterator[Stalls]:
    """Request `/ok` continuously on a separate connection. Every response must be 200."""
    stalls, over = Stalls(), threading.Event()
    failed: list[object] = []

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over.is_set():
                began = time.monotonic()
                answer = client.get("/ok")
                stalls.seconds.append(time.monotonic() - began)
                if answer.status_code != 200:
                    failed.append(answer)
                over.wait(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield stalls
    finally:
        over.set()
        thread.join(70)
        assert failed == []


def web_memory(server: LiveServer) -> int:
    """Return the memory of the web processes in bytes."""
    return sum(process.memory_info().rss for process in server.find("gunicorn"))

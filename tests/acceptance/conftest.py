"""Fixtures of the acceptance tests: a live server and its clients."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from langgraph_sdk import get_client, get_sync_client

from tests.conformance import watched
from tests.ports import free_port
from tests.servers import LiveServer
from tests.waiting import wait_until

WEBHOOK_SECRET = "a secret of the tests"


@pytest.fixture(scope="package")
def server(scratch):
    """The live server of the acceptance tests, started as a user does."""
    live = LiveServer(scratch / "live", BELAY_HEARTBEAT_SECONDS="1").start()
    yield live
    live.stop()


@pytest.fixture(scope="session")
def newcomers_server(scratch, make_server):
    """A server as a new user starts it: with the example project, which is served where there is no
    `langgraph.json`."""
    folder = scratch / "newcomer"
    folder.mkdir()
    live = make_server("example", config=None, cwd=folder).start()
    yield live
    live.stop()


@pytest.fixture(scope="session")
def patient(make_server):
    """A server with two web processes and one child process, JSON logs and the worker's metrics.
    Its grace period allows for a busy machine. It may call loopback, as an operator inside a
    network would set it."""
    live = make_server(
        "patient",
        concurrency=1,
        BELAY_HEARTBEAT_SECONDS="1",
        BELAY_CANCEL_GRACE_MS="60000",
        BELAY_LOG_FORMAT="json",
        BELAY_ACCESS_LOG="1",
        BELAY_REFERENCE_METRICS="1",
        BELAY_WEBHOOK_ALLOW_PRIVATE="1",
        BELAY_WEBHOOK_SECRET=WEBHOOK_SECRET,
        WEB_CONCURRENCY="2",
    )
    yield from with_worker_metrics(live)


def with_worker_metrics(live: LiveServer) -> Iterator[LiveServer]:
    """Start a server whose worker serves metrics, at `worker_metrics`. Yield it, and stop it."""
    port = free_port()
    live.env["BELAY_WORKER_METRICS_PORT"] = str(port)
    live.worker_metrics = f"http://127.0.0.1:{port}/metrics"
    live.start()
    wait_until(lambda: _answers(live.worker_metrics), 30, "the worker")
    yield live
    live.stop()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def http(server):
    with watched(httpx.Client(base_url=server.url, timeout=60)) as client:
        yield client


@pytest.fixture
def sync_client(server):
    with watched(get_sync_client(url=server.url)) as client:
        yield client


@pytest.fixture
def make_client(server):
    """A function that makes an async SDK client. Call it in the event loop that uses the client."""

    def make():
        return watched(get_client(url=server.url))

    return make

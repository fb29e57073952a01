"""Fixtures of the acceptance tests: a live server and its clients."""

from __future__ import annotations

import httpx
import pytest
from langgraph_sdk import get_client, get_sync_client

from tests.conformance import watched
from tests.servers import LiveServer


@pytest.fixture(scope="package")
def server(scratch):
    """The live server of the acceptance tests, started as a user does."""
    live = LiveServer(scratch / "live", BELAY_HEARTBEAT_SECONDS="1").start()
    yield live
    live.stop()


@pytest.fixture(scope="session")
def newcomers_server(scratch):
    """A server as a new user starts it: with the example project, which is served where there is no
    `langgraph.json`."""
    folder = scratch / "newcomer"
    folder.mkdir()
    live = LiveServer(scratch / "example", config=None, cwd=folder).start()
    yield live
    live.stop()


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

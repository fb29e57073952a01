"""Responses of the maximal size do not delay other requests."""

from __future__ import annotations

import httpx
import pytest

from tests.attacks.conftest import watching

_LONGEST_STALL_SECONDS = 0.25
_VALUES = 180_000


@pytest.fixture(scope="module")
def crowded(open_server):
    """Yield the id of a thread with 31 large states; 29 further threads have one each."""
    with httpx.Client(base_url=open_server.url, timeout=120) as client:
        threads = [client.post("/threads", json={"graph_id": "hostile"}).json() for _ in range(30)]
        numbers = list(range(_VALUES))
        body = {"values": {"text": "x", "data": numbers}, "as_node": "obey"}
        for thread in [threads[0]] * 30 + threads:
            path = f"/threads/{thread['thread_id']}/state"
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
        yield threads[0]["thread_id"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/threads/{thread}/history?limit=1000", None),
        ("POST", "/threads/{thread}/history", {"limit": 1000, "select": ["values"]}),
        ("POST", "/threads/search", {"limit": 1000}),
        ("POST", "/threads/search", {"limit": 1000, "extract": {"last": "values.data[-1]"}}),
        ("GET", "/threads/{thread}/state", None),
        ("GET", "/threads/{thread}", None),
        ("GET", "/openapi.json", None),
    ],
)
def test_no_large_response_delays_other_requests(open_server, crowded, method, path, body):
    """Compare with the response times during small requests on the same machine."""
    with httpx.Client(base_url=open_server.url, timeout=120) as client:
        with watching(open_server) as usual:
            for _ in range(40):
                client.post("/threads/search", json={"limit": 1, "select": ["thread_id"]})
        with watching(open_server) as stalls:
            for _ in range(5):
                url = path.format(thread=crowded)
                with client.stream(method, url, json=body) as answer:
                    assert answer.status_code == 200
                    # Not stored: that would slow the monitor, which runs in this process.
                    assert sum(map(len, answer.iter_raw())) > 1_000
    assert stalls.longest < _LONGEST_STALL_SECONDS + 2 * usual.longest, stalls.longest

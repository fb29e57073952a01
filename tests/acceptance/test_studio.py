"""The calls of LangSmith Studio, a page of a public site that uses a server on this machine."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.conformance import watched

STUDIO = "https://smith.langchain.com"
#: Studio's headers, each of which the browser asks for before it sends the request.
HEADERS = {
    "content-type": "application/json",
    "x-auth-scheme": "langsmith",
    "x-api-key": "",
    "x-tenant-id": "none",
    "x-user-id": "none",
}


@pytest.fixture(scope="module")
def studio(server):
    """A function that sends a request as a browser does for Studio's page: preflight first."""
    with watched(httpx.Client(base_url=server.url, timeout=60)) as client:

        def call(method, path, body=None):
            asked = client.options(
                path,
                headers={
                    "origin": STUDIO,
                    "access-control-request-method": method,
                    "access-control-request-headers": ",".join(HEADERS),
                    "access-control-request-private-network": "true",
                },
            )
            assert asked.status_code in (200, 204), asked.text
            assert asked.headers["access-control-allow-origin"] in ("*", STUDIO)
            assert asked.headers["access-control-allow-private-network"] == "true"
            assert method in asked.headers["access-control-allow-methods"]
            allowed = asked.headers["access-control-allow-headers"].lower()
            assert all(name in allowed for name in HEADERS)
            answer = client.request(method, path, json=body, headers={**HEADERS, "origin": STUDIO})
            assert answer.headers["access-control-allow-origin"] in ("*", STUDIO)
            answer.raise_for_status()
            return answer

        yield call


def test_studio_draws_the_graphs_of_the_project(studio):
    assert studio("GET", "/info").json()["flags"]["assistants"] is True
    found = studio("POST", "/assistants/search", {"graph_id": "family", "limit": 100})
    assert "x-pagination-total" in found.headers["access-control-expose-headers"].lower()
    (system,) = (one for one in found.json() if one["metadata"].get("created_by") == "system")
    one = f"/assistants/{system['assistant_id']}"
    drawn = studio("GET", f"{one}/graph?xray=true").json()
    assert any(node["id"].startswith("child:") for node in drawn["nodes"])
    assert studio("GET", f"{one}/schemas").json()["input_schema"]
    assert "child" in studio("GET", f"{one}/subgraphs?recurse=true").json()


def test_studio_plays_a_thread(studio):
    thread_id = studio("POST", "/threads", {"metadata": {"graph_id": "family"}}).json()["thread_id"]
    path = f"/threads/{thread_id}"
    body = {
        "assistant_id": "family",
        "input": {"ask": True},
        "stream_mode": ["debug", "messages-tuple", "values"],
        "stream_subgraphs": True,
        "stream_resumable": True,
        "on_disconnect": "continue",
        "config": {"recursion_limit": 100},
    }
    streamed = studio("POST", f"{path}/runs/stream", body)
    exposed = streamed.headers["access-control-expose-headers"].lower()
    assert "content-location" in exposed
    assert "event: debug" in streamed.text
    state = studio("GET", f"{path}/state?subgraphs=true").json()
    assert state["tasks"][0]["state"]["values"]["log"] == ["p1", "c1"]
    history = studio("POST", f"{path}/history", {"limit": 10}).json()
    forked = {"checkpoint_id": history[-1]["checkpoint"]["checkpoint_id"]}
    saved = studio("POST", f"{path}/state", {"values": {}, "checkpoint": forked}).json()
    assert saved["checkpoint"]["thread_id"] == thread_id
    found = studio("POST", "/threads/search", {"metadata": {"graph_id": "family"}, "limit": 5})
    assert thread_id in json.dumps(found.json())
    assert [run["status"] for run in studio("GET", f"{path}/runs").json()] == ["success"]
    studio("DELETE", path)

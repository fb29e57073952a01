"""Test that the check of responses rejects what the OpenAPI document does not describe."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from langgraph_sdk import get_client, get_sync_client

from tests import conformance
from tests.conformance import watched

ITEM = {
    "type": "object",
    "properties": {"id": {"type": "string", "format": "uuid"}},
    "required": ["id"],
    "additionalProperties": False,
}
DOCUMENT = {
    "components": {"schemas": {"Item": ITEM}},
    "paths": {
        "/items/{item_id}": {
            "parameters": [],
            "get": {
                "responses": {
                    "200": {
                        "content": {
                            "application/json": {"schema": {"$ref": "#/components/schemas/Item"}}
                        }
                    },
                    "204": {"description": "Nothing"},
                }
            },
        },
        "/items/stream": {
            "get": {"responses": {"200": {"content": {"text/event-stream": {"schema": {}}}}}}
        },
    },
}
GOOD = {"id": "018f0000-0000-7000-8000-00000000dead"}
EVENTS = {"content-type": "text/event-stream; charset=utf-8"}


@pytest.fixture(autouse=True)
def document(monkeypatch):
    made = conformance._Document(DOCUMENT)
    monkeypatch.setattr(conformance, "_document_of", lambda origin: made)


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in chunks, as from a server."""

    def __init__(self, body: bytes) -> None:
        self.pieces = [body[:5], body[5:]]

    def __iter__(self):
        yield from self.pieces

    async def __aiter__(self):
        for piece in self.pieces:
            yield piece


def transport(status: int, **how) -> httpx.MockTransport:
    whole = httpx.Response(status, **how)
    return httpx.MockTransport(
        lambda request: httpx.Response(status, headers=whole.headers, stream=Chunks(whole.content))
    )


def answer(path: str, status: int, **how) -> httpx.Response:
    made = httpx.Client(base_url="http://server", transport=transport(status, **how))
    with watched(made) as client:
        return client.get(path)


async def async_answer(path: str, status: int, **how) -> httpx.Response:
    made = httpx.AsyncClient(base_url="http://server", transport=transport(status, **how))
    async with watched(made) as client:
        return await client.get(path)


NO_AGENT_ROUTE = {"error": {"type": "NOT_FOUND", "code": "INVALID_REQUEST", "message": "No."}}
FITTING = [
    ("/agent/nowhere", 404, {"json": NO_AGENT_ROUTE}),
    ("/items/1", 200, {"json": GOOD}),
    ("/items/1/", 200, {"json": GOOD}),
    ("/items/1?a=b", 204, {}),
    ("/items/stream", 200, {"headers": EVENTS, "content": b"data: 1\n\n"}),
    ("/nowhere", 404, {"json": {"detail": "Not Found"}}),
    ("/openapi.json", 200, {"json": []}),
    ("/docs/index.html", 200, {"html": "<p>"}),
]
OTHERS = [
    ("/items/1", 201, {"json": GOOD}, "undocumented"),
    ("/items/1", 500, {"json": GOOD}, "undocumented"),
    ("/items/1", 200, {"json": {}}, "required"),
    ("/items/1", 200, {"json": {"id": "x"}}, "uuid"),
    ("/items/1", 200, {"json": {**GOOD, "more": 1}}, "more"),
    ("/items/1", 200, {"text": "x"}, "text/plain"),
    ("/items/1", 204, {"text": "x"}, "without a body"),
    ("/items/stream", 200, {"json": GOOD}, "application/json"),
    ("/nowhere", 404, {"json": {"detail": "Thread not found"}}, "undocumented"),
    ("/nowhere", 200, {"json": GOOD}, "undocumented"),
    ("/agent/nowhere", 404, {"json": {"detail": "Not Found"}}, "undocumented"),
    ("/agent/nowhere", 200, {"json": NO_AGENT_ROUTE}, "undocumented"),
    ("/agent", 400, {"json": NO_AGENT_ROUTE}, "undocumented"),
]


@pytest.mark.parametrize(("path", "status", "how"), FITTING)
def test_a_documented_response_passes(path, status, how):
    assert answer(path, status, **how).status_code == status
    assert asyncio.run(async_answer(path, status, **how)).status_code == status


@pytest.mark.parametrize(("path", "status", "how", "reason"), OTHERS)
def test_an_undocumented_response_fails_with_the_reason(path, status, how, reason):
    with pytest.raises(AssertionError, match=reason):
        answer(path, status, **how)
    with pytest.raises(AssertionError, match=reason):
        asyncio.run(async_answer(path, status, **how))


def test_the_sdks_clients_are_watched():
    for client in (get_sync_client(url="http://server"), get_client(url="http://server")):
        assert client.http.client.event_hooks["response"] == []
        watched(client)
        assert len(client.http.client.event_hooks["response"]) == 1


UNWATCHED = {"test_schemathesis.py", "test_project_routes.py", "test_middleware.py"}


def test_every_client_of_the_acceptance_tests_is_watched():
    """Clients that read the document itself or call a project's own routes are excepted."""
    tests = Path(__file__).parents[1]
    files = [tests / "conftest.py", *(tests / "acceptance").glob("*.py")]
    makes_one = re.compile(r"(?<!watched\()(?:httpx\.(?:Async)?Client|get(?:_sync)?_client)\(")
    unwatched = {
        f"{file.name}: {line.strip()}"
        for file in files
        for line in file.read_text().splitlines()
        if makes_one.search(line) and "http://localhost" not in line
    }
    assert {line.partition(":")[0] for line in unwatched} <= UNWATCHED, unwatched

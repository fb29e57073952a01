"""Assistants: one per graph from the start, others by clients, found and run by id or name."""

from __future__ import annotations

import uuid
from datetime import datetime

import pytest
from langgraph_sdk.errors import ConflictError, NotFoundError

from tests.acceptance.playing import UNKNOWN, new_thread, play, refused, wait_for

#: From the reference: observed on another installation.
COUNTER_ID = "09d6caf4-2ef3-5a8b-b1a7-114690ed5d45"
FIELDS = {
    "assistant_id",
    "graph_id",
    "config",
    "context",
    "metadata",
    "name",
    "created_at",
    "updated_at",
    "version",
    "description",
}


@pytest.fixture
def tag():
    """Return metadata that only this test's assistants have."""
    return {"tag": uuid.uuid4().hex}


def create(http, **body):
    response = http.post("/assistants", json={"graph_id": "counter", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_every_graph_has_a_system_assistant_with_a_derived_id(http):
    assistant = http.get(f"/assistants/{COUNTER_ID}").json()
    assert assistant.keys() == FIELDS
    assert assistant["graph_id"] == "counter"
    assert assistant["metadata"] == {"created_by": "system"}
    assert assistant["version"] == 1
    assert assistant["config"] == {}
    system = http.post(
        "/assistants/search", json={"metadata": {"created_by": "system"}, "limit": 1000}
    ).json()
    graphs = [a["graph_id"] for a in system]
    assert len(graphs) == len(set(graphs))
    assert {"counter", "bad", "steps", "questions", "family", "made_async", "heavy"} <= set(graphs)


def test_a_created_assistant_has_the_requested_fields(sync_client, tag):
    made = sync_client.assistants.create(
        "counter",
        config={"tags": ["t"], "recursion_limit": 7, "configurable": {"by": 3}},
        metadata=tag,
        name="A1",
        description="desc",
    )
    assert made.keys() == FIELDS
    assert uuid.UUID(made["assistant_id"]).version == 4
    assert made["graph_id"] == "counter"
    assert made["config"] == {"tags": ["t"], "recursion_limit": 7, "configurable": {"by": 3}}
    assert made["context"] == {"by": 3}
    assert made["metadata"] == tag
    assert (made["name"], made["description"], made["version"]) == ("A1", "desc", 1)
    assert datetime.fromisoformat(made["created_at"]).utcoffset().total_seconds() == 0
    assert sync_client.assistants.get(made["assistant_id"]) == made


def test_a_created_assistant_without_a_name_is_untitled(http):
    made = create(http)
    assert made["name"] == "Untitled"
    assert (made["config"], made["context"], made["metadata"]) == ({}, {}, {})


def test_context_and_configurable_mirror_each_other(http):
    assert create(http, context={"by": 4})["config"] == {"configurable": {"by": 4}}
    assert create(http, config={"configurable": {"by": 5}})["context"] == {"by": 5}
    both = {"graph_id": "counter", "context": {"by": 1}, "config": {"configurable": {"by": 2}}}
    refused(http.post("/assistants", json=both), 400)


def test_an_assistant_of_an_unknown_graph_is_refused(http):
    detail = refused(http.post("/assistants", json={"graph_id": "nope"}), 404)
    assert detail.startswith("Graph 'nope' not found. Expected one of: [")
    assert "'counter'" in detail
    refused(http.post("/assistants", json={}), 422)
    refused(http.post("/assistants", json={"graph_id": 5}), 422)


def test_an_existing_id_is_a_conflict_unless_if_exists_is_do_nothing(make_client, tag):
    async def scene(client):
        taken = str(uuid.uuid4())
        first = await client.assistants.create("counter", assistant_id=taken, metadata=tag)
        assert first["assistant_id"] == taken
        with pytest.raises(ConflictError) as conflict:
            await client.assistants.create("steps", assistant_id=taken)
        assert f"Assistant {taken} already exists" in conflict.value.response.text
        again = await client.assistants.create(
            "steps", assistant_id=taken, name="other", if_exists="do_nothing"
        )
        assert again == first

    play(make_client, scene)


def test_an_unknown_assistant_is_not_found_and_a_graph_name_is_not_an_id(sync_client, http):
    with pytest.raises(NotFoundError):
        sync_client.assistants.get(UNKNOWN)
    assert refused(http.get(f"/assistants/{UNKNOWN}"), 404) == "Not Found"
    detail = refused(http.get("/assistants/counter"), 422)
    assert detail == "Invalid assistant ID: must be a UUID"


def test_search_finds_by_graph_metadata_and_part_of_the_name(make_client, tag):
    async def scene(client):
        one = await client.assistants.create("counter", metadata={**tag, "n": 1}, name="Red Fox")
        two = await client.assistants.create("steps", metadata={**tag, "n": 2}, name="Grey Wolf")

        async def found(**filters):
            hits = await client.assistants.search(metadata=tag, **filters)
            return [a["assistant_id"] for a in hits]

        newest_first = [two["assistant_id"], one["assistant_id"]]
        assert await found() == newest_first
        assert await found(sort_by="created_at", sort_order="asc") == newest_first[::-1]
        assert await found(sort_by="name", sort_order="asc") == newest_first
        assert await found(graph_id="counter") == [one["assistant_id"]]
        assert await found(name="d fO") == [one["assistant_id"]]
        assert await found(name="%") == []
        hits = await client.assistants.search(metadata={**tag, "n": 2}, select=["name", "version"])
        assert hits == [{"name": "Grey Wolf", "version": 1}]

    play(make_client, scene)


def test_assistant_search_is_paged_with_the_exact_total(http, sync_client, tag):
    made = [create(http, metadata=tag)["assistant_id"] for _ in range(5)]

    def page(limit, offset):
        body = {"metadata": tag, "limit": limit, "offset": offset}
        response = http.post("/assistants/search", json=body)
        ids = [a["assistant_id"] for a in response.json()]
        headers = response.headers
        return ids, headers["x-pagination-total"], headers.get("x-pagination-next")

    newest_first = made[::-1]
    assert page(2, 0) == (newest_first[:2], "5", "2")
    assert page(2, 2) == (newest_first[2:4], "5", "4")
    assert page(2, 4) == (newest_first[4:], "5", None)
    assert page(5, 0) == (newest_first, "5", None)
    assert page(2, 50) == ([], "5", None)
    whole = sync_client.assistants.search(metadata=tag, limit=2, response_format="object")
    assert [a["assistant_id"] for a in whole["assistants"]] == newest_first[:2]
    assert whole["next"] == "2"


@pytest.mark.parametrize(
    "body",
    [
        {"limit": 0},
        {"limit": 1001},
        {"limit": "5"},
        {"offset": -1},
        {"sort_by": "nope"},
        {"sort_order": "up"},
        {"select": ["nope"]},
        {"metadata": []},
    ],
)
def test_an_invalid_assistant_search_is_refused(http, body):
    refused(http.post("/assistants/search", json=body), 422)


def test_a_search_in_an_unknown_graph_is_not_found(http):
    refused(http.post("/assistants/search", json={"graph_id": "nope"}), 404)


def test_a_run_may_name_a_graph_its_system_assistant_or_another_assistant(http, sync_client, tag):
    own = create(http, config={"configurable": {"by": 5}}, metadata=tag)["assistant_id"]
    thread_id = new_thread(http)
    for named, id_, count in (
        ("counter", COUNTER_ID, 2),
        (COUNTER_ID, COUNTER_ID, 2),
        (COUNTER_ID.upper(), COUNTER_ID, 2),
        (own, own, 6),
    ):
        assert wait_for(http, thread_id, named, {"count": 1}) == {"count": count}
        run = sync_client.runs.list(thread_id, limit=1)[0]
        assert run["assistant_id"] == id_
        assert sync_client.threads.get(thread_id)["metadata"]["assistant_id"] == id_
    assert run["metadata"]["tag"] == tag["tag"]


def test_a_run_overrides_the_configuration_of_its_assistant(http):
    own = create(http, config={"tags": ["mine"], "configurable": {"by": 5}})["assistant_id"]
    thread_id = new_thread(http)
    asked = {"configurable": {"by": 7}}
    assert wait_for(http, thread_id, own, {"count": 1}, config=asked) == {"count": 8}
    assert wait_for(http, thread_id, own, {"count": 1}) == {"count": 6}


@pytest.mark.parametrize("path", ["/runs", "/runs/wait", "/runs/stream"])
@pytest.mark.parametrize("on_thread", [True, False], ids=["thread", "stateless"])
def test_a_run_of_an_unknown_assistant_is_refused_and_nothing_is_created(http, path, on_thread):
    thread_id = new_thread(http)
    url = f"/threads/{thread_id}{path}" if on_thread else path
    detail = refused(http.post(url, json={"assistant_id": UNKNOWN}), 404)
    assert detail == "Thread or assistant not found."
    detail = refused(http.post(url, json={"assistant_id": "nope"}), 422)
    start = (
        "Invalid assistant: 'nope'. Must be either:\n- A valid assistant UUID, or\n"
        "- One of the registered graphs: "
    )
    assert detail.startswith(start)
    assert {"counter", "steps"} <= set(detail.removeprefix(start).split(", "))
    refused(http.post(url, json={"input": {}}), 422)
    refused(http.post(url, json={"assistant_id": 5}), 422)
    assert http.get(f"/threads/{thread_id}/runs").json() == []
    assert http.get(f"/threads/{thread_id}").json()["status"] == "idle"


def test_the_assistant_of_a_graph_has_the_description_of_the_project(http):
    (found,) = http.post("/assistants/search", json={"graph_id": "chat", "name": "chat"}).json()
    assert (found["name"], found["description"], found["version"]) == ("chat", "echoes", 1)

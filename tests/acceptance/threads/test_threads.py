"""Records of threads: created, read, updated, searched, and deleted with runs and checkpoints."""

from __future__ import annotations

import time
import uuid
from datetime import datetime

import pytest
from langgraph_sdk.errors import ConflictError, NotFoundError

from tests.acceptance.playing import (
    ALL_STEPS,
    UNKNOWN,
    new_thread,
    play,
    refused,
    run_of,
    stops_all,
    until_status,
    wait_for,
)

__all__ = ["stops_all"]

NEW = {
    "thread_id",
    "created_at",
    "updated_at",
    "state_updated_at",
    "metadata",
    "status",
    "config",
    "values",
}
_LISTENING_SECONDS = 0.3


@pytest.fixture
def tag():
    """Return metadata that only this test's threads have."""
    return {"tag": uuid.uuid4().hex}


def search(http, **body):
    response = http.post("/threads/search", json=body)
    assert response.status_code == 200, response.text
    return response


def ids(response) -> list[str]:
    return [thread["thread_id"] for thread in response.json()]


def test_a_new_thread_is_idle_and_empty(sync_client, tag):
    thread = sync_client.threads.create(metadata=tag)
    assert thread.keys() == NEW
    assert uuid.UUID(thread["thread_id"]).version == 7
    assert thread["metadata"] == tag
    assert (thread["status"], thread["config"], thread["values"]) == ("idle", {}, None)
    assert datetime.fromisoformat(thread["created_at"]).utcoffset().total_seconds() == 0
    assert sync_client.threads.get(thread["thread_id"]) == thread


def test_a_thread_may_be_created_with_an_id_in_any_spelling(http):
    wanted = uuid.uuid4()
    assert new_thread(http, thread_id=str(wanted).upper()) == str(wanted)
    for spelling in (str(wanted), str(wanted).upper(), wanted.hex, f"{{{wanted}}}"):
        assert http.get(f"/threads/{spelling}").json()["thread_id"] == str(wanted)


def test_an_existing_thread_id_conflicts_unless_if_exists_is_do_nothing(make_client, tag):
    async def scene(client):
        first = await client.threads.create(metadata=tag)
        taken = first["thread_id"]
        with pytest.raises(ConflictError) as conflict:
            await client.threads.create(thread_id=taken)
        assert f"Thread with ID {taken} already exists" in conflict.value.response.text
        again = await client.threads.create(
            thread_id=taken, metadata={"other": 1}, if_exists="do_nothing"
        )
        assert again == first
        assert await client.threads.get(taken) == first

    play(make_client, scene)


@pytest.mark.parametrize(
    "body",
    [
        {"thread_id": "bad"},
        {"thread_id": 5},
        {"metadata": []},
        {"metadata": "m"},
        {"if_exists": "overwrite"},
    ],
)
def test_an_invalid_thread_is_refused(http, body):
    refused(http.post("/threads", json=body), 422)


def test_an_unknown_thread_is_not_found_and_a_malformed_id_is_refused(http, sync_client):
    assert refused(http.get(f"/threads/{UNKNOWN}"), 404) == f"Thread with ID {UNKNOWN} not found"
    assert refused(http.get("/threads/bad"), 422) == "Invalid thread ID: must be a UUID"
    assert refused(http.delete("/threads/bad"), 422) == "Invalid thread ID: must be a UUID"
    assert refused(http.patch(f"/threads/{UNKNOWN}", json={}), 404) == "Not Found"
    refused(http.delete(f"/threads/{UNKNOWN}"), 404)
    with pytest.raises(NotFoundError):
        sync_client.threads.get(UNKNOWN)


def test_after_a_run_the_thread_shows_its_outcome(http):
    thread_id = new_thread(http, metadata={"k": "v"})
    before = http.get(f"/threads/{thread_id}").json()
    wait_for(http, thread_id, "counter", {"count": 9}, config={"tags": ["x"]})
    thread = http.get(f"/threads/{thread_id}").json()
    assert thread.keys() == NEW | {"error", "interrupts"}
    assert thread["values"] == {"count": 10}
    assert thread["status"] == "idle"
    assert thread["config"] == {"configurable": {}, "tags": ["x"]}
    assert thread["metadata"] == {
        "k": "v",
        "graph_id": "counter",
        "assistant_id": "09d6caf4-2ef3-5a8b-b1a7-114690ed5d45",
    }
    assert (thread["error"], thread["interrupts"]) == (None, {})
    assert thread["created_at"] == before["created_at"]
    assert thread["updated_at"] > before["updated_at"]
    assert thread["state_updated_at"] > before["state_updated_at"]


def test_a_failed_run_leaves_its_error_and_the_next_success_clears_it(http):
    thread_id = new_thread(http)
    wait_for(http, thread_id, "bad", {"count": 1})
    thread = http.get(f"/threads/{thread_id}").json()
    assert thread["status"] == "error"
    assert thread["error"] == {"error": "ValueError", "message": "boom from bad node"}
    wait_for(http, thread_id, "counter", {"count": 1})
    thread = http.get(f"/threads/{thread_id}").json()
    assert (thread["status"], thread["error"], thread["values"]) == ("idle", None, {"count": 2})


def test_an_interrupted_thread_shows_its_interrupts_by_task(http):
    thread_id = new_thread(http)
    wait_for(http, thread_id, "questions", {"topic": "tea"})
    thread = http.get(f"/threads/{thread_id}").json()
    state = http.get(f"/threads/{thread_id}/state").json()
    assert thread["status"] == "interrupted"
    interrupt = {
        "id": state["tasks"][0]["interrupts"][0]["id"],
        "value": {"question": "first about tea?"},
    }
    assert thread["interrupts"] == {state["tasks"][0]["id"]: [interrupt]}
    for answer in ("a", "b"):
        wait_for(http, thread_id, "questions", command={"resume": answer})
    thread = http.get(f"/threads/{thread_id}").json()
    assert (thread["status"], thread["interrupts"]) == ("idle", {})


def test_a_patch_merges_metadata_at_the_top_level(sync_client, http):
    thread = sync_client.threads.create(metadata={"a": 1, "deep": {"x": 1}})
    thread_id = thread["thread_id"]
    changed = sync_client.threads.update(thread_id, metadata={"deep": {"y": 2}, "n": None})
    assert changed["metadata"] == {"a": 1, "deep": {"y": 2}, "n": None}
    assert changed["updated_at"] > thread["updated_at"]
    assert changed["created_at"] == thread["created_at"]
    assert sync_client.threads.get(thread_id)["metadata"] == changed["metadata"]
    assert http.patch(f"/threads/{thread_id}", json={}).json()["metadata"] == changed["metadata"]
    refused(http.patch(f"/threads/{thread_id}", json={"metadata": 5}), 422)


def test_a_patch_with_prefer_minimal_returns_no_content(http, sync_client):
    thread_id = new_thread(http)
    response = http.patch(
        f"/threads/{thread_id}",
        json={"metadata": {"a": 1}},
        headers={"Prefer": "return=minimal"},
    )
    assert (response.status_code, response.content) == (204, b"")
    assert sync_client.threads.update(thread_id, metadata={"b": 2}, return_minimal=True) is None
    assert sync_client.threads.get(thread_id)["metadata"] == {"a": 1, "b": 2}


def test_a_deleted_thread_is_not_found_nor_are_its_runs_and_states(http, sync_client):
    thread_id = new_thread(http)
    run_id = run_of(http, thread_id, "counter", {"count": 1})
    sync_client.runs.join(thread_id, run_id)
    response = http.delete(f"/threads/{thread_id}")
    assert (response.status_code, response.content) == (204, b"")
    detail = f"Thread with ID {thread_id} not found"
    assert refused(http.delete(f"/threads/{thread_id}"), 404) == detail
    assert refused(http.get(f"/threads/{thread_id}"), 404) == detail
    assert refused(http.get(f"/threads/{thread_id}/state"), 404) == detail
    assert refused(http.get(f"/threads/{thread_id}/history"), 404) == detail
    assert refused(http.get(f"/threads/{thread_id}/runs"), 404) == detail
    assert refused(http.get(f"/threads/{thread_id}/runs/{run_id}"), 404) == detail


def assert_has_no_old_data(http, thread_id):
    assert new_thread(http, thread_id=thread_id) == thread_id
    thread = http.get(f"/threads/{thread_id}").json()
    assert (thread["values"], thread["metadata"], thread["status"]) == (None, {}, "idle")
    assert http.get(f"/threads/{thread_id}/state").json()["values"] == {}
    assert http.get(f"/threads/{thread_id}/history", params={"limit": 10}).json() == []
    assert http.get(f"/threads/{thread_id}/runs").json() == []
    # Also check through the graph, which would load old checkpoints.
    assert wait_for(http, thread_id, "steps", {})["steps"] == ALL_STEPS


def test_a_thread_recreated_with_a_deleted_id_has_no_old_data(make_client, http):
    async def scene(client):
        thread = await client.threads.create(metadata={"old": 1})
        await client.runs.wait(thread["thread_id"], "steps", input={})
        await client.threads.delete(thread["thread_id"])
        return thread["thread_id"]

    assert_has_no_old_data(http, play(make_client, scene))


def test_deleting_a_thread_stops_its_running_and_pending_runs(
    http, sync_client, beats, tmp_path, stops_all
):
    thread_id = new_thread(http)
    run_id = run_of(http, thread_id, "steps", {"seconds": 20, "beats": str(beats)})
    waiting = tmp_path / "waiting"
    queued = run_of(http, thread_id, "steps", {"beats": str(waiting)})
    beats.wait_for("s1:beat")
    assert http.delete(f"/threads/{thread_id}").status_code == 204
    before = beats.lines()
    detail = f"Thread with ID {thread_id} not found"
    for run in (run_id, queued):
        assert refused(http.get(f"/threads/{thread_id}/runs/{run}"), 404) == detail
    time.sleep(_LISTENING_SECONDS)  # nothing may happen meanwhile
    assert beats.lines() == before
    assert "s1:end" not in beats.names()
    assert_has_no_old_data(http, thread_id)
    assert not waiting.exists()


def test_search_finds_by_metadata(http, sync_client, tag):
    deep = new_thread(http, metadata={**tag, "deep": {"x": 1, "y": 2}})
    plain = new_thread(http, metadata=tag)
    assert ids(search(http, metadata=tag)) == [plain, deep]
    assert ids(search(http, metadata={**tag, "deep": {"x": 1}})) == [deep]
    assert ids(search(http, metadata={**tag, "deep": {"x": 2}})) == []
    found = sync_client.threads.search(metadata=tag)
    assert [thread["thread_id"] for thread in found] == [plain, deep]
    assert found[0] == sync_client.threads.get(plain)


def test_search_finds_by_values_among_threads_without_values(http, tag):
    new_thread(http, metadata=tag)
    seven = new_thread(http, metadata=tag)
    wait_for(http, seven, "counter", {"count": 6})
    eight = new_thread(http, metadata=tag)
    wait_for(http, eight, "counter", {"count": 7})
    assert ids(search(http, metadata=tag, values={"count": 7})) == [seven]
    assert ids(search(http, metadata=tag, values={"count": 8})) == [eight]
    assert ids(search(http, metadata=tag, values={"count": 9})) == []


def test_search_finds_by_the_values_a_killed_run_left(http, sync_client, tag, beats):
    thread_id = new_thread(http, metadata=tag)
    wait_for(http, thread_id, "counter", {"count": 1})
    kind = {"kind": "swallow_sync"}
    run_id = run_of(http, thread_id, "nodes", {**kind, "beats": str(beats)}, durability="sync")
    beats.wait_for("beat")
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    # The search is the first request that reads the thread's values.
    assert ids(search(http, metadata=tag, values=kind)) == [thread_id]
    assert sync_client.threads.get(thread_id)["values"]["kind"] == "swallow_sync"


def test_search_finds_by_status(make_client, http, tag, beats, stops_all):
    async def scene(client):
        made = {}
        for status, graph, input_ in (
            ("idle", "counter", {"count": 1}),
            ("error", "bad", {"count": 1}),
            ("interrupted", "questions", {"topic": "t"}),
        ):
            thread = await client.threads.create(metadata=tag)
            await client.runs.wait(thread["thread_id"], graph, input=input_, raise_error=False)
            made[status] = thread["thread_id"]
        thread = await client.threads.create(metadata=tag)
        run = await client.runs.create(
            thread["thread_id"], "steps", input={"seconds": 20, "beats": str(beats)}
        )
        made["busy"] = thread["thread_id"]
        for status, thread_id in made.items():
            found = await client.threads.search(metadata=tag, status=status)
            assert [t["thread_id"] for t in found] == [thread_id], status
            assert found[0]["status"] == status
        await client.runs.cancel(made["busy"], run["run_id"], wait=True)
        assert await client.threads.search(metadata=tag, status="busy") == []

    play(make_client, scene)


def test_search_finds_by_ids_and_selects_fields(http, sync_client, tag):
    one, two, three = (new_thread(http, metadata=tag) for _ in range(3))
    assert ids(search(http, ids=[three, one])) == [three, one]
    assert ids(search(http, ids=[one, UNKNOWN])) == [one]
    assert ids(search(http, ids=[], metadata=tag)) == [three, two, one]
    found = sync_client.threads.search(ids=[two], select=["thread_id", "status"])
    assert found == [{"thread_id": two, "status": "idle"}]


def test_thread_search_is_sorted_by_the_requested_field(http, tag):
    one, two, three = (new_thread(http, metadata=tag) for _ in range(3))
    http.patch(f"/threads/{one}", json={"metadata": {"touched": True}})

    def sorted_by(**how):
        return ids(search(http, metadata=tag, **how))

    assert sorted_by() == [one, three, two]
    assert sorted_by(sort_by="updated_at", sort_order="asc") == [two, three, one]
    assert sorted_by(sort_by="created_at") == [three, two, one]
    assert sorted_by(sort_by="thread_id", sort_order="asc") == sorted([one, two, three])
    wait_for(http, two, "questions", {"topic": "t"})
    assert sorted_by(sort_by="status", sort_order="desc")[0] == two


def test_thread_search_is_paged_with_the_exact_total(http, tag):
    made = [new_thread(http, metadata=tag) for _ in range(12)][::-1]

    def page(**how):
        response = search(http, metadata=tag, **how)
        headers = response.headers
        return ids(response), headers["x-pagination-total"], headers.get("x-pagination-next")

    assert page() == (made[:10], "12", "10")
    assert page(limit=5, offset=5) == (made[5:10], "12", "10")
    assert page(limit=5, offset=10) == (made[10:], "12", None)
    assert page(limit=12) == (made, "12", None)
    assert page(offset=100) == ([], "12", None)


@pytest.mark.parametrize(
    "body",
    [
        {"limit": 0},
        {"limit": 1001},
        {"limit": "x"},
        {"offset": -1},
        {"status": "sleeping"},
        {"sort_by": "metadata"},
        {"sort_order": "sideways"},
        {"select": ["nope"]},
        {"metadata": 1},
        {"values": []},
    ],
)
def test_an_invalid_thread_search_is_refused(http, body):
    refused(http.post("/threads/search", json=body), 422)


def test_a_search_for_malformed_ids_is_refused(http):
    response = http.post("/threads/search", json={"ids": ["bad"]})
    refused(response, response.status_code)
    assert response.status_code in (400, 422)


def test_a_thread_is_busy_while_any_run_is_pending_or_running(http, sync_client, beats, stops_all):
    thread_id = new_thread(http)

    def status():
        return sync_client.threads.get(thread_id)["status"]

    first = run_of(http, thread_id, "steps", {"seconds": 20, "beats": str(beats)})
    assert status() == "busy"
    second = run_of(http, thread_id, "steps", {"seconds": 20})
    beats.wait_for("s1:start")
    # Cancelling the pending run leaves the thread to the running one.
    sync_client.runs.cancel(thread_id, second, wait=True)
    assert status() == "busy"
    sync_client.runs.cancel(thread_id, first)
    until_status(http, thread_id, first, "interrupted")
    assert status() == "interrupted"
    delayed = run_of(http, thread_id, "counter", {"count": 1}, after_seconds=60)
    assert status() == "busy"
    sync_client.runs.cancel(thread_id, delayed, wait=True)
    assert status() == "interrupted"

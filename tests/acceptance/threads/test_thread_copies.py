"""Copies of threads, their storage, and threads that are pruned or expire."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from langgraph_sdk.errors import BadRequestError, NotFoundError

from tests.acceptance.playing import UNKNOWN, new_thread, refused, stops_all, until_status
from tests.waiting import wait_until

__all__ = ["stops_all"]
HISTORY = 1000


@pytest.fixture
def thread_id(http):
    return new_thread(http)


def history(client, thread_id, **options):
    return client.threads.get_history(thread_id, limit=HISTORY, **options)


def without_addresses(state):
    """Return a state without the thread's id in its addresses."""
    return {
        "values": state["values"],
        "next": state["next"],
        "checkpoint_id": state["checkpoint"]["checkpoint_id"],
        "interrupts": state["interrupts"],
        "tasks": [(task["name"], task["interrupts"]) for task in state["tasks"]],
    }


# -- copies


def test_a_copy_has_the_state_and_the_history_but_not_the_runs(sync_client, thread_id):
    sync_client.threads.update(thread_id, metadata={"mine": 1})
    for count in (1, 5):
        sync_client.runs.wait(thread_id, "counter", input={"count": count})
    copy = sync_client.threads.copy(thread_id)
    original = sync_client.threads.get(thread_id)
    assert copy["thread_id"] != thread_id
    for field in ("values", "metadata", "config", "status", "interrupts", "error"):
        assert copy[field] == original[field], field
    copied = [without_addresses(state) for state in history(sync_client, copy["thread_id"])]
    assert copied == [without_addresses(state) for state in history(sync_client, thread_id)]
    assert sync_client.runs.list(copy["thread_id"]) == []
    for state in history(sync_client, copy["thread_id"]):
        assert state["checkpoint"]["thread_id"] == copy["thread_id"]
        assert state["metadata"]["thread_id"] == copy["thread_id"]


def test_a_copy_and_its_original_are_independent(sync_client, thread_id):
    sync_client.runs.wait(thread_id, "counter", input={"count": 1})
    copy_id = sync_client.threads.copy(thread_id)["thread_id"]
    assert sync_client.runs.wait(copy_id, "counter", input={"count": 50}) == {"count": 51}
    assert sync_client.threads.get_state(thread_id)["values"] == {"count": 2}
    sync_client.threads.delete(thread_id)
    assert sync_client.threads.get_state(copy_id)["values"] == {"count": 51}
    assert len(history(sync_client, copy_id)) == 6


def test_a_copy_of_an_interrupted_thread_can_be_resumed(sync_client, thread_id):
    sync_client.runs.wait(thread_id, "questions", input={"topic": "T"})
    copy = sync_client.threads.copy(thread_id)
    assert copy["status"] == "interrupted"
    assert copy["interrupts"] == sync_client.threads.get(thread_id)["interrupts"]
    for each in (copy["thread_id"], thread_id):
        answered = [
            sync_client.runs.wait(each, "questions", command={"resume": answer})
            for answer in ("one", "two")
        ]
        assert answered[-1]["answers"] == ["prepared", "one", "two", "worked"]


def test_a_copy_has_the_states_of_subgraphs(sync_client, thread_id):
    sync_client.runs.wait(thread_id, "family", input={"ask": True, "log": []})
    copy_id = sync_client.threads.copy(thread_id)["thread_id"]

    def inner(each):
        (task,) = sync_client.threads.get_state(each, subgraphs=True)["tasks"]
        return without_addresses(task["state"])

    assert inner(copy_id) == inner(thread_id)


def test_a_copy_of_a_busy_thread_is_not_busy(http, sync_client, thread_id, beats):
    sync_client.runs.wait(thread_id, "steps", input={})
    body = {"beats": str(beats), "seconds": 60}
    run = sync_client.runs.create(thread_id, "steps", input=body)
    until_status(http, thread_id, run["run_id"], "running")
    copy = sync_client.threads.copy(thread_id)
    assert copy["status"] != "busy"
    assert sync_client.threads.get(thread_id)["status"] == "busy"


def test_a_copy_of_an_unknown_thread_is_not_found(http):
    assert "not found" in refused(http.post(f"/threads/{UNKNOWN}/copy"), 409)
    assert "Invalid thread ID" in refused(http.post("/threads/nonsense/copy"), 422)


# -- storage


def test_the_storage_of_the_history_of_a_thread_is_reported(http, sync_client, thread_id):
    def storage():
        return http.get(f"/threads/{thread_id}/storage").json()

    nothing = {"count": 0, "bytes": 0}
    assert storage() == {
        "thread_id": thread_id,
        "total_bytes": 0,
        "checkpoints": nothing,
        "channel_values": {**nothing, "by_channel": {}},
        "pending_writes": nothing,
    }
    sync_client.runs.wait(thread_id, "counter", input={"count": 1, "note": "x" * 10_000})
    stored = storage()
    assert stored["checkpoints"]["count"] == 3
    assert stored["channel_values"]["by_channel"]["note"]["bytes"] > 10_000
    parts = ("checkpoints", "channel_values", "pending_writes")
    assert stored["total_bytes"] == sum(stored[part]["bytes"] for part in parts)
    by_channel = stored["channel_values"]["by_channel"].values()
    assert stored["channel_values"]["bytes"] == sum(amount["bytes"] for amount in by_channel)
    assert "not found" in refused(http.get(f"/threads/{UNKNOWN}/storage"), 404)


# -- pruning


def test_pruned_threads_are_deleted(http, sync_client):
    threads = [new_thread(http) for _ in range(3)]
    pruned = sync_client.threads.prune([*threads[:2], UNKNOWN, threads[0]])
    assert pruned == {"pruned_count": 2}
    for thread_id in threads[:2]:
        with pytest.raises(NotFoundError):
            sync_client.threads.get(thread_id)
    assert sync_client.threads.get(threads[2])["status"] == "idle"


def test_pruning_deletes_a_thread_with_a_running_run(http, sync_client, thread_id, beats):
    body = {"beats": str(beats), "seconds": 60}
    run = sync_client.runs.create(thread_id, "steps", input=body)
    until_status(http, thread_id, run["run_id"], "running")
    assert sync_client.threads.prune([thread_id]) == {"pruned_count": 1}
    with pytest.raises(NotFoundError):
        sync_client.threads.get(thread_id)


def test_pruning_with_keep_latest_keeps_only_the_latest_state(sync_client, thread_id):
    for count in (1, 2, 3):
        sync_client.runs.wait(thread_id, "counter", input={"count": count})
    (latest, *_) = history(sync_client, thread_id)
    pruned = sync_client.threads.prune([thread_id, UNKNOWN], strategy="keep_latest")
    assert pruned == {"pruned_count": 1}
    (kept,) = history(sync_client, thread_id)
    assert without_addresses(kept) == without_addresses(latest)
    assert sync_client.threads.get(thread_id)["values"] == {"count": 4}
    assert sync_client.runs.wait(thread_id, "counter", input={"count": 10}) == {"count": 11}


def test_pruning_with_keep_latest_keeps_a_pending_interrupt(sync_client, thread_id):
    sync_client.runs.wait(thread_id, "questions", input={"topic": "T"})
    sync_client.threads.prune([thread_id], strategy="keep_latest")
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"
    asked = sync_client.runs.wait(thread_id, "questions", command={"resume": "y"})
    assert "second" in asked["__interrupt__"][0]["value"]["question"]


def test_a_prune_during_other_changes_succeeds_or_conflicts(http, sync_client, thread_id):
    sync_client.runs.wait(thread_id, "counter", input={"count": 1})

    def change(number: int) -> int:
        if number % 3:
            return http.patch(f"/threads/{thread_id}", json={"metadata": {"n": number}}).status_code
        body = {"thread_ids": [thread_id], "strategy": "keep_latest"}
        return http.post("/threads/prune", json=body).status_code

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(change, range(150))) <= {200, 409}
    assert len(history(sync_client, thread_id)) == 1


def test_pruning_with_keep_latest_skips_a_busy_thread(http, sync_client, thread_id, beats):
    sync_client.runs.wait(thread_id, "counter", input={"count": 1})
    body = {"beats": str(beats), "seconds": 60}
    run = sync_client.runs.create(thread_id, "steps", input=body)
    until_status(http, thread_id, run["run_id"], "running")
    pruned = sync_client.threads.prune([thread_id], strategy="keep_latest")
    assert pruned == {"pruned_count": 0}
    assert len(history(sync_client, thread_id)) >= 3


def test_a_state_that_depends_on_its_history_is_not_pruned(sync_client, thread_id):
    for item in ("a", "b"):
        sync_client.runs.wait(thread_id, "delta", input={"items": [item]})
    before = history(sync_client, thread_id)
    with pytest.raises(BadRequestError, match="DeltaChannel"):
        sync_client.threads.prune([thread_id], strategy="keep_latest")
    assert history(sync_client, thread_id) == before


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "thread_ids"),
        ({"thread_ids": ["nonsense"]}, "thread_ids"),
        ({"thread_ids": [], "strategy": "some"}, "strategy"),
    ],
)
def test_an_invalid_prune_is_refused(http, body, detail):
    assert detail in refused(http.post("/threads/prune", json=body), 422)


# -- expiry


def test_a_thread_includes_its_ttl_if_requested(http, sync_client):
    made = sync_client.threads.create(ttl={"ttl": 60, "strategy": "keep_latest"})
    path = f"/threads/{made['thread_id']}"
    shown = http.get(path, params={"include": "ttl"}).json()
    assert (shown["ttl"]["strategy"], shown["ttl"]["ttl_minutes"]) == ("keep_latest", 60)
    assert shown["ttl"]["expires_at"] > shown["updated_at"]
    assert "ttl" not in http.get(path).json()
    sync_client.threads.update(made["thread_id"], metadata={}, ttl=90)
    later = http.get(path, params={"include": "ttl"}).json()["ttl"]
    assert (later["strategy"], later["ttl_minutes"]) == ("delete", 90)
    assert later["expires_at"] > shown["ttl"]["expires_at"]
    plain = http.get(f"/threads/{new_thread(http)}", params={"include": "ttl"}).json()
    assert plain["ttl"] is None


def test_using_a_thread_postpones_its_expiry(http, sync_client):
    thread_id = sync_client.threads.create(ttl=60)["thread_id"]

    def expires_at():
        path = f"/threads/{thread_id}"
        return http.get(path, params={"include": "ttl"}).json()["ttl"]["expires_at"]

    uses = [
        lambda: sync_client.runs.wait(thread_id, "counter", input={"count": 1}),
        lambda: sync_client.threads.update_state(thread_id, {"count": 5}),
        lambda: sync_client.threads.update(thread_id, metadata={"a": 1}),
    ]
    for use in uses:
        before = expires_at()
        use()
        assert expires_at() > before


def test_expired_threads_are_deleted_or_pruned_unless_they_are_busy(http, sync_client, beats):
    soon = 0.02
    gone = sync_client.threads.create(ttl=soon)["thread_id"]
    kept = sync_client.threads.create(ttl={"ttl": soon, "strategy": "keep_latest"})["thread_id"]
    busy = sync_client.threads.create(ttl=soon)["thread_id"]
    run = sync_client.runs.create(busy, "steps", input={"beats": str(beats), "seconds": 60})
    until_status(http, busy, run["run_id"], "running")
    for thread_id in (gone, kept):
        for count in (1, 2):
            sync_client.runs.wait(thread_id, "counter", input={"count": count})
    wait_until(lambda: http.get(f"/threads/{gone}").status_code == 404, 40, "the deletion")
    wait_until(lambda: len(history(sync_client, kept)) == 1, 40, "the pruning")
    assert sync_client.threads.get(kept)["values"] == {"count": 3}
    assert sync_client.threads.get(busy)["status"] == "busy"


@pytest.mark.parametrize("ttl", [5, {"ttl": 0}, {"ttl": -1}, {"strategy": "delete"}, {"ttl": "x"}])
def test_an_invalid_ttl_is_refused(http, ttl):
    assert "ttl" in refused(http.post("/threads", json={"ttl": ttl}), 422)


# -- supersteps


def test_a_thread_may_be_created_with_supersteps(sync_client):
    made = sync_client.threads.create(
        graph_id="counter",
        supersteps=[
            {"updates": [{"values": {"count": 3}, "as_node": "__input__"}]},
            {"updates": [{"values": {"count": 3}, "as_node": "__start__"}]},
            {"updates": [{"values": {"count": 4}, "as_node": "inc"}]},
        ],
    )
    assert made["values"] == {"count": 4}
    states = history(sync_client, made["thread_id"])
    assert [state["values"].get("count") for state in states][:2] == [4, 3]
    assert sync_client.runs.wait(made["thread_id"], "counter", input={"count": 9}) == {"count": 10}


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"supersteps": [{"updates": [{"values": {}}]}]}, 400, "graph_id"),
        (
            {
                "metadata": {"graph_id": "counter"},
                "supersteps": [{"updates": [{"values": {"count": 1}, "as_node": "nope"}]}],
            },
            400,
            "nope",
        ),
        ({"supersteps": [{"updates": []}]}, 422, "updates"),
        ({"supersteps": 5}, 422, "supersteps"),
    ],
)
def test_invalid_supersteps_create_no_thread(http, body, status, detail):
    thread_id = "0f0e0d0c-0000-4000-8000-00000000abcd"
    assert detail in refused(http.post("/threads", json={**body, "thread_id": thread_id}), status)
    assert http.get(f"/threads/{thread_id}").status_code == 404


# -- searches for parts of threads


def test_a_search_extracts_parts_of_threads(http, sync_client, thread_id):
    messages = [{"role": "user", "content": "first"}]
    sync_client.runs.wait(thread_id, "chat", input={"messages": messages})
    paths = {
        "last": "values.messages[-1].content",
        "first": "values.messages[0].content",
        "graph": "metadata.graph_id",
        "beyond": "values.messages[7].content",
        "none": "values.nope.deeper",
    }
    (found,) = sync_client.threads.search(ids=[thread_id], extract=paths, select=["thread_id"])
    assert found == {
        "thread_id": thread_id,
        "extracted": {
            "last": "echo: first",
            "first": "first",
            "graph": "chat",
            "beyond": None,
            "none": None,
        },
    }


@pytest.mark.parametrize(
    "extract",
    [
        {"a": "thread_id"},
        {"a": "values..b"},
        {"a": "values[x]"},
        {"a": ""},
        {str(n): "values" for n in range(11)},
        ["values"],
    ],
)
def test_an_invalid_extract_is_refused(http, extract):
    assert "extract" in refused(http.post("/threads/search", json={"extract": extract}), 422)


def test_threads_are_counted_by_the_filters_of_search(http, sync_client):
    tag = {"tag": "counted"}
    threads = [sync_client.threads.create(metadata=tag)["thread_id"] for _ in range(3)]
    sync_client.runs.wait(threads[0], "counter", input={"count": 1})
    sync_client.runs.wait(threads[1], "bad", input={}, raise_error=False)
    assert sync_client.threads.count(metadata=tag) == 3
    assert sync_client.threads.count(metadata=tag, status="error") == 1
    assert sync_client.threads.count(metadata=tag, values={"count": 2}) == 1
    assert sync_client.threads.count(metadata={"tag": "nobody's"}) == 0


def test_a_state_may_be_read_in_part(sync_client, thread_id):
    sync_client.runs.wait(thread_id, "counter", input={"count": 1, "note": "n"})
    whole = sync_client.threads.get_state(thread_id)
    some = sync_client.threads.get_state(thread_id, select=["values.note", "next"])
    assert some == {"values": {"note": "n"}, "next": []}
    at = sync_client.threads.get_state(
        thread_id, checkpoint=whole["checkpoint"], select=["checkpoint"]
    )
    assert at == {"checkpoint": whole["checkpoint"]}
    states = history(sync_client, thread_id, select=["values"])
    assert states[0] == {"values": whole["values"]}
    with pytest.raises(Exception, match="nope"):
        sync_client.threads.get_state(thread_id, select=["nope"])

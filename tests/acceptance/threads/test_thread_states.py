"""States of threads: the newest, earlier ones, those of subgraphs, and updates."""

from __future__ import annotations

from datetime import datetime

import pytest
from langgraph_sdk.errors import BadRequestError, ConflictError

from tests.acceptance.playing import (
    ALL_STEPS,
    UNKNOWN,
    new_thread,
    play,
    refused,
    run_of,
    stops_all,
    wait_for,
)

__all__ = ["stops_all"]

COUNTER_ID = "09d6caf4-2ef3-5a8b-b1a7-114690ed5d45"
FRESH = {
    "values": {},
    "next": [],
    "tasks": [],
    "metadata": None,
    "created_at": None,
    "checkpoint": None,
    "parent_checkpoint": None,
    "interrupts": [],
    "checkpoint_id": None,
    "parent_checkpoint_id": None,
}
#: The next nodes at the six checkpoints of a run of four steps, newest first.
STEP_NEXTS = [[], ["s4"], ["s3"], ["s2"], ["s1"], ["__start__"]]


def history_of(http, thread_id, **body):
    response = http.post(f"/threads/{thread_id}/history", json={"limit": 100, **body})
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(states):
    return [state["checkpoint_id"] for state in states]


@pytest.fixture
def stepped(http):
    """Return the id of a thread on which `steps` has run."""
    thread_id = new_thread(http)
    wait_for(http, thread_id, "steps", {"tag": ""})
    return thread_id


def test_a_new_thread_has_an_empty_state_and_no_history(http, sync_client):
    thread_id = new_thread(http)
    assert sync_client.threads.get_state(thread_id) == FRESH
    assert sync_client.threads.get_state(thread_id, subgraphs=True) == FRESH
    assert sync_client.threads.get_history(thread_id) == []
    assert http.get(f"/threads/{thread_id}/history").json() == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "state", None),
        ("GET", f"state/{UNKNOWN}", None),
        ("POST", "state/checkpoint", {"checkpoint": {}}),
        ("POST", "state", {"values": {}}),
        ("GET", "history", None),
        ("POST", "history", {}),
    ],
)
def test_states_of_an_unknown_thread_are_not_found(http, method, path, body):
    response = http.request(method, f"/threads/{UNKNOWN}/{path}", json=body)
    assert refused(response, 404) == f"Thread with ID {UNKNOWN} not found"
    response = http.request(method, f"/threads/bad/{path}", json=body)
    assert refused(response, 422) == "Invalid thread ID: must be a UUID"


def test_a_state_has_every_field_of_a_thread_state(http, sync_client):
    thread_id = new_thread(http)
    run_id = run_of(http, thread_id, "counter", {"count": 9}, metadata={"m": 1})
    sync_client.runs.join(thread_id, run_id)
    state = sync_client.threads.get_state(thread_id)
    assert state.keys() == FRESH.keys()
    assert (state["values"], state["next"], state["tasks"]) == ({"count": 10}, [], [])
    assert state["interrupts"] == []
    assert state["checkpoint"] == {
        "checkpoint_id": state["checkpoint_id"],
        "thread_id": thread_id,
        "checkpoint_ns": "",
    }
    assert state["parent_checkpoint"] == {
        "checkpoint_id": state["parent_checkpoint_id"],
        "thread_id": thread_id,
        "checkpoint_ns": "",
    }
    datetime.fromisoformat(state["created_at"])
    expected = {
        "graph_id": "counter",
        "assistant_id": COUNTER_ID,
        "created_by": "system",
        "run_id": run_id,
        "run_attempt": 1,
        "source": "loop",
        "step": 1,
        "parents": {},
        "m": 1,
    }
    assert {key: state["metadata"].get(key) for key in expected} == expected


def test_the_metadata_of_a_state_names_its_thread(sync_client, stepped):
    assert sync_client.threads.get_state(stepped)["metadata"]["thread_id"] == stepped


def test_a_state_before_the_end_shows_its_tasks(http):
    thread_id = new_thread(http)
    wait_for(http, thread_id, "counter", {"count": 9})
    before = history_of(http, thread_id)[1]
    assert (before["values"], before["next"]) == ({"count": 9}, ["inc"])
    (task,) = before["tasks"]
    assert {key: task[key] for key in task.keys() - {"id"}} == {
        "name": "inc",
        "path": ["__pregel_pull", "inc"],
        "error": None,
        "interrupts": [],
        "checkpoint": None,
        "state": None,
        "result": {"count": 10},
    }


def test_a_failed_task_shows_its_error(http):
    thread_id = new_thread(http)
    wait_for(http, thread_id, "bad", {"count": 1})
    state = http.get(f"/threads/{thread_id}/state").json()
    assert state["next"] == ["bad"]
    assert state["tasks"][0]["error"] == "ValueError('boom from bad node')"


def test_an_interrupted_task_shows_its_interrupt(http):
    thread_id = new_thread(http)
    waited = wait_for(http, thread_id, "questions", {"topic": "tea"})
    state = http.get(f"/threads/{thread_id}/state").json()
    asked = {
        "id": waited["__interrupt__"][0]["id"],
        "value": {"question": "first about tea?"},
    }
    assert state["next"] == ["ask"]
    assert state["tasks"][0]["interrupts"] == [asked]
    assert state["interrupts"] == [asked]


def test_the_state_is_complete_although_wait_returns_only_the_output(http):
    thread_id = new_thread(http)
    assert wait_for(http, thread_id, "teller", {"topic": "tea"}) == {"told": "plain tea"}
    values = http.get(f"/threads/{thread_id}/state").json()["values"]
    assert values == {"topic": "tea", "draft": "not for others", "told": "plain tea"}


def test_a_state_is_read_at_a_checkpoint_by_its_id_or_by_the_checkpoint(make_client, stepped):
    async def scene(client):
        for old in await client.threads.get_history(stepped, limit=100):
            by_id = await client.threads.get_state(stepped, checkpoint_id=old["checkpoint_id"])
            by_checkpoint = await client.threads.get_state(stepped, checkpoint=old["checkpoint"])
            for field in ("values", "next", "metadata", "created_at", "checkpoint_id"):
                assert by_id[field] == old[field]
                assert by_checkpoint[field] == old[field]
            assert by_id["parent_checkpoint_id"] == old["parent_checkpoint_id"]

    play(make_client, scene)


def test_an_empty_checkpoint_reads_the_newest_state(http, stepped):
    newest = http.get(f"/threads/{stepped}/state").json()
    response = http.post(f"/threads/{stepped}/state/checkpoint", json={"checkpoint": {}})
    assert response.json() == newest
    refused(http.post(f"/threads/{stepped}/state/checkpoint", json={}), 422)
    refused(http.post(f"/threads/{stepped}/state/checkpoint", json={"checkpoint": 5}), 422)


def test_history_is_newest_first_and_linked(sync_client, stepped):
    history = sync_client.threads.get_history(stepped)
    assert [state["next"] for state in history] == STEP_NEXTS
    assert [state["values"].get("steps", []) for state in history] == [
        ALL_STEPS,
        ALL_STEPS[:3],
        ALL_STEPS[:2],
        ALL_STEPS[:1],
        [],
        [],
    ]
    assert [state["metadata"]["step"] for state in history] == [4, 3, 2, 1, 0, -1]
    assert [state["parent_checkpoint_id"] for state in history] == [*ids_of(history)[1:], None]


def test_history_is_limited(http, sync_client, stepped):
    whole = history_of(http, stepped)
    assert sync_client.threads.get_history(stepped, limit=2) == whole[:2]
    path = f"/threads/{stepped}/history"
    assert http.get(path, params={"limit": 3}).json() == whole[:3]
    assert http.get(path, params={"limit": 0}).json() == []
    # The default is one, as in the reference.
    assert http.get(path).json() == whole[:1]
    assert http.post(path, json={}).json() == whole[:1]
    assert "limit" in refused(http.get(path, params={"limit": "bad"}), 422)
    for limit in (0, 1001, "2", -1):
        refused(http.post(path, json={"limit": limit}), 422)


def test_history_continues_before_a_checkpoint_given_in_any_form(make_client, http, stepped):
    whole = history_of(http, stepped)
    third = whole[2]

    async def scene(client):
        for before in (third["checkpoint"], third["checkpoint_id"]):
            assert await client.threads.get_history(stepped, limit=100, before=before) == whole[3:]
            page = await client.threads.get_history(stepped, limit=2, before=before)
            assert page == whole[3:5]
        oldest = whole[-1]["checkpoint"]
        assert await client.threads.get_history(stepped, limit=100, before=oldest) == []

    play(make_client, scene)
    config = {"configurable": {"checkpoint_id": third["checkpoint_id"]}}
    assert history_of(http, stepped, before=config) == whole[3:]
    params = {"limit": 100, "before": third["checkpoint_id"]}
    assert http.get(f"/threads/{stepped}/history", params=params).json() == whole[3:]


def test_history_is_filtered_by_metadata(sync_client, http, stepped):
    whole = history_of(http, stepped)
    assert sync_client.threads.get_history(stepped, metadata={"source": "input"}) == whole[-1:]
    assert sync_client.threads.get_history(stepped, metadata={"step": 2}) == [whole[2]]
    assert sync_client.threads.get_history(stepped, metadata={"step": 99}) == []


def test_an_interrupted_subgraph_is_shown_in_the_state_of_its_parent(make_client, http):
    thread_id = new_thread(http)
    wait_for(http, thread_id, "family", {"ask": True})

    async def scene(client):
        nested = await client.threads.get_state(thread_id, subgraphs=True)
        (task,) = nested["tasks"]
        assert (task["name"], task["checkpoint"]) == ("child", None)
        child = task["state"]
        assert child["values"] == {"ask": True, "log": ["p1", "c1"]}
        assert child["next"] == ["child_two"]
        assert child["tasks"][0]["interrupts"][0]["value"] == "child asks"

        flat = await client.threads.get_state(thread_id)
        (task,) = flat["tasks"]
        assert task["state"] is None
        assert task["checkpoint"].keys() == {"thread_id", "checkpoint_ns"}
        assert task["checkpoint"]["thread_id"] == thread_id
        assert task["checkpoint"]["checkpoint_ns"].startswith("child")

        where = task["checkpoint"]
        at = await client.threads.get_state(thread_id, checkpoint=where)
        assert (at["values"], at["next"]) == (child["values"], child["next"])
        history = await client.threads.get_history(thread_id, limit=100, checkpoint=where)
        assert [state["next"] for state in history] == [
            ["child_two"],
            ["child_one"],
            ["__start__"],
        ]
        assert history[0]["checkpoint_id"] == child["checkpoint_id"]

    play(make_client, scene)


def test_an_interrupted_subgraph_leaves_the_values_of_its_parent_unchanged(http):
    for subgraphs in (False, True):
        thread_id = new_thread(http)
        wait_for(http, thread_id, "family", {"ask": True}, stream_subgraphs=subgraphs)
        thread = http.get(f"/threads/{thread_id}").json()
        assert thread["values"] == {"ask": True, "log": ["p1"]}
        assert http.get(f"/threads/{thread_id}/state").json()["values"] == thread["values"]
        ended = wait_for(http, thread_id, "family", command={"resume": "yes"})
        assert "c2:yes" in ended["log"]
        assert ended["log"][-1] == "p2"


def test_an_update_becomes_the_newest_state_and_the_threads_values(sync_client, http, stepped):
    before = sync_client.threads.get_state(stepped)
    saved = sync_client.threads.update_state(stepped, {"steps": ["mine"]})
    state = sync_client.threads.get_state(stepped)
    assert saved["checkpoint"] == {
        "thread_id": stepped,
        "checkpoint_ns": "",
        "checkpoint_id": state["checkpoint_id"],
    }
    assert saved["configurable"] == saved["checkpoint"]
    assert saved["checkpoint_id"] == state["checkpoint_id"]
    assert saved.keys() == {"checkpoint", "configurable", "checkpoint_id"}
    assert state["values"]["steps"] == [*ALL_STEPS, "mine"]
    assert state["parent_checkpoint_id"] == before["checkpoint_id"]
    assert state["metadata"]["source"] == "update"
    thread = sync_client.threads.get(stepped)
    assert thread["values"]["steps"] == [*ALL_STEPS, "mine"]
    assert thread["status"] == "idle"


def test_an_update_as_a_node_continues_after_that_node(make_client, http, beats):
    thread_id = new_thread(http)
    wait_for(http, thread_id, "steps", {"beats": str(beats)}, interrupt_before=["s2"])

    async def scene(client):
        await client.threads.update_state(thread_id, {"steps": ["mine"]}, as_node="s3")
        state = await client.threads.get_state(thread_id)
        assert (state["values"]["steps"], state["next"]) == (["s1", "mine"], ["s4"])
        thread = await client.threads.get(thread_id)
        assert (thread["status"], thread["values"]["steps"]) == ("interrupted", ["s1", "mine"])
        return await client.runs.wait(thread_id, "steps", input=None)

    assert play(make_client, scene)["steps"] == ["s1", "mine", "s4"]
    assert [name for name in beats.names() if name.endswith(":start")] == ["s1:start", "s4:start"]


def test_an_update_as_the_last_node_makes_the_thread_idle(http, sync_client):
    thread_id = new_thread(http)
    wait_for(http, thread_id, "questions", {"topic": "tea"})
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"
    sync_client.threads.update_state(thread_id, {"answers": ["skipped"]}, as_node="work")
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["interrupts"]) == ("idle", {})
    assert thread["values"]["answers"] == ["prepared", "skipped"]


@pytest.mark.parametrize("by", ["checkpoint", "checkpoint_id"])
def test_an_update_of_an_old_checkpoint_forks_from_it(sync_client, http, stepped, by):
    whole = history_of(http, stepped)
    old = whole[2]
    assert old["next"] == ["s3"]
    saved = sync_client.threads.update_state(stepped, {"steps": ["fork"]}, **{by: old[by]})
    state = sync_client.threads.get_state(stepped)
    assert state["checkpoint_id"] == saved["checkpoint_id"]
    assert state["parent_checkpoint_id"] == old["checkpoint_id"]
    assert (state["values"]["steps"], state["next"]) == (["s1", "s2", "fork"], ["s3"])
    thread = sync_client.threads.get(stepped)
    assert (thread["status"], thread["values"]["steps"]) == ("interrupted", ["s1", "s2", "fork"])
    # The old branch is still there.
    assert set(ids_of(whole)) < set(ids_of(history_of(http, stepped)))
    assert wait_for(http, stepped, "steps")["steps"] == ["s1", "s2", "fork", "s3", "s4"]


def test_an_update_that_the_graph_rejects_writes_nothing(http, stepped):
    before = history_of(http, stepped)
    thread = http.get(f"/threads/{stepped}").json()
    path = f"/threads/{stepped}/state"
    for node in ("nope", "__end__"):
        detail = refused(http.post(path, json={"values": {"steps": ["x"]}, "as_node": node}), 400)
        assert detail == f"Node {node} does not exist"
    for values in ({"steps": 5}, [1, 2], "text"):
        refused(http.post(path, json={"values": values}), 400)
    refused(http.post(path, json={"values": {}, "checkpoint": 5}), 422)
    refused(http.post(path, json={"values": {}, "checkpoint_id": "bad"}), 422)
    refused(http.post(path, json={"values": {}, "as_node": 5}), 422)
    assert history_of(http, stepped) == before
    assert http.get(f"/threads/{stepped}").json() == thread


def test_an_update_of_an_unknown_checkpoint_leaves_the_state_unchanged(http, stepped):
    before = http.get(f"/threads/{stepped}/state").json()
    body = {"values": {"steps": ["x"]}, "checkpoint_id": UNKNOWN}
    response = http.post(f"/threads/{stepped}/state", json=body)
    assert 400 <= response.status_code < 500
    assert http.get(f"/threads/{stepped}/state").json() == before


def test_an_update_of_a_thread_without_a_graph_is_refused(http, sync_client):
    thread_id = new_thread(http)
    with pytest.raises(BadRequestError) as refusal:
        sync_client.threads.update_state(thread_id, {"count": 1})
    detail = refusal.value.response.json()["detail"]
    assert detail.startswith(f"Thread '{thread_id}' has no assigned graph ID.")
    named = sync_client.threads.create(graph_id="counter")["thread_id"]
    sync_client.threads.update_state(named, {"count": 41}, as_node="inc")
    assert sync_client.threads.get(named)["values"] == {"count": 41}


def test_a_busy_thread_cannot_be_updated(sync_client, http, beats, stops_all):
    thread_id = new_thread(http)
    run_id = run_of(http, thread_id, "steps", {"seconds": 20, "beats": str(beats)})
    beats.wait_for("s1:start")
    with pytest.raises(ConflictError) as conflict:
        sync_client.threads.update_state(thread_id, {"steps": ["x"]})
    detail = conflict.value.response.json()["detail"]
    assert detail.startswith(f"Thread {thread_id} has in-flight runs")
    assert "kwargs" not in detail
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    sync_client.threads.update_state(thread_id, {"steps": ["x"]})
    assert sync_client.threads.get(thread_id)["values"]["steps"] == ["x"]


def test_a_state_can_be_read_during_a_run(http, sync_client, beats, stops_all):
    thread_id = new_thread(http)
    run_of(
        http,
        thread_id,
        "steps",
        {"seconds": 0.3, "beats": str(beats)},
        durability="sync",
    )
    beats.wait_for("s2:start")
    state = sync_client.threads.get_state(thread_id)
    assert state["values"]["steps"][:1] == ["s1"]
    assert state["next"]


def test_patching_a_state_merges_the_threads_metadata(http):
    thread_id = new_thread(http, metadata={"a": 1, "b": 1})
    answer = http.patch(f"/threads/{thread_id}/state", json={"metadata": {"b": 2, "c": 3}})
    assert (answer.status_code, answer.content) == (204, b"")
    metadata = http.get(f"/threads/{thread_id}").json()["metadata"]
    assert metadata == {"a": 1, "b": 2, "c": 3}
    assert http.get(f"/threads/{thread_id}/history?limit=10").json() == []


UNREADABLE = [
    ("hasty_relay", "log", {"input": {"log": 5}}),
    ("hasty_relay", "log", {"input": {"log": "text"}}),
    ("hasty_relay", "log", {"command": {"update": {"log": 5}}}),
    ("chat", "messages", {"input": {"messages": [{"nonsense": 1}]}}),
]
GOOD = {"log": ["a"], "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(("graph", "key", "run"), UNREADABLE)
@pytest.mark.parametrize("is_used", [False, True], ids=["new", "used"])
def test_an_input_that_a_reducer_rejects_leaves_the_thread_readable(http, graph, key, run, is_used):
    """LangGraph keeps such an input in the checkpoint, and fails to read that every time."""
    thread_id = new_thread(http)
    before = wait_for(http, thread_id, graph, {key: GOOD[key]})[key] if is_used else []
    body = {"assistant_id": graph, **run}
    assert "__error__" in http.post(f"/threads/{thread_id}/runs/wait", json=body).json()
    thread = http.get(f"/threads/{thread_id}").json()
    assert (thread["status"], (thread["values"] or {}).get(key, [])) == ("error", before)
    state = http.get(f"/threads/{thread_id}/state").json()
    assert state["values"].get(key, []) == before
    history_of(http, thread_id)
    found = http.post("/threads/search", json={"ids": [thread_id]}).json()
    assert [one["thread_id"] for one in found] == [thread_id]
    assert http.post("/threads/count", json={"values": {key: "x"}}).json() == 0
    copy = http.post(f"/threads/{thread_id}/copy").json()
    assert (copy["values"] or {}).get(key, []) == before
    if "input" in run:
        wait_for(http, thread_id, graph, {key: GOOD[key]})
        assert http.get(f"/threads/{thread_id}").json()["status"] == "idle"


def test_an_input_that_the_states_schema_rejects_leaves_the_thread_readable(http):
    """The schema rejects it when a node gets it, and whenever LangGraph looks for the next node."""
    thread_id = new_thread(http)
    assert wait_for(http, thread_id, "strict", {"name": "you"}) == {"name": "hello you"}
    assert "__error__" in wait_for(http, thread_id, "strict", {"name": 5})
    thread = http.get(f"/threads/{thread_id}").json()
    assert (thread["status"], thread["values"]) == ("error", {"name": 5})
    state = http.get(f"/threads/{thread_id}/state").json()
    assert (state["values"], state["next"], state["tasks"]) == ({"name": 5}, [], [])
    newest, *before = history_of(http, thread_id)
    assert newest["checkpoint_id"] == state["checkpoint_id"]
    assert {"name": "hello you"} in [state["values"] for state in before]
    # A run from an earlier checkpoint continues without that input.
    good = next(one for one in before if one["values"] == {"name": "hello you"} and not one["next"])
    at = {"checkpoint_id": good["checkpoint_id"]}
    forked = wait_for(http, thread_id, "strict", {"name": "again"}, checkpoint=at)
    assert forked == {"name": "hello again"}
    assert http.get(f"/threads/{thread_id}").json()["status"] == "idle"


def test_a_factorys_graph_is_read_updated_and_resumed_with_the_config_of_its_assistant(http):
    made = {"graph_id": "made_named", "config": {"configurable": {"node": "adder"}}}
    assistant = http.post("/assistants", json=made).json()["assistant_id"]
    thread_id = new_thread(http)
    wait_for(http, thread_id, assistant, {"count": 1}, interrupt_before=["adder"])
    assert http.get(f"/threads/{thread_id}/state").json()["next"] == ["adder"]
    # The thread keeps the assistant's configurable for runs of the graph's own assistant, too.
    assert wait_for(http, thread_id, "made_named", None) == {"count": 2}
    body = {"values": {"count": 7}, "as_node": "adder"}
    assert http.post(f"/threads/{thread_id}/state", json=body).status_code == 200
    state = http.get(f"/threads/{thread_id}/state").json()
    assert (state["values"], state["next"]) == ({"count": 7}, [])


def test_a_factorys_graph_is_read_and_updated_with_the_config_of_the_last_run(http):
    thread_id = new_thread(http)
    config = {"configurable": {"node": "adder"}}
    assert wait_for(http, thread_id, "made_named", {"count": 1}, config=config) == {"count": 2}
    assert http.get(f"/threads/{thread_id}/state").json()["values"] == {"count": 2}
    body = {"values": {"count": 7}, "as_node": "adder"}
    assert http.post(f"/threads/{thread_id}/state", json=body).status_code == 200
    state = http.get(f"/threads/{thread_id}/state").json()
    assert (state["values"], state["next"]) == ({"count": 7}, [])
    assert len(history_of(http, thread_id)) == 4

"""Runs on a thread: create, list, read, wait for, cancel, delete, and all their options."""

from __future__ import annotations

import json
import time
import uuid
from datetime import datetime

import pytest
from langgraph_sdk.errors import ConflictError, NotFoundError

from tests.acceptance.playing import (
    ALL_STEPS,
    ENDED,
    UNKNOWN,
    new_thread,
    play,
    refused,
    run_of,
    status_of,
    stops_all,
    until_status,
    wait_for,
)
from tests.waiting import wait_until

__all__ = ["stops_all"]

COUNTER_ID = "09d6caf4-2ef3-5a8b-b1a7-114690ed5d45"
#: The fields in the List Runs document.
FIELDS = {
    "run_id",
    "thread_id",
    "assistant_id",
    "created_at",
    "updated_at",
    "status",
    "metadata",
    "kwargs",
    "multitask_strategy",
}
NO_MATCH = (
    "No matching runs to cancel. Please verify the thread ID and run IDs are correct, and the runs "
    "haven't been deleted or completed."
)
BUSY = (
    "Thread is already running a task. Wait for it to finish or choose a different multitask "
    "strategy."
)
_LISTENING_SECONDS = 0.3


@pytest.fixture
def thread_id(http):
    return new_thread(http)


def starts(beats) -> list[str]:
    return [name for name in beats.names() if name.endswith(":start")]


def start_long(http, thread_id, beats, **options):
    """Start a run, wait until it is in its first step, and return its id."""
    run_id = run_of(http, thread_id, "steps", {"seconds": 20, "beats": str(beats)}, **options)
    beats.wait_for("s1:start")
    until_status(http, thread_id, run_id, "running")
    return run_id


def history_of(http, thread_id):
    return http.post(f"/threads/{thread_id}/history", json={"limit": 100}).json()


# --- create ---------------------------------------------------------------------------------


def test_a_created_run_has_every_field_and_a_content_location(http, thread_id):
    body = {
        "assistant_id": "counter",
        "input": {"count": 1},
        "config": {"tags": ["x"], "configurable": {"by": 2}},
        "metadata": {"m": 1},
    }
    response = http.post(f"/threads/{thread_id}/runs", json=body)
    assert response.status_code == 200
    run = response.json()
    assert run.keys() == FIELDS
    assert response.headers["content-location"] == f"/threads/{thread_id}/runs/{run['run_id']}"
    assert uuid.UUID(run["run_id"]).version == 7
    assert run["thread_id"] == thread_id
    assert run["assistant_id"] == COUNTER_ID
    assert run["status"] == "pending"
    assert run["multitask_strategy"] == "enqueue"
    assert run["metadata"] == {
        "created_by": "system",
        "graph_id": "counter",
        "assistant_id": COUNTER_ID,
        "m": 1,
    }
    for field in ("created_at", "updated_at"):
        assert datetime.fromisoformat(run[field]).utcoffset().total_seconds() == 0
    kwargs = run["kwargs"]
    configurable = kwargs["config"].pop("configurable")
    metadata = kwargs["config"].pop("metadata")
    assert kwargs == {
        "input": {"count": 1},
        "command": None,
        "config": {"tags": ["x"]},
        "context": {"by": 2},
        "stream_mode": ["values"],
        "interrupt_before": None,
        "interrupt_after": None,
        "webhook": None,
        "feedback_keys": None,
        "temporary": False,
        "subgraphs": False,
        "resumable": False,
        "checkpoint_during": True,
        "durability": "async",
    }
    expected = {
        "by": 2,
        "run_id": run["run_id"],
        "thread_id": thread_id,
        "graph_id": "counter",
        "assistant_id": COUNTER_ID,
        "user_id": "",
        "__after_seconds__": 0,
    }
    assert {key: configurable.get(key) for key in expected} == expected
    assert metadata == run["metadata"]


def test_a_thread_gives_its_metadata_and_its_first_assistants_configurable(http):
    """As LangGraph's server: the assistant's values, then the thread's, then the run's own."""

    def assistant(**configurable):
        body = {"graph_id": "counter", "config": {"configurable": configurable}}
        return http.post("/assistants", json=body).json()["assistant_id"]

    def run(assistant_id, **options):
        body = {"assistant_id": assistant_id, "input": {"count": 1}, **options}
        made = http.post(f"/threads/{thread_id}/runs", json=body)
        assert made.status_code == 200, made.text
        return made.json()

    def open_part(run):
        configurable = run["kwargs"]["config"]["configurable"]
        return {key: configurable[key] for key in ("by", "tone") if key in configurable}

    metadata = {"user": "ann", "project": "x"}
    thread_id = http.post("/threads", json={"metadata": metadata}).json()["thread_id"]
    first = run(assistant(by=2, tone="dry"), metadata={"project": "y"}, after_seconds=3600)
    assert open_part(first) == {"by": 2, "tone": "dry"}
    for place in (first["metadata"], first["kwargs"]["config"]["metadata"]):
        assert (place["user"], place["project"]) == ("ann", "y")
    # Chat interfaces find a thread by its graph as soon as its first run is created.
    found = http.post("/threads/search", json={"metadata": {"graph_id": "counter", **metadata}})
    assert [t["thread_id"] for t in found.json()] == [thread_id]
    other = assistant(by=3)
    options = [{}, {"multitask_strategy": "interrupt"}]  # one statement, and a transaction
    for more in options:
        assert open_part(run(other, **more)) == {"by": 2, "tone": "dry"}
    own = run(other, config={"configurable": {"by": 5}})
    assert open_part(own) == {"by": 5, "tone": "dry"}
    assert open_part(run(other)) == {"by": 2, "tone": "dry"}


@pytest.mark.parametrize(
    ("options", "tone"),
    [
        ({}, "plain"),
        ({"context": {"tone": "dry", "other": 1}}, "dry"),
        ({"config": {"configurable": {"user_id": "ann"}}}, "plain"),
        ({"config": {"configurable": {"tone": "dry", "user_id": "ann"}}}, "dry"),
    ],
)
def test_a_graph_gets_its_context_with_defaults_and_without_other_keys(http, options, tone):
    body = {"assistant_id": "toned", "input": {}, **options}
    assert http.post("/runs/wait", json=body).json()["note"] == f"Tone(tone='{tone}')"


def test_the_sdk_reads_the_run_id_from_the_headers(make_client):
    async def scene(client):
        thread = await client.threads.create()
        seen = []
        run = await client.runs.create(
            thread["thread_id"], "counter", input={"count": 1}, on_run_created=seen.append
        )
        waited = await client.runs.wait(
            thread["thread_id"], "counter", input={"count": 1}, on_run_created=seen.append
        )
        assert waited == {"count": 2}
        runs = await client.runs.list(thread["thread_id"])
        assert [s["run_id"] for s in seen] == [run["run_id"], runs[0]["run_id"]]
        assert [s["thread_id"] for s in seen] == [thread["thread_id"]] * 2

    play(make_client, scene)


def test_a_run_on_an_unknown_thread_is_not_found_unless_it_may_create_it(http, sync_client):
    wanted = str(uuid.uuid4())
    body = {"assistant_id": "counter", "input": {"count": 1}}
    for path in ("runs", "runs/wait", "runs/stream"):
        detail = refused(http.post(f"/threads/{wanted}/{path}", json=body), 404)
        assert detail == "Thread or assistant not found."
        assert refused(http.post(f"/threads/bad/{path}", json=body), 422) == "Invalid thread ID"
    refused(http.get(f"/threads/{wanted}"), 404)
    made = sync_client.runs.wait(wanted, "counter", input={"count": 1}, if_not_exists="create")
    assert made == {"count": 2}
    again = sync_client.runs.wait(wanted, "counter", input={"count": 5}, if_not_exists="create")
    assert again == {"count": 6}
    assert len(sync_client.runs.list(wanted)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"multitask_strategy": "bad"},
        {"stream_mode": "bad"},
        {"stream_mode": ["values", "bad"]},
        {"stream_mode": "tools"},
        {"stream_mode": "tools"},
        {"durability": "bad"},
        {"if_not_exists": "bad"},
        {"after_seconds": "x"},
        {"checkpoint_id": "bad"},
        {"checkpoint": {"checkpoint_id": "bad"}},
        {"checkpoint": 5},
        {"command": 5},
        {"command": {"goto": 5}},
        {"command": {"update": "text"}},
        {"config": []},
        {"config": {"recursion_limit": "many"}},
        {"config": {"recursion_limit": 0}},
        {"config": {"tags": "x"}},
        {"config": {"configurable": 5}},
        {"context": 5},
        {"metadata": []},
        {"interrupt_before": 5},
        {"run_id": "bad"},
        {"timeout_seconds": 0},
        {"stream_subgraphs": "yes"},
    ],
    ids=str,
)
def test_an_invalid_run_is_refused_and_nothing_is_created(http, thread_id, options):
    body = {"assistant_id": "counter", "input": {"count": 1}, **options}
    refused(http.post(f"/threads/{thread_id}/runs", json=body), 422)
    assert http.get(f"/threads/{thread_id}/runs").json() == []


def test_a_run_with_context_and_configurable_is_refused(http, thread_id):
    body = {
        "assistant_id": "counter",
        "context": {"by": 1},
        "config": {"configurable": {"by": 2}},
    }
    detail = refused(http.post(f"/threads/{thread_id}/runs", json=body), 400)
    assert detail.startswith("Cannot specify both configurable and context.")


def test_a_create_repeated_with_its_run_id_returns_the_same_run(http, thread_id, beats):
    run_id = str(uuid.uuid4())
    body = {
        "assistant_id": "steps",
        "input": {"beats": str(beats)},
        "run_id": run_id,
        "multitask_strategy": "reject",
    }
    first = http.post(f"/threads/{thread_id}/runs", json=body)
    assert first.json()["run_id"] == run_id
    again = http.post(f"/threads/{thread_id}/runs", json=body)
    assert (again.status_code, again.json()["run_id"]) == (200, run_id)
    until_status(http, thread_id, run_id, "success")
    late = http.post(f"/threads/{thread_id}/runs/wait", json=body)
    assert late.json()["steps"] == ALL_STEPS
    assert [run["run_id"] for run in http.get(f"/threads/{thread_id}/runs").json()] == [run_id]
    assert starts(beats) == ["s1:start", "s2:start", "s3:start", "s4:start"]
    elsewhere = new_thread(http)
    refused(http.post(f"/threads/{elsewhere}/runs", json=body), 409)
    assert http.get(f"/threads/{elsewhere}/runs").json() == []


def test_a_repeated_create_does_not_recreate_a_rolled_back_run(http, thread_id, beats, stops_all):
    run_id = str(uuid.uuid4())
    start_long(http, thread_id, beats, run_id=run_id)
    path = f"/threads/{thread_id}/runs"
    response = http.post(f"{path}/{run_id}/cancel", params={"action": "rollback", "wait": 1})
    assert response.status_code == 200
    body = {"assistant_id": "counter", "input": {"count": 1}, "run_id": run_id}
    refused(http.post(path, json=body), 404)
    assert http.get(path).json() == []


# --- list, get, delete ----------------------------------------------------------------------


def test_runs_are_listed_newest_first_ten_at_a_time(http, sync_client, thread_id):
    made = [run_of(http, thread_id, "counter", {"count": n}) for n in range(12)][::-1]
    path = f"/threads/{thread_id}/runs"

    def listed(**params):
        response = http.get(path, params=params)
        assert response.status_code == 200
        return [run["run_id"] for run in response.json()]

    assert listed() == made[:10]
    assert listed(limit=3) == made[:3]
    assert listed(limit=3, offset=2) == made[2:5]
    assert listed(offset=10) == made[10:]
    assert listed(offset=12) == []
    assert listed(limit=0) == []
    assert listed(limit=1000) == made
    assert [r["run_id"] for r in sync_client.runs.list(thread_id, limit=2, offset=1)] == made[1:3]
    assert all(run.keys() == FIELDS for run in http.get(path).json())
    assert "x-pagination-total" not in http.get(path).headers


def test_the_limit_of_a_list_of_runs_has_no_maximum(http, thread_id):
    run_id = run_of(http, thread_id, "counter", {"count": 1})
    response = http.get(f"/threads/{thread_id}/runs", params={"limit": 1001})
    assert response.status_code == 200, response.text
    assert [run["run_id"] for run in response.json()] == [run_id]


def test_runs_are_listed_by_status(http, sync_client, thread_id, beats, stops_all):
    wait_for(http, thread_id, "bad", {"count": 1})
    wait_for(http, thread_id, "counter", {"count": 1})
    wait_for(http, thread_id, "steps", {"seconds": 20}, timeout_seconds=0.2)
    running = start_long(http, thread_id, beats)
    pending = run_of(http, thread_id, "counter", {"count": 1})
    cancelled = run_of(http, thread_id, "counter", {"count": 1})
    sync_client.runs.cancel(thread_id, cancelled, wait=True)

    def listed(status):
        runs = sync_client.runs.list(thread_id, status=status)
        assert {run["status"] for run in runs} == {status}
        return [run["run_id"] for run in runs]

    assert listed("running") == [running]
    assert listed("pending") == [pending]
    assert listed("interrupted") == [cancelled]
    assert len(listed("error")) == len(listed("success")) == len(listed("timeout")) == 1


def test_a_list_of_runs_has_only_the_selected_fields(http, make_client, thread_id):
    run_id = run_of(http, thread_id, "counter", {"count": 1})
    path = f"/threads/{thread_id}/runs"
    both = [("select", "run_id"), ("select", "multitask_strategy")]
    expected = {"run_id": run_id, "multitask_strategy": "enqueue"}
    assert http.get(path, params=both).json() == [expected]

    async def scene(client):
        for field in FIELDS:
            (run,) = await client.runs.list(thread_id, select=[field])
            assert run.keys() == {field}

    play(make_client, scene)


@pytest.mark.parametrize(
    "query",
    [
        "limit=bad",
        "limit=-1",
        "limit=1.5",
        "offset=bad",
        "offset=-1",
        "status=bad",
        "status=SUCCESS",
        "select=nope",
        "select=run_id&select=nope",
    ],
)
def test_an_invalid_list_query_is_refused(http, thread_id, query):
    refused(http.get(f"/threads/{thread_id}/runs?{query}"), 422)


def test_an_unknown_run_is_not_found(http, sync_client, thread_id):
    elsewhere = new_thread(http)
    run_id = run_of(http, elsewhere, "counter", {"count": 1})
    unknown_thread = f"Thread with ID {UNKNOWN} not found"
    assert refused(http.get(f"/threads/{UNKNOWN}/runs"), 404) == unknown_thread
    assert refused(http.get(f"/threads/{UNKNOWN}/runs/{run_id}"), 404) == unknown_thread
    assert refused(http.get(f"/threads/{thread_id}/runs/{run_id}"), 404) == "Not Found"
    assert refused(http.get(f"/threads/{thread_id}/runs/{UNKNOWN}"), 404) == "Not Found"
    for path in (run_id, UNKNOWN):
        detail = refused(http.delete(f"/threads/{thread_id}/runs/{path}"), 404)
        assert detail == "Run not found"
        for follow in ("join", "stream"):
            refused(http.get(f"/threads/{thread_id}/runs/{path}/{follow}"), 404)
    with pytest.raises(NotFoundError):
        sync_client.runs.get(thread_id, run_id)
    assert status_of(http, elsewhere, run_id) in ("pending", "running", "success")


@pytest.mark.parametrize(
    ("method", "follow"),
    [("GET", ""), ("DELETE", ""), ("GET", "/join"), ("GET", "/stream"), ("POST", "/cancel")],
)
def test_malformed_ids_are_refused(http, thread_id, method, follow):
    response = http.request(method, f"/threads/{thread_id}/runs/bad{follow}")
    assert refused(response, 422) == "Invalid run ID: must be a UUID"
    response = http.request(method, f"/threads/bad/runs/{UNKNOWN}{follow}")
    assert refused(response, 422) == "Invalid thread ID: must be a UUID"


def test_a_run_is_read_with_the_fields_it_was_created_with(http, sync_client, thread_id):
    body = {"assistant_id": "counter", "input": {"count": 1}, "metadata": {"m": 1}}
    made = http.post(f"/threads/{thread_id}/runs", json=body).json()
    sync_client.runs.join(thread_id, made["run_id"])
    run = sync_client.runs.get(thread_id, made["run_id"])
    assert run.keys() == FIELDS
    assert run["status"] == "success"
    same = ("run_id", "thread_id", "assistant_id", "created_at", "multitask_strategy", "metadata")
    assert {key: run[key] for key in same} == {key: made[key] for key in same}
    assert run["kwargs"]["input"] == {"count": 1}
    assert run["updated_at"] > made["updated_at"]
    assert sync_client.runs.list(thread_id) == [run]


def delete_run(http, thread_id, run_id):
    """Delete a run and check the response of the Delete Run document: 200, application/json."""
    response = http.delete(f"/threads/{thread_id}/runs/{run_id}")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {}
    again = http.delete(f"/threads/{thread_id}/runs/{run_id}")
    assert refused(again, 404) == "Run not found"
    assert refused(http.get(f"/threads/{thread_id}/runs/{run_id}"), 404) == "Not Found"


def test_a_finished_run_is_deleted_and_its_state_stays(http, thread_id):
    wait_for(http, thread_id, "counter", {"count": 1})
    run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    delete_run(http, thread_id, run_id)
    assert http.get(f"/threads/{thread_id}/runs").json() == []
    assert http.get(f"/threads/{thread_id}").json()["values"] == {"count": 2}
    assert wait_for(http, thread_id, "counter", {}) == {"count": 3}


def test_a_pending_run_is_deleted_and_never_runs(http, thread_id, beats, tmp_path, stops_all):
    running = start_long(http, thread_id, beats)
    never = tmp_path / "never"
    pending = run_of(http, thread_id, "steps", {"beats": str(never)})
    delete_run(http, thread_id, pending)
    assert status_of(http, thread_id, running) == "running"
    http.post(f"/threads/{thread_id}/runs/{running}/cancel?wait=1")
    # Runs that were queued before this one would have run before it.
    wait_for(http, thread_id, "counter", {"count": 1})
    assert not never.exists()


def test_a_running_run_is_stopped_and_deleted(http, thread_id, beats, stops_all):
    run_id = start_long(http, thread_id, beats)
    delete_run(http, thread_id, run_id)
    before = beats.lines()
    time.sleep(_LISTENING_SECONDS)  # nothing may happen meanwhile
    assert beats.lines() == before
    assert http.get(f"/threads/{thread_id}").json()["status"] != "busy"
    assert wait_for(http, thread_id, "counter", {"count": 1}) == {"count": 2}


def test_a_run_is_deleted_through_both_clients(make_client, sync_client, thread_id, http):
    wait_for(http, thread_id, "counter", {"count": 1})
    wait_for(http, thread_id, "counter", {"count": 1})
    second, first = sync_client.runs.list(thread_id)
    sync_client.runs.delete(thread_id, first["run_id"])

    async def scene(client):
        await client.runs.delete(thread_id, second["run_id"])
        with pytest.raises(NotFoundError):
            await client.runs.delete(thread_id, second["run_id"])
        assert await client.runs.list(thread_id) == []

    play(make_client, scene)


# --- wait and join --------------------------------------------------------------------------


def test_wait_returns_the_final_values_and_the_location_of_the_join(http, thread_id):
    body = {"assistant_id": "counter", "input": {"count": 1}}
    response = http.post(f"/threads/{thread_id}/runs/wait", json=body)
    run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["location"] == f"/threads/{thread_id}/runs/{run_id}/join"
    assert response.headers["content-location"] == f"/threads/{thread_id}/runs/{run_id}"
    assert response.json() == {"count": 2}


def test_wait_returns_only_the_output_of_a_graph(sync_client, thread_id):
    values = sync_client.runs.wait(thread_id, "teller", input={"topic": "tea"})
    assert values == {"told": "plain tea"}


def test_a_long_wait_is_kept_alive_by_newlines_before_the_json(http, thread_id):
    body = {"assistant_id": "steps", "input": {"seconds": 0.35}}
    text = http.post(f"/threads/{thread_id}/runs/wait", json=body).text
    assert text.startswith("\n")
    assert json.loads(text)["steps"] == ALL_STEPS


def test_wait_returns_the_error_of_a_graph_as_the_outcome(http, make_client, thread_id):
    error = {"error": "ValueError", "message": "boom from bad node"}
    assert wait_for(http, thread_id, "bad", {"count": 1}) == {"__error__": error}
    assert http.get(f"/threads/{thread_id}/runs").json()[0]["status"] == "error"

    async def scene(client):
        with pytest.raises(Exception, match=r"^ValueError: boom from bad node$"):
            await client.runs.wait(thread_id, "bad", input={"count": 1})
        waited = await client.runs.wait(thread_id, "bad", input={}, raise_error=False)
        assert waited == {"__error__": error}

    play(make_client, scene)


def test_join_returns_the_outcome_of_its_run_after_later_runs(http, sync_client, thread_id):
    ends = {}
    for graph, input_, end in (
        ("counter", {"count": 1}, {"count": 2}),
        ("bad", {"count": 7}, {"__error__": {"error": "ValueError", "message": None}}),
        ("counter", {"count": 102}, {"count": 103}),
    ):
        run_id = run_of(http, thread_id, graph, input_)
        sync_client.runs.join(thread_id, run_id)
        ends[run_id] = end
    for run_id, end in ends.items():
        joined = sync_client.runs.join(thread_id, run_id)
        if "__error__" in joined:
            assert joined["__error__"].pop("message") == "boom from bad node"
            joined["__error__"]["message"] = None
        assert joined == end


def test_join_waits_for_a_pending_and_for_a_running_run(make_client, thread_id):
    async def scene(client):
        first = await client.runs.create(thread_id, "steps", input={"seconds": 0.1})
        second = await client.runs.create(thread_id, "steps", input={})
        assert (await client.runs.join(thread_id, second["run_id"]))["steps"] == ALL_STEPS * 2
        assert (await client.runs.join(thread_id, first["run_id"]))["steps"] == ALL_STEPS

    play(make_client, scene)


def test_join_returns_the_values_and_the_interrupt_of_its_run(http, sync_client, thread_id):
    waited = wait_for(http, thread_id, "questions", {"topic": "tea"})
    (asked,) = waited["__interrupt__"]
    assert waited == {"topic": "tea", "answers": ["prepared"], "__interrupt__": [asked]}
    assert asked == {
        "value": {"question": "first about tea?"},
        "id": asked["id"],
        "response_schema": None,
    }
    assert len(asked["id"]) == 32
    (run,) = sync_client.runs.list(thread_id)
    assert run["status"] == "success"
    assert sync_client.runs.join(thread_id, run["run_id"]) == waited
    for answer in ("a", "b"):
        wait_for(http, thread_id, "questions", command={"resume": answer})
    assert sync_client.runs.join(thread_id, run["run_id"]) == waited


def test_join_of_a_cancelled_run_returns_its_last_values(http, sync_client, thread_id, stops_all):
    run_id = run_of(
        http,
        thread_id,
        "steps",
        {"seconds": 20, "tag": ""},
        interrupt_after=[],
    )
    until_status(http, thread_id, run_id, "running")
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    joined = sync_client.runs.join(thread_id, run_id)
    assert joined in ({}, {"seconds": 20, "tag": "", "steps": []}, {"seconds": 20, "tag": ""})
    wait_for(http, thread_id, "counter", {"count": 1})
    assert sync_client.runs.join(thread_id, run_id) == joined


def test_join_of_a_run_cancelled_in_its_second_step_returns_the_first(
    http, sync_client, thread_id, beats, stops_all
):
    input_ = {"slow": {"s2": 600}, "beats": str(beats)}
    run_id = run_of(http, thread_id, "steps", input_, durability="sync")
    beats.wait_for("s2:start")
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    assert sync_client.runs.join(thread_id, run_id) == {**input_, "steps": ["s1"]}
    assert sync_client.threads.get(thread_id)["values"] == {**input_, "steps": ["s1"]}


def test_a_wait_ends_when_its_run_is_cancelled(http, make_client, thread_id, beats, stops_all):
    async def scene(client):
        import asyncio

        waiting = asyncio.create_task(
            client.runs.wait(thread_id, "steps", input={"seconds": 20, "beats": str(beats)})
        )
        await asyncio.to_thread(beats.wait_for, "s1:start")
        (run,) = await client.runs.list(thread_id)
        await client.runs.cancel(thread_id, run["run_id"])
        waited = await asyncio.wait_for(waiting, 10)
        assert (waited["seconds"], waited.get("steps", [])) == (20, [])
        assert (await client.runs.get(thread_id, run["run_id"]))["status"] == "interrupted"

    play(make_client, scene)


# --- cancel ---------------------------------------------------------------------------------


def test_cancel_returns_the_documented_responses(http, thread_id, beats, stops_all):
    run_id = start_long(http, thread_id, beats)
    path = f"/threads/{thread_id}/runs/{run_id}/cancel"
    refused(http.post(path, params={"action": "bad"}), 422)
    assert status_of(http, thread_id, run_id) == "running"
    response = http.post(path, params={"wait": 1})
    assert (response.status_code, response.json()) == (200, {})
    assert response.headers["location"] == f"/threads/{thread_id}/runs/{run_id}/join"
    assert response.headers["content-location"] == f"/threads/{thread_id}/runs/{run_id}"
    assert status_of(http, thread_id, run_id) == "interrupted"
    error = http.get(f"/threads/{thread_id}").json()["error"]
    assert error == {
        "error": "UserInterrupt",
        "message": "interrupt requested via POST /threads/{thread_id}/runs/{run_id}/cancel",
    }
    for action in ("interrupt", "rollback"):
        assert refused(http.post(path, params={"action": action}), 404) == NO_MATCH
    unknown = http.post(f"/threads/{thread_id}/runs/{UNKNOWN}/cancel")
    assert refused(unknown, 404) == "No runs found to cancel."
    elsewhere = http.post(f"/threads/{new_thread(http)}/runs/{run_id}/cancel")
    assert refused(elsewhere, 404) == "No runs found to cancel."
    second = run_of(http, thread_id, "steps", {"seconds": 20})
    accepted = http.post(f"/threads/{thread_id}/runs/{second}/cancel")
    assert (accepted.status_code, accepted.content) == (202, b"")


def test_bulk_cancel_by_ids_leaves_other_runs_alone(http, thread_id, beats, stops_all):
    first = start_long(http, thread_id, beats)
    second = run_of(http, thread_id, "steps", {"seconds": 20})
    third = run_of(http, thread_id, "counter", {"count": 1})
    body = {"thread_id": thread_id, "run_ids": [first, second, UNKNOWN]}
    response = http.post("/runs/cancel", json=body)
    assert (response.status_code, response.content) == (204, b"")
    until_status(http, thread_id, first, "interrupted")
    until_status(http, thread_id, second, "interrupted")
    until_status(http, thread_id, third, "success")
    error = wait_until(lambda: http.post("/runs/cancel", json=body))
    assert refused(error, 404) == NO_MATCH


@pytest.mark.parametrize("status", ["pending", "running", "all"])
@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_bulk_cancel_by_status_cancels_only_runs_of_that_status(
    http, sync_client, tmp_path, beats, status, action, stops_all
):
    one, two = new_thread(http), new_thread(http)
    running = start_long(http, one, beats)
    pending = run_of(http, one, "steps", {"seconds": 20})
    delayed = run_of(http, two, "counter", {"count": 1}, after_seconds=60)
    done = new_thread(http)
    wait_for(http, done, "counter", {"count": 1})
    finished = sync_client.runs.list(done)[0]["run_id"]
    sync_client.runs.cancel_many(status=status, action=action)

    def now(thread_id, run_id):
        response = http.get(f"/threads/{thread_id}/runs/{run_id}")
        return response.json()["status"] if response.status_code == 200 else response.status_code

    cancelled = "interrupted" if action == "interrupt" else 404
    if status != "pending":
        wait_until(lambda: now(one, running) == cancelled)
    else:
        assert now(one, running) == "running"
    if status != "running":
        assert (now(one, pending), now(two, delayed)) == (cancelled, cancelled)
    else:
        assert now(two, delayed) == "pending"
        wait_until(lambda: now(one, pending) == "running")
    assert now(done, finished) == "success"


def test_bulk_cancel_by_ids_and_status_requires_both_to_match(http, thread_id, beats, stops_all):
    running = start_long(http, thread_id, beats)
    pending = run_of(http, thread_id, "steps", {"seconds": 20})
    other = run_of(http, thread_id, "steps", {"seconds": 20})
    body = {"thread_id": thread_id, "run_ids": [running, pending], "status": "pending"}
    assert http.post("/runs/cancel", json=body).status_code == 204
    assert status_of(http, thread_id, pending) == "interrupted"
    assert status_of(http, thread_id, running) == "running"
    assert status_of(http, thread_id, other) == "pending"
    refused(http.post("/runs/cancel", json=body), 404)


def test_bulk_cancel_without_matching_runs_is_not_found(http, thread_id):
    nothing = "No runs found to cancel."
    wait_for(http, thread_id, "counter", {"count": 1})
    finished = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    for body, detail in (
        ({"status": "all"}, nothing),
        ({"status": "pending"}, nothing),
        ({"status": "running"}, nothing),
        ({"thread_id": thread_id, "run_ids": []}, nothing),
        ({"thread_id": thread_id, "run_ids": [UNKNOWN]}, nothing),
        ({"thread_id": UNKNOWN, "run_ids": [finished]}, nothing),
        ({"thread_id": thread_id, "run_ids": [finished]}, NO_MATCH),
    ):
        assert refused(http.post("/runs/cancel", json=body), 404) == detail


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("", {}),
        ("", []),
        ("", {"thread_id": UNKNOWN}),
        ("", {"run_ids": [UNKNOWN]}),
        ("", {"thread_id": UNKNOWN, "status": "all"}),
        ("", {"run_ids": [UNKNOWN], "status": "all"}),
        ("", {"status": "ALL"}),
        ("", {"status": "success"}),
        ("", {"status": None}),
        ("", {"thread_id": UNKNOWN, "run_ids": "x"}),
        ("", {"thread_id": UNKNOWN, "run_ids": ["bad"]}),
        ("", {"thread_id": UNKNOWN, "run_ids": None}),
        ("", {"thread_id": "bad", "run_ids": [UNKNOWN]}),
        ("?action=bad", {"status": "all"}),
        ("?action=", {"status": "all"}),
    ],
    ids=str,
)
def test_an_invalid_bulk_cancel_is_refused(http, query, body):
    refused(http.post(f"/runs/cancel{query}", json=body), 422)


# --- options --------------------------------------------------------------------------------


def test_a_resume_continues_to_the_next_interrupt(make_client, thread_id):
    async def scene(client):
        await client.runs.wait(thread_id, "questions", input={"topic": "tea"})
        waited = await client.runs.wait(thread_id, "questions", command={"resume": "a"})
        (asked,) = waited["__interrupt__"]
        assert asked["value"] == {"question": "second about tea?"}
        # By the interrupt's id, as well as by position.
        resume = {asked["id"]: "b"}
        waited = await client.runs.wait(thread_id, "questions", command={"resume": resume})
        assert waited == {"topic": "tea", "answers": ["prepared", "a", "b", "worked"]}
        assert (await client.threads.get(thread_id))["status"] == "idle"
        # With no interrupt waiting, nothing changes.
        again = await client.runs.wait(thread_id, "questions", command={"resume": "c"})
        assert again == waited

    play(make_client, scene)


def test_an_interrupt_may_be_resumed_with_a_falsy_value(http, thread_id):
    wait_for(http, thread_id, "questions", {"topic": "tea"})
    wait_for(http, thread_id, "questions", command={"resume": False})
    ended = wait_for(http, thread_id, "questions", command={"resume": ""})
    assert ended["answers"] == ["prepared", False, "", "worked"]


def test_input_null_raises_the_same_interrupt_again(http, thread_id):
    asked = wait_for(http, thread_id, "questions", {"topic": "tea"})["__interrupt__"]
    assert wait_for(http, thread_id, "questions", None)["__interrupt__"] == asked


def test_a_command_updates_resumes_and_takes_precedence_over_input(http, thread_id):
    wait_for(http, thread_id, "questions", {"topic": "tea"})
    command = {"update": {"topic": "coffee"}, "resume": "a"}
    waited = wait_for(http, thread_id, "questions", {"topic": "milk"}, command=command)
    assert waited["topic"] == "coffee"
    assert waited["__interrupt__"][0]["value"] == {"question": "second about coffee?"}


def test_a_command_goes_to_a_node(http, sync_client, thread_id):
    wait_for(http, thread_id, "steps", {})
    waited = sync_client.runs.wait(thread_id, "steps", command={"goto": "s3"})
    assert waited["steps"] == [*ALL_STEPS, "s3", "s4"]
    waited = wait_for(http, thread_id, "steps", command={"goto": ["s4"], "update": {"tag": "t"}})
    assert waited == {"tag": "t", "steps": [*ALL_STEPS, "s3", "s4", "s4"]}
    counted = new_thread(http)
    wait_for(http, counted, "counter", {"count": 1})
    sent = {"goto": {"node": "inc", "input": {"count": 70}}}
    assert wait_for(http, counted, "counter", command=sent) == {"count": 71}
    pairs = {"update": [["count", 90]], "goto": "inc"}
    assert wait_for(http, counted, "counter", command=pairs) == {"count": 91}


def test_an_empty_command_is_ignored(http, thread_id):
    assert wait_for(http, thread_id, "counter", {"count": 1}, command={}) == {"count": 2}
    assert wait_for(http, thread_id, "counter", {"count": 5}, command={}) == {"count": 6}


def test_a_goto_leaves_the_interrupt_pending(http, thread_id):
    wait_for(http, thread_id, "questions", {"topic": "tea"})
    wait_for(http, thread_id, "questions", command={"goto": "work"})
    assert http.get(f"/threads/{thread_id}").json()["status"] == "interrupted"
    for answer in ("a", "b"):
        ended = wait_for(http, thread_id, "questions", command={"resume": answer})
    assert sorted(ended["answers"]) == ["a", "b", "prepared", "worked", "worked"]


def test_config_reaches_the_graph(http, sync_client, thread_id):
    config = {"configurable": {"by": 5, "thread_id": UNKNOWN, "run_id": UNKNOWN}, "tags": ["x"]}
    waited = sync_client.runs.wait(thread_id, "counter", input={"count": 1}, config=config)
    assert waited == {"count": 6}
    (run,) = sync_client.runs.list(thread_id)
    configurable = run["kwargs"]["config"]["configurable"]
    assert (configurable["thread_id"], configurable["run_id"]) == (thread_id, run["run_id"])
    assert run["kwargs"]["config"]["tags"] == ["x"]
    shown = sync_client.threads.get(thread_id)["config"]
    assert shown == {"configurable": {"by": 5}, "tags": ["x"]}
    assert wait_for(http, thread_id, "made_with_config", {"count": 1}) == {"count": 31}
    asked = {"configurable": {"start_by": 7}}
    assert wait_for(http, thread_id, "made_with_config", {"count": 1}, config=asked) == {"count": 8}


def test_context_reaches_the_graph_and_mirrors_configurable(make_client, thread_id):
    async def scene(client):
        input_ = {"topic": "tea"}
        told = await client.runs.wait(thread_id, "teller", input=input_, context={"voice": "loud"})
        assert told == {"told": "loud tea"}
        config = {"configurable": {"voice": "soft"}}
        told = await client.runs.wait(thread_id, "teller", input=input_, config=config)
        assert told == {"told": "soft tea"}
        counted = await client.runs.wait(
            thread_id, "counter", input={"count": 1}, context={"by": 9}
        )
        assert counted == {"count": 10}

    play(make_client, scene)


def test_a_recursion_limit_ends_a_run_with_an_error(http, sync_client, thread_id):
    limited = {"recursion_limit": 2}
    waited = wait_for(http, thread_id, "steps", {}, config=limited)
    assert waited["__error__"]["error"] == "GraphRecursionError"
    assert waited["__error__"]["message"].startswith("Recursion limit of 2 reached")
    assert sync_client.runs.list(thread_id)[0]["status"] == "error"
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["error"]) == ("error", waited["__error__"])
    assert sync_client.threads.get_state(thread_id)["values"]["steps"] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("input_", "kind", "message"),
    [
        ([1], "InvalidUpdateError", "Expected dict, got [1]"),
        ("text", "InvalidUpdateError", "Expected dict, got text"),
        (5, "InvalidUpdateError", "Expected dict, got 5"),
        (None, "EmptyInputError", "Received no input for __start__"),
    ],
)
def test_input_that_the_graph_rejects_ends_the_run_with_an_error(
    http, thread_id, input_, kind, message
):
    error = wait_for(http, thread_id, "counter", input_)["__error__"]
    assert error["error"] == kind
    assert error["message"].startswith(message)


def test_reserved_metadata_keys_of_a_run_are_set_by_the_server(http, sync_client, thread_id):
    reserved = dict.fromkeys(("assistant_id", "thread_id", "run_id", "cron_id"), "mine")
    run = sync_client.runs.create(
        thread_id, "counter", input={"count": 1}, metadata={"m": 1, **reserved}
    )
    assert run["metadata"]["m"] == 1
    assert run["metadata"]["assistant_id"] == COUNTER_ID
    assert "mine" not in run["metadata"].values()
    sync_client.runs.join(thread_id, run["run_id"])
    metadata = sync_client.threads.get_state(thread_id)["metadata"]
    assert metadata["m"] == 1
    assert "mine" not in json.dumps(metadata)
    assert metadata["run_id"] == run["run_id"]


@pytest.mark.parametrize("how", ["checkpoint_id", "checkpoint", "config"])
def test_a_run_continues_from_an_old_checkpoint(http, sync_client, thread_id, beats, how):
    wait_for(http, thread_id, "steps", {"beats": str(beats)})
    old = history_of(http, thread_id)[2]
    assert old["next"] == ["s3"]
    options = {how: old.get(how)}
    if how == "config":
        options = {"config": {"configurable": {"checkpoint_id": old["checkpoint_id"]}}}
    before = len(beats.lines())
    waited = sync_client.runs.wait(thread_id, "steps", input=None, **options)
    assert waited["steps"] == ALL_STEPS
    again = [line.split()[0] for line in beats.lines()[before:] if ":start" in line]
    assert again == ["s3:start", "s4:start"]
    # The replayed state is the head now, and runs continue from it.
    assert sync_client.threads.get(thread_id)["values"]["steps"] == ALL_STEPS
    branch = wait_for(http, thread_id, "steps", {"tag": "x"}, checkpoint_id=old["checkpoint_id"])
    assert branch["steps"] == ["s1", "s2", *ALL_STEPS]


def test_interrupt_before_and_after_pause_a_run(make_client, http, thread_id):
    async def scene(client):
        paused = await client.runs.wait(thread_id, "steps", input={}, interrupt_before=["s2"])
        assert paused["steps"] == ["s1"]
        thread = await client.threads.get(thread_id)
        assert (thread["status"], thread["interrupts"]) == ("interrupted", {})
        assert (await client.runs.list(thread_id))[0]["status"] == "success"
        assert (await client.threads.get_state(thread_id))["next"] == ["s2"]
        paused = await client.runs.wait(thread_id, "steps", input=None, interrupt_after=["s3"])
        assert paused["steps"] == ["s1", "s2", "s3"]
        paused = await client.runs.wait(thread_id, "steps", input=None, interrupt_before="*")
        assert paused["steps"] == ["s1", "s2", "s3", "s4"]
        assert (await client.threads.get(thread_id))["status"] == "idle"

    play(make_client, scene)
    one_by_one = new_thread(http)
    seen = [
        wait_for(http, one_by_one, "steps", input_, interrupt_after="*")["steps"]
        for input_ in ({}, None, None, None)
    ]
    assert seen == [ALL_STEPS[:n] for n in (1, 2, 3, 4)]


def test_new_input_restarts_the_graph_on_an_interrupted_thread(http, thread_id):
    wait_for(http, thread_id, "steps", {}, interrupt_before=["s2"])
    assert wait_for(http, thread_id, "steps", {"tag": "x"})["steps"] == ["s1", *ALL_STEPS]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"durability": "sync"}, [4, 3, 2, 1, 0, -1]),
        ({"durability": "async"}, [4, 3, 2, 1, 0, -1]),
        ({"durability": "exit"}, [4]),
        ({"checkpoint_during": False}, [4]),
    ],
    ids=str,
)
def test_durability_decides_which_checkpoints_are_kept(http, thread_id, options, steps):
    assert wait_for(http, thread_id, "steps", {}, **options)["steps"] == ALL_STEPS
    assert [state["metadata"]["step"] for state in history_of(http, thread_id)] == steps
    assert http.get(f"/threads/{thread_id}/state").json()["values"]["steps"] == ALL_STEPS


def test_after_seconds_delays_the_start_of_a_run_and_of_no_other(
    http, sync_client, thread_id, beats
):
    much_later = sync_client.runs.create(thread_id, "steps", input={}, after_seconds=3600)
    assert much_later["status"] == "pending"
    assert wait_for(http, thread_id, "steps", {"beats": str(beats)})["steps"] == ALL_STEPS
    assert status_of(http, thread_id, much_later["run_id"]) == "pending"
    asked = time.monotonic()
    run = sync_client.runs.create(
        thread_id, "steps", input={"tag": "late-", "beats": str(beats)}, after_seconds=1
    )
    sync_client.runs.join(thread_id, run["run_id"])
    first = next(line for line in beats.lines() if line.startswith("late-"))
    assert float(first.split()[2]) - asked >= 1.0
    assert run_of(http, thread_id, "counter", {"count": 1}, after_seconds=-5)


def test_a_run_that_exceeds_its_timeout_times_out(http, sync_client, thread_id, beats):
    input_ = {"seconds": 20, "beats": str(beats)}
    run_id = run_of(http, thread_id, "steps", input_, timeout_seconds=0.3)
    joined = sync_client.runs.join(thread_id, run_id)
    assert joined["__error__"]["error"] == "TimeoutError"
    assert status_of(http, thread_id, run_id) == "timeout"
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["error"]) == ("error", joined["__error__"])
    before = beats.lines()
    time.sleep(_LISTENING_SECONDS)  # nothing may happen meanwhile
    assert beats.lines() == before


def test_a_node_that_suppresses_every_exception_times_out(http, sync_client, thread_id, beats):
    run_id = run_of(
        http,
        thread_id,
        "nodes",
        {"kind": "swallow_async", "beats": str(beats)},
        timeout_seconds=0.3,
    )
    assert sync_client.runs.join(thread_id, run_id)["__error__"]["error"] == "TimeoutError"
    before = beats.lines()
    time.sleep(_LISTENING_SECONDS)  # nothing may happen meanwhile
    assert beats.lines() == before


# --- multitask ------------------------------------------------------------------------------


def test_reject_refuses_a_run_on_a_busy_thread_and_creates_nothing(
    http, sync_client, thread_id, beats, stops_all
):
    first = start_long(http, thread_id, beats)
    body = {"assistant_id": "counter", "input": {"count": 1}, "multitask_strategy": "reject"}
    for path in ("runs", "runs/wait", "runs/stream"):
        assert refused(http.post(f"/threads/{thread_id}/{path}", json=body), 409) == BUSY
    with pytest.raises(ConflictError):
        sync_client.runs.create(thread_id, "counter", multitask_strategy="reject")
    assert [run["run_id"] for run in sync_client.runs.list(thread_id)] == [first]
    assert status_of(http, thread_id, first) == "running"
    sync_client.runs.cancel(thread_id, first, wait=True)
    run = sync_client.runs.create(
        thread_id, "counter", input={"count": 1}, multitask_strategy="reject"
    )
    assert run["multitask_strategy"] == "reject"
    assert sync_client.runs.join(thread_id, run["run_id"])["count"] == 2


def test_enqueued_runs_are_executed_one_by_one_in_order(http, make_client, thread_id, beats):
    async def scene(client):
        runs = [
            await client.runs.create(
                thread_id,
                "steps",
                input={"seconds": 0.05, "tag": f"{n}-", "beats": str(beats)},
                multitask_strategy="enqueue",
            )
            for n in range(3)
        ]
        last = await client.runs.join(thread_id, runs[-1]["run_id"])
        assert last["steps"] == ALL_STEPS * 3

    play(make_client, scene)
    marks = [name for name in beats.names() if name.endswith((":start", ":end"))]
    expected = [
        f"{n}-{step}:{mark}" for n in range(3) for step in ALL_STEPS for mark in ("start", "end")
    ]
    assert marks == expected


def first_then(http, thread_id, beats, strategy):
    """Run `steps` and stop it by a second run; return both ids and the second run's values."""
    input_ = {"slow": {"s2": 600}, "beats": str(beats)}
    first = run_of(http, thread_id, "steps", input_, durability="sync")
    beats.wait_for("s2:start")
    second = run_of(
        http, thread_id, "steps", {"slow": {}, "beats": ""}, multitask_strategy=strategy
    )
    joined = http.get(f"/threads/{thread_id}/runs/{second}/join").json()
    return first, second, joined


def test_interrupt_stops_the_run_and_the_next_starts_from_its_state(
    http, sync_client, thread_id, beats
):
    first, second, joined = first_then(http, thread_id, beats, "interrupt")
    assert joined["steps"] == ["s1", *ALL_STEPS]
    assert status_of(http, thread_id, first) == "interrupted"
    assert status_of(http, thread_id, second) == "success"
    assert sync_client.runs.get(thread_id, second)["multitask_strategy"] == "interrupt"
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["error"]) == ("idle", None)
    assert "s2:end" not in beats.names()


def test_rollback_removes_the_run_and_the_next_starts_from_before_it(
    http, sync_client, thread_id, beats
):
    wait_for(http, thread_id, "steps", {})
    before = history_of(http, thread_id)
    first, second, joined = first_then(http, thread_id, beats, "rollback")
    assert joined["steps"] == [*ALL_STEPS, *ALL_STEPS]
    refused(http.get(f"/threads/{thread_id}/runs/{first}"), 404)
    runs = sync_client.runs.list(thread_id)
    assert [run["run_id"] for run in runs][:1] == [second]
    assert len(runs) == 2
    history = history_of(http, thread_id)
    assert history[-len(before) :] == before
    assert {state["metadata"]["run_id"] for state in history[: -len(before)]} == {second}


@pytest.mark.parametrize("strategy", ["interrupt", "rollback"])
def test_interrupt_and_rollback_also_clear_the_queue(
    http, thread_id, beats, tmp_path, strategy, stops_all
):
    start_long(http, thread_id, beats)
    never = tmp_path / "never"
    queued = run_of(http, thread_id, "steps", {"beats": str(never)})
    waited = wait_for(http, thread_id, "counter", {"count": 1}, multitask_strategy=strategy)
    assert waited["count"] == 2
    response = http.get(f"/threads/{thread_id}/runs/{queued}")
    if strategy == "interrupt":
        assert response.json()["status"] == "interrupted"
    else:
        assert response.status_code == 404
    assert not never.exists()


def test_of_concurrent_runs_with_reject_exactly_one_is_accepted(make_client, thread_id, stops_all):
    async def scene(client):
        import asyncio

        async def one():
            return await client.runs.create(
                thread_id, "steps", input={"seconds": 5}, multitask_strategy="reject"
            )

        answers = await asyncio.gather(*(one() for _ in range(10)), return_exceptions=True)
        taken = [answer for answer in answers if isinstance(answer, dict)]
        assert len(taken) == 1
        assert sum(isinstance(answer, ConflictError) for answer in answers) == 9
        assert [r["run_id"] for r in await client.runs.list(thread_id)] == [taken[0]["run_id"]]

    play(make_client, scene)


def test_concurrent_runs_that_may_create_their_thread_all_run(make_client):
    async def scene(client):
        import asyncio

        wanted = str(uuid.uuid4())
        runs = await asyncio.gather(
            *(
                client.runs.create(wanted, "steps", input={}, if_not_exists="create")
                for _ in range(6)
            )
        )
        ends = await asyncio.gather(*(client.runs.join(wanted, run["run_id"]) for run in runs))
        lengths = sorted(len(end["steps"]) for end in ends)
        assert lengths == [4, 8, 12, 16, 20, 24]
        assert all(run["status"] in ENDED for run in await client.runs.list(wanted))

    play(make_client, scene)

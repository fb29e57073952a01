"""Batches of runs, search by metadata, joins without a thread, and request headers in graphs."""

from __future__ import annotations

import json
import uuid

import httpx
import pytest

from tests.acceptance.playing import UNKNOWN, frames_of, new_thread, refused, stops_all

__all__ = ["stops_all"]


def item(**fields):
    return {"assistant_id": "counter", "input": {"count": 1}, **fields}


def joined(http, run):
    return http.get(f"/threads/{run['thread_id']}/runs/{run['run_id']}/join").json()


# -- batches


def test_all_runs_of_a_batch_are_created_and_executed(http, sync_client):
    runs = sync_client.runs.create_batch([item(input={"count": n}) for n in range(5)])
    assert [run["kwargs"]["input"] for run in runs] == [{"count": n} for n in range(5)]
    assert {run["status"] for run in runs} == {"pending"}
    assert [joined(http, run) for run in runs] == [{"count": n + 1} for n in range(5)]


def test_runs_of_a_batch_may_name_their_thread_and_start_in_order(http, sync_client):
    thread_id = new_thread(http)
    batch = [item(assistant_id="steps", input={"tag": str(n)}, thread_id=thread_id) for n in (1, 2)]
    runs = sync_client.runs.create_batch([*batch, item()])
    assert [run["thread_id"] == thread_id for run in runs] == [True, True, False]
    assert len(joined(http, runs[0])["steps"]) == 4
    assert len(joined(http, runs[1])["steps"]) == 8


@pytest.mark.parametrize(
    ("bad", "status", "detail"),
    [
        ({"assistant_id": UNKNOWN}, 404, "Thread or assistant not found."),
        ({"assistant_id": "nope"}, 422, "Invalid assistant: 'nope'"),
        ({"thread_id": UNKNOWN}, 404, "Thread or assistant not found."),
        ({"input": {}, "stream_mode": "bad"}, 422, "stream_mode"),
        ({"command": {"resume": 1}}, 400, "You must provide a thread_id"),
        ({"interrupt_before": ["nope"]}, 422, "Node 'nope'"),
    ],
)
def test_a_batch_with_one_invalid_run_creates_none(http, sync_client, bad, status, detail):
    thread_id = new_thread(http)
    tag = uuid.uuid4().hex
    good = item(thread_id=thread_id, metadata={"tag": tag})
    response = http.post("/runs/batch", json=[good, good, item(**bad)])
    assert detail in refused(response, status)
    assert sync_client.runs.list(thread_id) == []


@pytest.mark.parametrize("body", [[], {}, "x", [5], [None], [[]], [item()] * 1001])
def test_an_invalid_batch_is_refused(http, body):
    refused(http.post("/runs/batch", json=body), 422)


def test_a_batch_sent_again_with_its_run_ids_creates_no_more_runs(http, sync_client):
    batch = [item(run_id=str(uuid.uuid4())) for _ in range(3)]
    first = sync_client.runs.create_batch(batch)
    again = sync_client.runs.create_batch(batch)
    assert [run["run_id"] for run in again] == [run["run_id"] for run in first]


# -- metadata


def test_runs_of_a_thread_are_found_by_metadata(http, sync_client):
    thread_id = new_thread(http)
    made = [
        sync_client.runs.create(thread_id, "counter", input={"count": 1}, metadata={"n": n})
        for n in (1, 2, 2)
    ]
    path = f"/threads/{thread_id}/runs"
    found = http.get(path, params={"metadata": json.dumps({"n": 2})}).json()
    assert {run["run_id"] for run in found} == {run["run_id"] for run in made[1:]}
    assert len(http.get(path, params={"metadata": "{}"}).json()) == 3
    for bad in ("x", "[]", "5", '{"a": "\\u0000"}', ""):
        assert "metadata" in refused(http.get(path, params={"metadata": bad}), 422)


# -- stateless runs, by the location in the response to their creation


def test_a_stateless_run_is_joined_and_streamed_at_its_content_location(http):
    body = {"assistant_id": "steps", "input": {"seconds": 0.2}, "stream_resumable": True}
    made = http.post("/runs", json=body)
    location = made.headers["content-location"]
    stream = http.get(f"{location}/stream", headers={"Last-Event-ID": "-1"})
    frames = frames_of(stream.text.splitlines())
    assert frames[0].data["run_id"] == made.json()["run_id"]
    assert len(http.get(f"{location}/join").json()["steps"]) == 4


def test_a_run_of_a_thread_is_not_found_on_the_stateless_routes(http, sync_client):
    run = sync_client.runs.create(new_thread(http), "counter", input={"count": 1})
    for what in ("join", "stream"):
        assert refused(http.get(f"/runs/{run['run_id']}/{what}"), 404) == "Run not found"


# -- headers


def test_a_graph_receives_only_the_headers_its_project_configures(http):
    headers = {
        "X-Team": "red",
        "x-trace-id": "7",
        "x-trace-secret": "no",
        "x-other": "no",
        "Authorization": "Bearer no",
        "authority": "some",
    }
    answer = http.post("/runs/wait", json=item(assistant_id="headers"), headers=headers).json()
    assert json.loads(answer["note"]) == {"x-team": "red", "x-trace-id": "7", "authority": "some"}


def test_a_client_cannot_override_a_header_in_configurable(http: httpx.Client):
    body = item(assistant_id="headers", config={"configurable": {"x-team": "blue"}})
    answer = http.post("/runs/wait", json=body, headers={"x-team": "red"}).json()
    assert json.loads(answer["note"]) == {"x-team": "red"}

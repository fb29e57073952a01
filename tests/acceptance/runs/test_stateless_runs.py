"""Stateless runs: each has a temporary thread while it is in flight, and leaves nothing behind."""

from __future__ import annotations

import uuid

import pytest
from langgraph_sdk.errors import BadRequestError, NotFoundError

from tests.acceptance.playing import (
    ALL_STEPS,
    Frame,
    play,
    refused,
    stops_all,
    stream,
)
from tests.waiting import wait_until

__all__ = ["stops_all"]


def is_gone(http, thread_id, run_id=None) -> bool:
    paths = ["", "/state", "/history", "/runs"]
    if run_id is not None:
        paths.append(f"/runs/{run_id}")
    answers = [http.get(f"/threads/{thread_id}{path}").status_code for path in paths]
    if answers == [404] * len(paths):
        return True
    assert answers[0] == 200, answers
    return False


def test_a_stateless_run_has_a_thread_that_is_deleted_with_it(http):
    body = {"assistant_id": "steps", "input": {}, "after_seconds": 3}
    response = http.post("/runs", json=body)
    run = response.json()
    assert response.status_code == 200
    assert response.headers["content-location"] == f"/runs/{run['run_id']}"
    assert run["status"] == "pending"
    assert run["kwargs"]["temporary"] is True
    thread_id, run_id = run["thread_id"], run["run_id"]
    # While in flight it can be read, joined and cancelled like any other run.
    assert http.get(f"/threads/{thread_id}").json()["status"] == "busy"
    assert http.get(f"/threads/{thread_id}/runs/{run_id}").status_code == 200
    assert http.get(f"/threads/{thread_id}/runs/{run_id}/join").json()["steps"] == ALL_STEPS
    wait_until(lambda: is_gone(http, thread_id, run_id), what="the thread to go")
    found = http.post("/threads/search", json={"ids": [thread_id]})
    assert (found.json(), found.headers["x-pagination-total"]) == ([], "0")


def test_stateless_wait_returns_the_values(http, sync_client):
    response = http.post("/runs/wait", json={"assistant_id": "counter", "input": {"count": 1}})
    assert response.json() == {"count": 2}
    thread_id, run_id = response.headers["location"].split("/")[2::2][:2]
    assert response.headers["location"] == f"/threads/{thread_id}/runs/{run_id}/join"
    assert response.headers["content-location"] == f"/runs/{run_id}"
    assert is_gone(http, thread_id, run_id)
    assert sync_client.runs.wait(None, "counter", input={"count": 5}) == {"count": 6}


def test_stateless_stream_sends_the_events_of_its_run(http, make_client):
    body = {"assistant_id": "counter", "input": {"count": 1}, "stream_mode": ["values", "updates"]}
    response, frames = stream(http, "POST", "/runs/stream", json=body)
    run_id = frames[0].data["run_id"]
    assert frames == [
        Frame("metadata", {"run_id": run_id, "attempt": 1}),
        Frame("values", {"count": 1}),
        Frame("updates", {"inc": {"count": 2}}),
        Frame("values", {"count": 2}),
    ]
    assert response.headers["content-location"] == f"/runs/{run_id}"
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    # The `location` header is a route at which the stream can be joined.
    thread_id = response.headers["location"].split("/")[2]
    assert response.headers["location"] == f"/threads/{thread_id}/runs/{run_id}/stream"
    assert is_gone(http, thread_id, run_id)

    async def scene(client):
        parts = [part async for part in client.runs.stream(None, "steps", input={})]
        assert parts[-1].data["steps"] == ALL_STEPS

    play(make_client, scene)


@pytest.mark.parametrize("path", ["/runs", "/runs/wait", "/runs/stream"])
def test_a_stateless_run_created_with_keep_stays_with_its_thread(http, path):
    body = {"assistant_id": "counter", "input": {"count": 1}, "on_completion": "keep"}
    response = http.post(path, json=body)
    assert response.status_code == 200
    run_id = response.headers["content-location"].removeprefix("/runs/")
    if path == "/runs":
        thread_id = response.json()["thread_id"]
        assert response.json()["kwargs"]["temporary"] is False
    else:
        thread_id = response.headers["location"].split("/")[2]
    assert http.get(f"/threads/{thread_id}/runs/{run_id}/join").json() == {"count": 2}
    assert http.get(f"/threads/{thread_id}/runs/{run_id}").json()["status"] == "success"
    thread = http.get(f"/threads/{thread_id}").json()
    assert (thread["status"], thread["values"]) == ("idle", {"count": 2})
    assert http.get(f"/threads/{thread_id}/state").json()["values"] == {"count": 2}


def test_the_sdk_clients_keep_or_delete_a_stateless_run(make_client, sync_client):
    kept = sync_client.runs.create(None, "counter", input={"count": 1}, on_completion="keep")
    assert sync_client.runs.join(kept["thread_id"], kept["run_id"]) == {"count": 2}
    assert sync_client.threads.get(kept["thread_id"])["values"] == {"count": 2}

    async def scene(client):
        run = await client.runs.create(None, "counter", input={"count": 1}, on_completion="delete")
        assert await client.runs.join(run["thread_id"], run["run_id"]) == {"count": 2}
        with pytest.raises(NotFoundError):
            await client.threads.get(run["thread_id"])
        with pytest.raises(NotFoundError):
            await client.runs.get(run["thread_id"], run["run_id"])

    play(make_client, scene)


def test_a_failed_stateless_run_leaves_nothing(http):
    response = http.post("/runs/wait", json={"assistant_id": "bad", "input": {"count": 1}})
    assert response.status_code == 200
    error = {"error": "ValueError", "message": "boom from bad node"}
    assert response.json() == {"__error__": error}
    assert is_gone(http, response.headers["location"].split("/")[2])


def test_a_stateless_run_returns_its_interrupt_and_leaves_nothing(http):
    body = {"assistant_id": "questions", "input": {"topic": "tea"}}
    response = http.post("/runs/wait", json=body)
    assert response.json()["__interrupt__"][0]["value"] == {"question": "first about tea?"}
    assert is_gone(http, response.headers["location"].split("/")[2])


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
@pytest.mark.parametrize("started", [True, False], ids=["running", "pending"])
def test_a_cancelled_stateless_run_leaves_nothing(
    http, sync_client, beats, action, started, stops_all
):
    delay = {} if started else {"after_seconds": 60}
    run = sync_client.runs.create(
        None, "steps", input={"seconds": 20, "beats": str(beats)}, **delay
    )
    if started:
        beats.wait_for("s1:start")
    sync_client.runs.cancel(run["thread_id"], run["run_id"], wait=True, action=action)
    assert is_gone(http, run["thread_id"], run["run_id"])


@pytest.mark.parametrize("path", ["/runs", "/runs/wait", "/runs/stream"])
@pytest.mark.parametrize("answer", ["yes", False, {"a": 1}], ids=str)
def test_a_resume_without_a_thread_is_refused(http, path, answer):
    body = {"assistant_id": "questions", "command": {"resume": answer}}
    detail = refused(http.post(path, json=body), 400)
    assert detail == "You must provide a thread_id when resuming."


def test_a_resume_without_a_thread_raises_in_the_sdk_clients(make_client, sync_client):
    with pytest.raises(BadRequestError):
        sync_client.runs.create(None, "questions", command={"resume": "yes"})

    async def scene(client):
        with pytest.raises(BadRequestError):
            async for _ in client.runs.stream(None, "questions", command={"resume": "yes"}):
                pass

    play(make_client, scene)


@pytest.mark.parametrize(
    "options",
    [
        {"on_completion": "burn"},
        {"stream_mode": "tools"},
        {"multitask_strategy": "bad"},
        {"on_disconnect": "bad"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/runs", "/runs/wait", "/runs/stream"])
def test_an_invalid_stateless_run_is_refused(http, path, options):
    refused(http.post(path, json={"assistant_id": "counter", "input": {}, **options}), 422)


def test_a_stateless_run_ignores_options_for_threads(http):
    body = {
        "assistant_id": "counter",
        "input": {"count": 1},
        "if_not_exists": "reject",
        "multitask_strategy": "reject",
    }
    assert http.post("/runs/wait", json=body).json() == {"count": 2}


def test_a_stateless_create_repeated_with_its_run_id_returns_the_same_run(http, beats, stops_all):
    run_id = str(uuid.uuid4())
    body = {
        "assistant_id": "steps",
        "input": {"seconds": 20, "beats": str(beats)},
        "run_id": run_id,
    }
    first = http.post("/runs", json=body)
    assert first.json()["run_id"] == run_id
    beats.wait_for("s1:start")
    again = http.post("/runs", json=body)
    assert again.status_code == 200, again.text
    assert (again.json()["run_id"], again.json()["thread_id"]) == (
        run_id,
        first.json()["thread_id"],
    )

"""Agent runs through Exa's own clients and by raw HTTP.

Each key is a team, so each test has its own team.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.acceptance.agent_runs.exa_clients import (
    BETA,
    BETAS,
    ROUTES,
    UNKNOWN,
    asking,
    assert_error,
    assert_gone,
    assert_invalid,
    assert_not_let_in,
    check_response_async,
    clients_watched,
    ended,
    raw_client,
    refused,
)
from tests.acceptance.agent_runs.exa_schemas import RUN, check

__all__ = ["clients_watched"]

OBJECT = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
LINE_SEPARATOR = "one\u2028two\u0085three"


@pytest.fixture
def key():
    return f"key-{uuid.uuid4()}"


@pytest.fixture
def exa(server, key):
    from exa_py import Exa

    return Exa(key, base_url=server.url)


@pytest.fixture
def runs(exa):
    return exa.beta.agent.runs


@pytest.fixture
def raw(server, key):
    with raw_client(server.url, key) as client:
        yield client


@pytest.fixture
def aplay(server, key):
    """Return a function that runs a coroutine with the async client."""
    from exa_py import AsyncExa

    def play(scene):
        async def run():
            exa = AsyncExa(key, api_base=server.url)
            exa.client.event_hooks = {"request": [], "response": [check_response_async]}
            try:
                return await scene(exa.beta.agent.runs)
            finally:
                await exa.client.aclose()

        return asyncio.run(run())

    return play


# ---------------------------------------------------------------------------------------------
# The life of a run.


def test_a_run_is_created_polled_read_and_deleted(runs):
    run = runs.create(query="Name one AI chip firm", metadata={"ticket": "T-1"}, betas=BETAS)
    assert run.id.startswith("agent_run_")
    assert (run.status, run.stop_reason, run.completed_at) == ("queued", None, None)
    assert (run.output.text, run.output.structured, run.output.grounding) == ("", None, [])
    done = ended(runs, run.id)
    assert (done.status, done.stop_reason) == ("completed", "schema_satisfied")
    assert done.output.text == "done: Name one AI chip firm"
    assert done.output.structured is None
    assert done.created_at == run.created_at < done.completed_at
    assert done.usage.agent_compute_units == done.cost_dollars.total == 0
    asked = {"query": "Name one AI chip firm", "effort": "auto", "metadata": {"ticket": "T-1"}}
    assert done.request == asked
    assert runs.get(run.id, betas=BETAS) == done
    deleted = runs.delete(run.id, betas=BETAS)
    assert (deleted.id, deleted.object, deleted.deleted) == (run.id, "agent_run.deleted", True)
    with refused(404, "RUN_NOT_FOUND"):
        runs.get(run.id, betas=BETAS)


def test_the_async_client_creates_reads_and_deletes_a_run(aplay):
    async def scene(runs):
        run = await runs.create_and_wait(query="hello", poll_interval=20, betas=BETAS)
        assert run.output.text == "done: hello"
        assert [r.id for r in (await runs.list(betas=BETAS)).data] == [run.id]
        events = await runs.events.list(run.id, betas=BETAS)
        assert [e.event.rpartition(".")[2] for e in events.data] == [
            "created",
            "started",
            "completed",
        ]
        assert (await runs.cancel(run.id, betas=BETAS)) == run
        assert (await runs.stop(run.id, betas=BETAS)) == run
        assert (await runs.delete(run.id, betas=BETAS)).deleted is True
        with refused(404, "RUN_NOT_FOUND"):
            await runs.delete(run.id, betas=BETAS)

    aplay(scene)


def test_a_deleted_run_is_not_found_and_its_thread_is_deleted(raw, runs, http):
    run = runs.create_and_wait(query="q", poll_interval=20, betas=BETAS)
    thread = http.post("/threads/search", json={"limit": 1, "sort_by": "created_at"}).json()[0]
    found = http.get(f"/threads/{thread['thread_id']}/runs").json()
    assert [r["metadata"]["agent_run_id"] for r in found] == [run.id]
    path = f"/agent/runs/{run.id}"
    assert raw.delete(path).json() == {"id": run.id, "object": "agent_run.deleted", "deleted": True}
    assert_gone(raw.get(path))
    assert_gone(raw.delete(path))
    assert_gone(raw.post(f"{path}/cancel"))
    assert_gone(raw.post(f"{path}/stop"))
    assert_gone(raw.get(f"{path}/events"))
    assert_gone(raw.get(f"{path}/events", headers={"accept": "text/event-stream"}))
    body = {"query": "q", "previousRunId": run.id}
    assert_invalid(raw.post("/agent/runs", json=body), "PREVIOUS_RUN_NOT_FOUND")
    assert raw.get("/agent/runs").json()["data"] == []
    assert http.get(f"/threads/{thread['thread_id']}").status_code == 404


@pytest.mark.parametrize("stubborn", [False, True], ids=["waits", "has to be killed"])
def test_deleting_an_active_run_stops_its_work_first(runs, beats, stubborn):
    told = asking(beats=str(beats), seconds=60, stubborn=stubborn)
    run = runs.create(**told, betas=BETAS)
    beats.wait_for("working")
    assert runs.delete(run.id, betas=BETAS).deleted is True
    with refused(404, "RUN_NOT_FOUND"):
        runs.get(run.id, betas=BETAS)


def test_the_graph_receives_the_request_fields_under_their_own_names(runs):
    previous = runs.create_and_wait(query="first", poll_interval=20, betas=BETAS)
    told = {"echo": True, "deep": {"a": [1, None]}}
    run = runs.create_and_wait(
        query="second",
        system_prompt="Be brief.",
        input={"data": [told], "exclusion": [{"url": "https://example.com"}]},
        output_schema={"type": "object"},
        effort="xhigh",
        previous_run_id=previous.id,
        metadata={"a": "b"},
        poll_interval=20,
        betas=BETAS,
    )
    assert run.output.structured == {
        "query": "second",
        "systemPrompt": "Be brief.",
        "input": {"data": [told], "exclusion": [{"url": "https://example.com"}]},
        "outputSchema": {"type": "object"},
        "effort": "xhigh",
        "previousRunId": previous.id,
    }
    assert run.request == {**run.output.structured, "metadata": {"a": "b"}}


def test_the_output_has_the_text_structure_and_grounding_of_the_graph(runs):
    citation = {"url": "https://example.com/", "title": "Example"}
    grounding = [
        {"field": "structured.name", "citations": [citation], "confidence": "high", "score": 0.5},
        {"field": "text", "citations": [{"url": "https://example.com/x"}, {"title": "no url"}]},
        {"citations": []},
        "not an entry",
    ]
    told = asking(text=LINE_SEPARATOR, structured={"name": "x"}, grounding=grounding)
    run = runs.create_and_wait(**told, output_schema=OBJECT, poll_interval=20, betas=BETAS)
    assert run.output.text == LINE_SEPARATOR
    assert run.output.structured == {"name": "x"}
    shown = [entry.model_dump(exclude_none=True) for entry in run.output.grounding]
    assert shown == [
        grounding[0],
        {"field": "text", "citations": [{"url": "https://example.com/x"}]},
    ]


def test_without_a_schema_the_output_has_no_structure(runs):
    told = asking(structured={"name": "x"}, text=None, grounding="none")
    run = runs.create_and_wait(**told, poll_interval=20, betas=BETAS)
    assert (run.output.text, run.output.structured, run.output.grounding) == ("", None, [])


# ---------------------------------------------------------------------------------------------
# Failures.


def test_a_failing_graph_makes_a_failed_run_with_its_error(runs, raw):
    from exa_py.agent.types import AgentRunFailedError

    with pytest.raises(AgentRunFailedError, match="no luck") as raised:
        runs.create_and_wait(**asking(fail="no luck"), poll_interval=20, betas=BETAS)
    run = raised.value.run
    assert (run.status, run.stop_reason, run.output.text) == ("failed", "error", "")
    assert (run.error.code, run.error.message) == ("SERVER_ERROR", "no luck")
    last = raw.get(f"/agent/runs/{run.id}/events").json()["data"][-1]
    assert last["event"] == "agent_run.failed"
    assert last["data"] == {
        "id": run.id,
        "status": "failed",
        "error": {"type": "SERVER_ERROR", "code": "SERVER_ERROR", "message": "no luck"},
    }


@pytest.mark.parametrize(
    "dialect",
    [
        None,
        "http://json-schema.org/draft-07/schema#",
        "https://json-schema.org/draft/2019-09/schema",
        "https://json-schema.org/draft/2020-12/schema",
    ],
)
def test_an_output_that_violates_its_schema_fails_the_run_with_the_path(runs, http, dialect):
    from exa_py.agent.types import AgentRunFailedError

    schema = {"type": "object", "properties": {"firms": {"type": "array", "items": OBJECT}}}
    if dialect is not None:
        schema["$schema"] = dialect
    told = asking(structured={"firms": [{"name": "a"}, {"name": 5}]})
    with pytest.raises(AgentRunFailedError) as raised:
        runs.create_and_wait(**told, output_schema=schema, poll_interval=20, betas=BETAS)
    run = raised.value.run
    assert run.output.structured is None
    error = run.error
    assert (error.path, error.keyword) == ("structured.firms[1].name", "type")
    assert (error.expected, error.actual) == ("string", "5")
    assert "structured.firms[1].name" in error.message
    assert runs.get(run.id, betas=BETAS) == run
    # The run has failed in the other API too.
    found = http.post("/threads/search", json={"limit": 1, "sort_by": "created_at"}).json()[0]
    assert found["status"] == "error"


def test_a_missing_output_violates_the_schema(runs):
    from exa_py.agent.types import AgentRunFailedError

    with pytest.raises(AgentRunFailedError, match="null is not of type"):
        runs.create_and_wait(query="q", output_schema=OBJECT, poll_interval=20, betas=BETAS)


def test_a_run_is_cancelled_during_an_endless_schema_check(runs, beats):
    """The schema is checked where the graph runs: in a child that can be killed."""
    pair = {
        f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}, {"$ref": f"#/$defs/a{n + 1}"}]}
        for n in range(60)
    }
    schema = {"$ref": "#/$defs/a0", "$defs": {**pair, "a60": {"type": "string"}}}
    told = asking(beats=str(beats), structured=5)
    run = runs.create(**told, output_schema=schema, betas=BETAS)
    beats.wait_for("working")
    other = runs.create_and_wait(query="meanwhile", poll_interval=20, betas=BETAS)
    assert other.status == "completed"
    assert runs.cancel(run.id, betas=BETAS).status == "cancelled"


BAD_SCHEMAS = {
    "an unknown type": {"type": "objct"},
    "a type that is a number": {"properties": {"a": {"type": 5}}},
    "an invalid regex": {"properties": {"a": {"pattern": "("}}},
    "an unresolved reference": {"$ref": "#/$defs/nothing"},
    "a remote reference": {"$ref": "http://127.0.0.1:1/schema.json"},
    "a file reference": {"$ref": "file:///etc/passwd"},
    "draft 4": {"$schema": "http://json-schema.org/draft-04/schema#"},
    "an unknown dialect": {"$schema": "https://example.com/schema"},
    "a dialect that is a number": {"$schema": 7},
}


@pytest.mark.parametrize("schema", BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_an_invalid_schema_is_refused(raw, schema):
    error = assert_invalid(
        raw.post("/agent/runs", json={"query": "q", "outputSchema": schema}),
        "INVALID_OUTPUT_SCHEMA",
    )
    assert error["path"].startswith("outputSchema")
    assert {"keyword", "actual"} <= error.keys()
    assert raw.get("/agent/runs").json()["data"] == []


def test_a_schema_that_would_take_gigabytes_to_compile_is_refused_beside_other_requests(raw, http):
    twice = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    schema = {"$defs": {**twice, "d40": {}}, "$ref": "#/$defs/d0", "unevaluatedProperties": False}
    body = {"query": "q", "outputSchema": schema}
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(raw.post, "/agent/runs", json=body, timeout=120)
        answered = 0
        while not refused.done():
            assert http.get("/ok").status_code == 200
            answered += 1
    assert refused.result().status_code == 400
    assert "outputSchema" in refused.result().text
    assert answered > 3


def test_a_remote_schema_reference_is_refused_and_not_fetched(raw):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        reference = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        for schema in (
            {"$ref": reference},
            {"$schema": reference},
            {"$dynamicRef": reference},
            {"$id": reference, "$ref": "other.json"},
            {"properties": {"a": {"$schema": reference, "$id": "x", "$ref": "y"}}},
        ):
            body = {"query": "q", "outputSchema": schema}
            assert_invalid(raw.post("/agent/runs", json=body), "INVALID_OUTPUT_SCHEMA")
        with pytest.raises(BlockingIOError):  # no connection was made
            listener.accept()


# ---------------------------------------------------------------------------------------------
# Cancel and stop.


def test_a_running_run_is_cancelled_when_cancel_returns(runs, beats):
    run = runs.create(**asking(beats=str(beats), seconds=60, first_text="so far"), betas=BETAS)
    beats.wait_for("working")
    assert runs.get(run.id, betas=BETAS).status == "running"
    cancelled = runs.cancel(run.id, betas=BETAS)
    assert (cancelled.status, cancelled.stop_reason) == ("cancelled", "cancelled")
    assert cancelled.completed_at > cancelled.created_at
    assert cancelled.output.text == ""
    assert cancelled.error is None
    # A terminal status is final.
    assert runs.cancel(run.id, betas=BETAS) == cancelled
    assert runs.stop(run.id, betas=BETAS) == cancelled
    assert runs.get(run.id, betas=BETAS) == cancelled


@pytest.mark.parametrize("stubborn", [False, True], ids=["waits", "has to be killed"])
def test_a_stopped_run_is_completed_with_its_partial_output(runs, beats, stubborn):
    told = asking(
        beats=str(beats),
        seconds=60,
        stubborn=stubborn,
        first_text="so far",
        first_structured={"name": 5},
    )
    run = runs.create(**told, output_schema=OBJECT, betas=BETAS)
    beats.wait_for("working")
    stopped = runs.stop(run.id, betas=BETAS)
    assert (stopped.status, stopped.stop_reason) == ("completed", "stopped")
    assert stopped.output.text == "so far"
    assert stopped.output.structured == {"name": 5}
    assert runs.cancel(run.id, betas=BETAS) == stopped
    assert runs.get(run.id, betas=BETAS) == stopped
    assert runs.list(betas=BETAS).data == [stopped]
    # The run has completed, so another run may continue from it.
    runs.create(query="q", previous_run_id=run.id, betas=BETAS)


def test_an_ended_run_is_unchanged_by_cancel_and_stop(runs):
    done = runs.create_and_wait(query="q", poll_interval=20, betas=BETAS)
    for how in (runs.cancel, runs.stop, runs.get):
        assert how(done.id, betas=BETAS) == done
    failing = runs.create(**asking(fail="no luck"), betas=BETAS)
    failed = ended(runs, failing.id)
    for how in (runs.cancel, runs.stop, runs.get):
        assert how(failing.id, betas=BETAS) == failed


def test_concurrent_cancels_and_stops_return_the_same_run(runs, beats):
    run = runs.create(**asking(beats=str(beats), seconds=60), betas=BETAS)
    beats.wait_for("working")
    hows = [runs.cancel, runs.stop] * 5
    with ThreadPoolExecutor(len(hows)) as pool:
        answers = list(pool.map(lambda how: how(run.id, betas=BETAS), hows))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].status in ("cancelled", "completed")


def test_a_client_waiting_for_a_cancelled_run_gets_an_error(runs, beats):
    from exa_py.agent.types import AgentRunCancelledError

    def cancel():
        beats.wait_for("working")
        runs.cancel(runs.list(betas=BETAS).data[0].id, betas=BETAS)

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(AgentRunCancelledError) as raised:
        runs.create_and_wait(**asking(beats=str(beats), seconds=60), poll_interval=20, betas=BETAS)
    other.join()
    assert raised.value.run.stop_reason == "cancelled"


def test_a_run_cancelled_by_the_other_api_is_shown_as_cancelled(runs, http, beats):
    for action in ("interrupt", "rollback"):
        name = f"{action}:working"
        run = runs.create(**asking(beats=str(beats), seconds=60, name=name), betas=BETAS)
        beats.wait_for("working", 1 if action == "interrupt" else 2)
        thread = http.post("/threads/search", json={"limit": 1, "sort_by": "created_at"}).json()[0]
        thread_id = thread["thread_id"]
        run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
        path = f"/threads/{thread_id}/runs/{run_id}/cancel"
        assert http.post(path, params={"action": action, "wait": "1"}).status_code == 200
        seen = runs.get(run.id, betas=BETAS)
        assert (seen.status, seen.stop_reason) == ("cancelled", "cancelled")
        assert seen.completed_at is not None
        assert runs.delete(run.id, betas=BETAS).deleted is True


def test_a_run_deleted_by_the_other_api_is_not_found(runs, http):
    run = runs.create_and_wait(query="q", poll_interval=20, betas=BETAS)
    thread = http.post("/threads/search", json={"limit": 1, "sort_by": "created_at"}).json()[0]
    path = f"/threads/{thread['thread_id']}/runs"
    assert http.delete(f"{path}/{http.get(path).json()[0]['run_id']}").status_code == 200
    with refused(404, "RUN_NOT_FOUND"):
        runs.get(run.id, betas=BETAS)
    assert runs.list(betas=BETAS).data == []


# ---------------------------------------------------------------------------------------------
# Lists.


def test_runs_are_listed_newest_first_despite_a_deletion_between_pages(runs):
    made = [runs.create(query=f"q{n}", betas=BETAS).id for n in range(5)]
    seen = []
    for run in runs.list_all(limit=2, betas=BETAS):
        seen.append(run.id)
        if len(seen) == 2:
            runs.delete(run.id, betas=BETAS)  # the next page begins after it
    assert seen == made[::-1]
    rest = [made[n] for n in (4, 2, 1, 0)]
    assert [run.id for run in runs.get_all(limit=3, betas=BETAS)] == rest
    assert [run.id for run in runs.get_all(betas=BETAS)] == rest


def test_a_page_of_runs_reports_whether_more_follow(runs):
    made = [runs.create(query="q", betas=BETAS).id for _ in range(3)]
    page = runs.list(limit=2, betas=BETAS)
    assert (page.has_more, page.next_cursor) == (True, made[1])
    page = runs.list(limit=2, cursor=page.next_cursor, betas=BETAS)
    assert ([run.id for run in page.data], page.has_more, page.next_cursor) == (
        [made[0]],
        False,
        None,
    )
    page = runs.list(limit=3, betas=BETAS)
    assert (len(page.data), page.has_more, page.next_cursor) == (3, False, None)


def test_the_async_client_lists_all_runs(aplay):
    async def scene(runs):
        made = [(await runs.create(query="q", betas=BETAS)).id for _ in range(3)]
        assert [run.id async for run in runs.list_all(limit=1, betas=BETAS)] == made[::-1]

    aplay(scene)


def test_a_cursor_may_be_an_unknown_id_but_not_a_malformed_one(raw, runs):
    run = runs.create(query="q", betas=BETAS)
    oldest, newest = f"agent_run_{'0' * 26}", f"agent_run_7{'z' * 25}"
    assert raw.get("/agent/runs", params={"cursor": oldest}).json()["data"] == []
    found = raw.get("/agent/runs", params={"cursor": newest}).json()["data"]
    assert [r["id"] for r in found] == [run.id]
    for cursor in ("", "x", run.id.upper(), run.id + "0", "agent_run_", "%00", "8" * 300):
        assert_invalid(raw.get("/agent/runs", params={"cursor": cursor}))


@pytest.mark.parametrize("path", ["/agent/runs", "/agent/runs/{id}/events"])
def test_a_limit_is_from_1_to_100(raw, runs, path):
    url = path.format(id=runs.create(query="q", betas=BETAS).id)
    for limit in ("1", "100", "020"):
        assert raw.get(url, params={"limit": limit}).status_code == 200
    for limit in ("0", "101", "-1", "1.0", "x", "", "1e1", "9" * 30):
        assert_invalid(raw.get(url, params={"limit": limit}))


# ---------------------------------------------------------------------------------------------
# Events.


def test_the_events_of_a_run_are_listed_in_order_and_in_pages(runs, raw):
    run = runs.create_and_wait(query="q", poll_interval=20, betas=BETAS)
    page = raw.get(f"/agent/runs/{run.id}/events").json()
    assert [(e["id"], e["event"]) for e in page["data"]] == [
        ("1", "agent_run.created"),
        ("2", "agent_run.started"),
        ("3", "agent_run.completed"),
    ]
    created, started, completed = (e["data"] for e in page["data"])
    assert created == {"id": run.id, "status": "queued", "createdAt": run.created_at}
    assert started == {"id": run.id, "status": "running"}
    check(RUN, completed, "completed")
    assert completed == raw.get(f"/agent/runs/{run.id}").json()
    moments = [e["createdAt"] for e in page["data"]]
    assert moments == sorted(moments)
    assert (moments[0], moments[-1]) == (run.created_at, run.completed_at)
    first = runs.events.list(run.id, limit=2, betas=BETAS)
    assert (first.has_more, first.next_cursor) == (True, "2")
    rest = runs.events.list(run.id, limit=2, cursor=first.next_cursor, betas=BETAS)
    assert ([e.id for e in rest.data], rest.has_more, rest.next_cursor) == (["3"], False, None)
    assert runs.events.list(run.id, cursor="3", betas=BETAS).data == []
    for cursor in ("x", "-1", "1.5", "", "9" * 30):
        assert_invalid(raw.get(f"/agent/runs/{run.id}/events", params={"cursor": cursor}))


def frames(text: str) -> list[tuple[str, str, Any]]:
    """Return id, event and data of each frame; check the exact format."""
    assert text.isascii()
    assert "\r" not in text
    assert text.endswith("\n\n")
    found = []
    for frame in text[:-2].split("\n\n"):
        lines = [line for line in frame.split("\n") if not line.startswith(":")]
        names = [line.partition(": ")[0] for line in lines]
        assert names == ["id", "event", "data"]
        number, event, data = (line.partition(": ")[2] for line in lines)
        found.append((number, event, json.loads(data)))
    return found


def test_events_are_replayed_after_the_last_event_id(raw, runs):
    told = asking(text=LINE_SEPARATOR)
    run = runs.create_and_wait(**told, poll_interval=20, betas=BETAS)
    url, accept = f"/agent/runs/{run.id}/events", {"accept": "text/event-stream"}
    listed = raw.get(url).json()["data"]
    everything = [(e["id"], e["event"], e["data"]) for e in listed]
    response = raw.get(url, headers=accept)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert frames(response.text) == everything
    assert frames(raw.get(url, headers={**accept, "last-event-id": ""}).text) == everything
    for last in range(3):
        seen = raw.get(url, headers={**accept, "last-event-id": str(last)})
        assert frames(seen.text) == everything[last:]
    assert raw.get(url, headers={**accept, "last-event-id": "3"}).content == b""
    assert_invalid(raw.get(url, headers={**accept, "last-event-id": "x"}))
    assert_gone(raw.get(f"/agent/runs/{UNKNOWN}/events", headers=accept))


def test_a_replay_does_not_wait_for_future_events(raw, runs, beats):
    run = runs.create(**asking(beats=str(beats), seconds=60), betas=BETAS)
    beats.wait_for("working")
    response = raw.get(f"/agent/runs/{run.id}/events", headers={"accept": "text/event-stream"})
    assert [name for _, name, _ in frames(response.text)] == [
        "agent_run.created",
        "agent_run.started",
    ]
    runs.cancel(run.id, betas=BETAS)


def test_a_created_run_is_streamed_to_its_end(runs):
    told = asking(text=LINE_SEPARATOR)
    events = list(runs.create(**told, stream=True, betas=BETAS))
    assert [(e.id, e.event) for e in events] == [
        ("1", "agent_run.created"),
        ("2", "agent_run.started"),
        ("3", "agent_run.completed"),
    ]
    assert events[0].data["status"] == "queued"
    assert events[1].data == {"id": events[0].data["id"], "status": "running"}
    check(RUN, events[2].data, "completed")
    assert events[2].data["output"]["text"] == LINE_SEPARATOR
    run = runs.get(events[0].data["id"], betas=BETAS)
    assert run.output.text == LINE_SEPARATOR
    assert [e.data for e in runs.events.list(run.id, betas=BETAS).data] == [e.data for e in events]


def test_a_line_separator_is_kept_by_the_async_client(aplay):
    async def scene(runs):
        stream = await runs.create(**asking(text=LINE_SEPARATOR), stream=True, betas=BETAS)
        events = [event async for event in stream]
        assert [e.event.rpartition(".")[2] for e in events] == ["created", "started", "completed"]
        assert events[-1].data["output"]["text"] == LINE_SEPARATOR

    aplay(scene)


def test_a_stream_is_sent_as_chunked_ascii_event_frames(raw):
    accept = {"accept": "text/event-stream"}
    with raw.stream("POST", "/agent/runs", json={"query": "ü\u2028"}, headers=accept) as response:
        text = response.read().decode()
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["transfer-encoding"] == "chunked"
    assert [number for number, _, _ in frames(text)] == ["1", "2", "3"]


def test_a_stream_sends_the_start_and_heartbeats_while_the_run_is_running(raw, runs, beats):
    told = {**asking(beats=str(beats), seconds=60)}
    accept = {"accept": "text/event-stream"}
    with raw.stream("POST", "/agent/runs", json=told, headers=accept) as response:
        lines = response.iter_lines()
        before = []
        # On a busy machine a heartbeat may come before the start, too.
        while not (line := next(lines)).startswith(":") or len(before) < 6:
            before += [line] if line and not line.startswith(":") else []
        assert [line for line in before if line.startswith("event")] == [
            "event: agent_run.created",
            "event: agent_run.started",
        ]
        run_id = json.loads(before[2].removeprefix("data: "))["id"]
        runs.cancel(run_id, betas=BETAS)
        rest = [line for line in lines if line and not line.startswith(":")]
    assert rest[:2] == ["id: 3", "event: agent_run.cancelled"]
    assert json.loads(rest[2].removeprefix("data: ")) == {
        "id": run_id,
        "status": "cancelled",
        "stopReason": "cancelled",
    }


@pytest.mark.parametrize(
    ("how", "last"), [("stop", "completed"), ("cancel", "cancelled"), ("delete", "cancelled")]
)
def test_a_stream_ends_when_its_run_is_stopped_cancelled_or_deleted(runs, beats, how, last):
    stream = runs.create(**asking(beats=str(beats), seconds=60), stream=True, betas=BETAS)
    events = [next(stream)]
    beats.wait_for("working")
    getattr(runs, how)(events[0].data["id"], betas=BETAS)
    events += stream
    assert [e.event.rpartition(".")[2] for e in events] == ["created", "started", last]


def test_a_stream_of_a_run_that_fails_ends_with_its_error(runs):
    events = list(runs.create(**asking(fail="no luck"), stream=True, betas=BETAS))
    assert events[-1].event == "agent_run.failed"
    assert events[-1].data["error"]["message"] == "no luck"


def test_a_client_that_disconnects_from_a_stream_does_not_end_the_run(raw, runs, beats):
    told = asking(beats=str(beats), seconds=0.5)
    accept = {"accept": "text/event-stream"}
    with raw.stream("POST", "/agent/runs", json=told, headers=accept) as response:
        next(response.iter_lines())
        beats.wait_for("working")
    run_id = runs.list(betas=BETAS).data[0].id
    assert ended(runs, run_id).status == "completed"


def test_an_error_before_a_stream_starts_is_an_ordinary_error_response(raw):
    accept = {"accept": "text/event-stream"}
    assert_invalid(raw.post("/agent/runs", json={"query": ""}, headers=accept))
    body = {"query": "q", "previousRunId": UNKNOWN}
    assert_invalid(raw.post("/agent/runs", json=body, headers=accept), "PREVIOUS_RUN_NOT_FOUND")


# ---------------------------------------------------------------------------------------------
# Keys, teams and the beta header.


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_missing_key_is_reported_before_any_other_error(server, method, path):
    with raw_client(server.url, None) as client:
        for headers in (
            {},
            {"x-api-key": ""},
            {"authorization": "Bearer"},
            {"authorization": "Basic abc"},
            {"exa-beta": "nope"},
        ):
            answer = client.request(method, path, headers=headers)
            assert_not_let_in(answer)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_beta_header_is_checked_before_the_request(server, key, method, path):
    with raw_client(server.url, key) as client:
        for beta, code in (
            ("", "MISSING_BETA_HEADER"),
            (", ,", "MISSING_BETA_HEADER"),
            ("nope", "INVALID_BETA_HEADER"),
            ("agent-2026-05-07-x,a", "INVALID_BETA_HEADER"),
        ):
            answer = client.request(method, path, headers={"exa-beta": beta}, content=b"{")
            assert_invalid(answer, code)
        for beta in (BETA, f"x, {BETA}", f"{BETA},agent-max-effort-2026-07-27"):
            answer = client.request(method, path, headers={"exa-beta": beta}, json={"query": "q"})
            assert answer.status_code in (200, 404)


def test_exas_client_is_refused_without_the_beta_header(exa, runs):
    with refused(400, "MISSING_BETA_HEADER"):
        exa.agent.runs.list()
    with refused(400, "INVALID_BETA_HEADER"):
        runs.list(betas=["nope"])
    with refused(400, "INVALID_BETA_HEADER"):
        runs.stop(UNKNOWN)  # the client's default for `stop` is another beta


def test_a_key_may_be_a_bearer_token_and_x_api_key_takes_precedence(server, raw, key, runs):
    run = runs.create(query="q", betas=BETAS)
    with raw_client(server.url, None, authorization=f"Bearer {key}") as client:
        assert client.get(f"/agent/runs/{run.id}").status_code == 200
        other = {"x-api-key": "somebody else"}
        assert_gone(client.get(f"/agent/runs/{run.id}", headers=other))


def test_teams_do_not_see_the_runs_of_each_other(server, runs, beats):
    run = runs.create(**asking(beats=str(beats), seconds=60), betas=BETAS)
    beats.wait_for("working")
    with raw_client(server.url, "another team") as other:
        path = f"/agent/runs/{run.id}"
        assert_gone(other.get(path))
        assert_gone(other.delete(path))
        assert_gone(other.post(f"{path}/cancel"))
        assert_gone(other.post(f"{path}/stop"))
        assert_gone(other.get(f"{path}/events"))
        body = {"query": "q", "previousRunId": run.id}
        assert_invalid(other.post("/agent/runs", json=body), "PREVIOUS_RUN_NOT_FOUND")
        assert run.id not in other.get("/agent/runs", params={"limit": 100}).text
    assert runs.get(run.id, betas=BETAS).status == "running"
    assert runs.cancel(run.id, betas=BETAS).status == "cancelled"


def test_an_api_key_is_neither_stored_nor_logged(server, runs, key):
    runs.create_and_wait(query="q", poll_interval=20, betas=BETAS)
    with psycopg.connect(server.database_url) as conn:
        for table in ("agent_run", "run", "thread"):
            texts = conn.execute(f"SELECT t::text FROM {table} t").fetchall()
            assert not any(key in text for (text,) in texts)
    assert key not in server.log_until_now()


# ---------------------------------------------------------------------------------------------
# Malformed requests.


NO_REQUESTS = {
    "no query": {},
    "an empty query": {"query": ""},
    "a query that is null": {"query": None},
    "a query that is a number": {"query": 5},
    "a prompt that is a list": {"query": "q", "systemPrompt": []},
    "an input that is a text": {"query": "q", "input": "x"},
    "data that is an object": {"query": "q", "input": {"data": {}}},
    "data that is a list of texts": {"query": "q", "input": {"data": ["x"]}},
    "a schema that is a text": {"query": "q", "outputSchema": "{}"},
    "a schema that is true": {"query": "q", "outputSchema": True},
    "an unknown effort": {"query": "q", "effort": "extreme"},
    "a malformed previous run id": {"query": "q", "previousRunId": "a b"},
    "a previous run with a line break": {"query": "q", "previousRunId": f"{UNKNOWN}\n"},
    "metadata that is a list": {"query": "q", "metadata": []},
    "six data sources": {"query": "q", "dataSources": [{"provider": "x"}] * 6},
    "a data source without a name": {"query": "q", "dataSources": [{}]},
    "a user with blanks": {"query": "q", "userIdentifier": "a b"},
    "a user with a long name": {"query": "q", "userIdentifier": "a" * 65},
    "a NUL": {"query": "a\x00b"},
}
NO_JSON = {
    "an empty body": b"",
    "an unclosed brace": b"{",
    "a list": b"[]",
    "null": b"null",
    "NaN": b'{"query": NaN}',
    "a surrogate": rb'{"query": "\ud800"}',
    "invalid UTF-8": b'{"query": "\xff"}',
    "101 levels": b'{"query": "q", "metadata": ' + b'{"a":' * 100 + b"1" + b"}" * 101,
}


@pytest.mark.parametrize("body", NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_an_invalid_create_request_is_refused(raw, body):
    assert_invalid(raw.post("/agent/runs", json=body))
    assert raw.get("/agent/runs").json()["data"] == []


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_a_body_that_is_not_a_json_object_is_refused(raw, body):
    assert_invalid(raw.post("/agent/runs", content=body))


def test_every_effort_is_accepted_and_unknown_or_null_fields_are_dropped(raw):
    for effort in ("minimal", "low", "medium", "high", "xhigh", "auto", "ultra", "max"):
        run = raw.post("/agent/runs", json={"query": "q", "effort": effort}).json()
        assert run["request"] == {"query": "q", "effort": effort}
    body = {
        "query": "q",
        "effort": None,
        "outputSchema": None,
        "metadata": {"kept": None},
        "budget": {"maxCostDollars": 5},
        "dataSources": [{"provider": "x", "option": 1}],
        "userIdentifier": "user_1-a",
        "somethingNew": 1,
        "stream": True,
    }
    kept = {
        "query": "q",
        "effort": "auto",
        "metadata": {"kept": None},
        "budget": {"maxCostDollars": 5},
        "dataSources": [{"provider": "x"}],
        "userIdentifier": "user_1-a",
    }
    assert raw.post("/agent/runs", json=body).json()["request"] == kept


def test_a_previous_run_must_have_completed(runs, raw):
    failing = ended(runs, runs.create(**asking(fail="no luck"), betas=BETAS).id)
    body = {"query": "q", "previousRunId": failing.id}
    assert_invalid(raw.post("/agent/runs", json=body), "PREVIOUS_RUN_NOT_COMPLETED")
    body = {"query": "q", "previousRunId": UNKNOWN}
    assert_invalid(raw.post("/agent/runs", json=body), "PREVIOUS_RUN_NOT_FOUND")
    body = {"query": "q", "previousRunId": "some.other:id"}
    assert_invalid(raw.post("/agent/runs", json=body), "PREVIOUS_RUN_NOT_FOUND")


BAD_IDS = ("a%20b", "%00", "%ff", "x" * 201, "%F0%9F%98%80", "a%0Ab", "%25", "~", "a%5Cb")


@pytest.mark.parametrize(("method", "path"), ROUTES[2:])
def test_a_malformed_run_id_is_refused_and_an_unknown_one_is_not_found(raw, method, path):
    for text in BAD_IDS:
        assert_invalid(raw.request(method, path.replace(UNKNOWN, text)))
    for text in (UNKNOWN, "x", "a.b:c-d_e", "x" * 200, UNKNOWN.upper()):
        assert_gone(raw.request(method, path.replace(UNKNOWN, text)))


def test_an_empty_body_with_a_content_type_is_accepted(raw, runs):
    run = runs.create(query="q", betas=BETAS)
    headers = {"content-type": "application/json"}
    for method, path in (
        ("GET", f"/agent/runs/{run.id}"),
        ("POST", f"/agent/runs/{run.id}/cancel"),
        ("POST", f"/agent/runs/{run.id}/stop"),
        ("DELETE", f"/agent/runs/{run.id}"),
    ):
        assert raw.request(method, path, headers=headers, content=b"").status_code == 200


def test_framework_errors_use_the_error_format_of_the_api(raw):
    for path in ("/agent", "/agent/", "/agent/x", "/agent/runs/a/b", "/agent/runs/a/events/1"):
        answer = raw.get(path)
        assert_error(answer, 404, "INVALID_REQUEST", "NOT_FOUND")
    for method, path in (
        ("PUT", "/agent/runs"),
        ("DELETE", "/agent/runs"),
        ("PATCH", f"/agent/runs/{UNKNOWN}"),
        ("GET", f"/agent/runs/{UNKNOWN}/cancel"),
        ("POST", f"/agent/runs/{UNKNOWN}/events"),
    ):
        assert_invalid(raw.request(method, path))
    assert_invalid(raw.post("/agent/runs", content=b"x" * (25 * 1024 * 1024 + 1)))

"""Test agent runs without a server: ids, fields derived from the run's row, events, and errors."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest

from belay_server.api.agent_runs import routes as agent_routes
from belay_server.api.streaming.agent_runs import frame_of, replay
from belay_server.configuration.settings import EXAMPLE_CONFIG
from belay_server.domain.agent_runs.outputs import output_of
from belay_server.domain.agent_runs.runs import (
    STOPPED,
    AgentRun,
    agent_run_id,
    is_any_id,
    is_our_id,
    run_id_of,
    written,
)
from belay_server.domain.errors import Interrupted, Unavailable
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.services.agent_runs.events import events_of
from belay_server.services.runs.creation import new_id
from tests.acceptance.agent_runs.exa_schemas import RUN, check, check_answer
from tests.bare_api import bare_client

CANCELLED = {"error": "UserInterrupt", "message": "interrupt requested via somewhere else"}
MORNING = datetime(2026, 5, 7, 18, 31, tzinfo=UTC)
RUN_ROW = AgentRun(
    id=agent_run_id(UUID(int=1)),
    run_id=UUID(int=1),
    thread_id=UUID(int=2),
    request={"query": "q"},
    created_at=MORNING,
    run_status="pending",
    started_at=None,
    ended_at=None,
    run_error=None,
    outcome=None,
)
STARTED = replace(RUN_ROW, run_status="running", started_at=MORNING)
ENDED = replace(STARTED, ended_at=MORNING + timedelta(seconds=1))


def test_an_agent_run_id_is_its_run_id_as_a_ulid():
    assert agent_run_id(UUID(int=0)) == "agent_run_" + "0" * 26
    assert agent_run_id(UUID(int=31)) == "agent_run_" + "0" * 25 + "z"
    assert agent_run_id(UUID(int=2**128 - 1)) == "agent_run_7" + "z" * 25
    for run_id in [new_id() for _ in range(100)]:
        text = agent_run_id(run_id)
        assert is_our_id(text)
        assert run_id_of(text) == run_id
    assert run_id_of("agent_run_x") is None


def test_ids_sort_by_their_creation_time():
    made = [agent_run_id(new_id()) for _ in range(10_000)]
    assert made == sorted(made)
    chance = random.Random(7)
    numbers = sorted(chance.getrandbits(128) for _ in range(1000))
    written_down = [agent_run_id(UUID(int=number)) for number in numbers]
    assert written_down == sorted(written_down)


@pytest.mark.parametrize(
    ("text", "any_id", "our_id"),
    [
        ("agent_run_01j7x9v0m2n4p6q8r0s2t4v6w8", True, True),
        ("agent_run_01J7X9V0M2N4P6Q8R0S2T4V6W8", True, False),
        ("agent_run_81j7x9v0m2n4p6q8r0s2t4v6w8", True, False),
        ("agent_run_01j7x9v0m2n4p6q8r0s2t4v6wl", True, False),
        ("agent_run_01j7x9v0m2n4p6q8r0s2t4v6w", True, False),
        ("agent_run_01j7x9v0m2n4p6q8r0s2t4v6w8\n", False, False),
        ("a.b:c-d_E", True, False),
        ("x" * 200, True, False),
        ("x" * 201, False, False),
        ("", False, False),
        ("a b", False, False),
        ("é", False, False),
        ("١", False, False),
    ],
)
def test_only_valid_texts_are_accepted_as_ids(text, any_id, our_id):
    assert (is_any_id(text), is_our_id(text)) == (any_id, our_id)


@pytest.mark.parametrize(
    ("run", "status", "reason"),
    [
        (RUN_ROW, "queued", None),
        (STARTED, "running", None),
        # Its worker died, and it is pending again.
        (replace(STARTED, run_status="pending"), "running", None),
        (replace(ENDED, run_status="success"), "completed", "schema_satisfied"),
        (replace(ENDED, run_status="interrupted"), "cancelled", "cancelled"),
        (replace(ENDED, run_status="interrupted", run_error=CANCELLED), "cancelled", "cancelled"),
        (replace(ENDED, run_status="interrupted", run_error=STOPPED), "completed", "stopped"),
        (replace(ENDED, run_status="error"), "failed", "error"),
        (replace(ENDED, run_status="timeout"), "failed", "error"),
        (replace(ENDED, run_status=None), "cancelled", "cancelled"),
    ],
)
def test_status_and_stop_reason_are_derived_from_the_run(run, status, reason):
    assert (run.status, run.stop_reason) == (status, reason)
    check(RUN, run.document, status)
    assert ("error" in run.document) == (status == "failed")


def test_a_timed_out_run_has_a_timeout_error():
    error = {"error": "TimeoutError", "message": "The run exceeded its time limit."}
    run = replace(ENDED, run_status="timeout", run_error=error)
    expected = {"type": "SERVER_ERROR", "code": "TIMEOUT", "message": error["message"]}
    assert run.document["error"] == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "The run failed."),
        ({"error": "KeyError", "message": ""}, "KeyError"),
        ({"error": "KeyError", "message": "'a'"}, "'a'"),
    ],
)
def test_an_error_always_has_a_message(error, message):
    run = replace(ENDED, run_status="error", run_error=error)
    assert run.document["error"]["message"] == message


def test_only_a_completed_run_has_an_output():
    outcome = {"values": {"text": "t", "structured": 1, "grounding": []}}
    for status in ("interrupted", "error", "timeout"):
        run = replace(ENDED, run_status=status, outcome=outcome)
        assert run.document["output"] == {"text": "", "structured": None, "grounding": []}
    run = replace(ENDED, run_status="success", outcome=outcome)
    assert run.document["output"] == {"text": "t", "structured": None, "grounding": []}
    run = replace(run, request={"query": "q", "outputSchema": {}})
    assert run.document["output"]["structured"] == 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (None, ""),
        ([1], ""),
        ("text", ""),
        ({}, ""),
        ({"text": None}, ""),
        ({"text": 5}, "5"),
        ({"text": {"a": "ü"}}, '{"a": "ü"}'),
    ],
)
def test_the_output_text_is_a_string_whatever_the_graph_returns(values, text):
    assert output_of(values, structured=True) == {
        "text": text,
        "structured": None,
        "grounding": [],
    }


def test_a_timestamp_is_written_in_utc_with_milliseconds():
    assert written(MORNING) == "2026-05-07T18:31:00.000Z"
    east = MORNING.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert written(east.replace(microsecond=123_999)) == "2026-05-07T18:31:00.123Z"


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (RUN_ROW, ["created"]),
        (STARTED, ["created", "started"]),
        (replace(ENDED, run_status="success"), ["created", "started", "completed"]),
        (replace(ENDED, run_status="error"), ["created", "started", "failed"]),
        (replace(ENDED, run_status="interrupted"), ["created", "started", "cancelled"]),
        (replace(ENDED, run_status="interrupted", started_at=None), ["created", "cancelled"]),
        (replace(ENDED, run_status=None, started_at=None), ["created", "cancelled"]),
    ],
)
def test_events_are_numbered_from_one(run, names):
    events = events_of(run)
    assert [event.name for event in events] == [f"agent_run.{name}" for name in names]
    assert [event.number for event in events] == list(range(1, len(names) + 1))
    assert all(event.data["id"] == run.id for event in events)
    assert list(replay(run, 0)) == [frame_of(event) for event in events]
    assert list(replay(run, 1)) == [frame_of(event) for event in events[1:]]
    assert list(replay(run, 99)) == []


def test_a_frame_is_ascii_with_one_line_of_data():
    run = replace(RUN_ROW, request={"query": "\u2028\u2029\u0085\r\n\ud83e"})
    frame = frame_of(events_of(replace(run, run_status="success", ended_at=MORNING))[-1])
    assert frame.isascii()
    lines = frame.split(b"\n")
    assert [line.partition(b":")[0] for line in lines] == [b"id", b"event", b"data", b"", b""]
    assert b"\\u2028\\u2029\\u0085\\r\\n" in frame


# ---------------------------------------------------------------------------------------------
# Error responses that a live server cannot be made to return.


HEADERS = {"x-api-key": "k", "exa-beta": "agent-2026-05-07"}


def answered(response, path: str) -> dict[str, Any]:
    check_answer("GET", path, response.status_code, response.headers, response.data)
    return response.json["error"]


@pytest.mark.parametrize("error", [Unavailable(), Interrupted()])
def test_an_unavailable_database_is_500_with_retry_after(monkeypatch, error):
    def away(*_args: Any, **_kwargs: Any):
        raise error

    monkeypatch.setattr(agent_routes.agent_runs, "list_agent_runs", away)
    response = bare_client().get("/agent/runs", headers=HEADERS)
    found = answered(response, "/agent/runs")
    assert response.status_code == 500
    assert response.headers["retry-after"] == "2"
    assert (found["type"], found["code"]) == ("SERVER_ERROR", "SERVER_ERROR")
    # The other API has its own error format.
    assert bare_client().get("/nothing").json == {"detail": "Not Found"}


def test_an_unexpected_error_is_500_without_details(monkeypatch, caplog):
    def broken(*_args: Any, **_kwargs: Any):
        raise RuntimeError("a secret")

    monkeypatch.setattr(agent_routes.agent_runs, "list_agent_runs", broken)
    response = bare_client().get("/agent/runs", headers=HEADERS)
    assert answered(response, "/agent/runs")["code"] == "SERVER_ERROR"
    assert response.status_code == 500
    assert "a secret" in caplog.text
    assert "secret" not in response.text


@pytest.fixture
def without_agent_runs(tmp_path):
    path = tmp_path / "langgraph.json"
    path.write_text('{"graphs": {"a": "./a.py:graph"}}')
    return path


@pytest.mark.parametrize("path", ["/agent/runs", "/agent/runs/x", "/agent/runs/x/events", "/agent"])
def test_a_project_without_an_agent_runs_graph_has_no_agent_runs(without_agent_runs, path):
    served = bare_client(config=without_agent_runs)
    for headers in (HEADERS, {}):
        response = served.get(path, headers=headers)
        found = answered(response, path)
        assert response.status_code == 404
        # Not RUN_NOT_FOUND, which would mean that a run was deleted.
        assert (found["type"], found["code"]) == ("NOT_FOUND", "INVALID_REQUEST")
        assert "langgraph.json" in found["message"]
    document = served.get("/openapi.json").json
    assert not any(path.startswith("/agent") for path in document["paths"])
    assert "AgentRun" not in document["components"]["schemas"]


def test_the_example_has_agent_runs():
    assert read_project(EXAMPLE_CONFIG).agent_runs_graph == "research"

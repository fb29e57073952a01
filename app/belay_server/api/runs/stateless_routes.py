"""The routes of stateless runs. A thread is created for the run, and by default deleted when the
run has ended."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask import Response, request

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid
from belay_server.api.runs.requests import run_request
from belay_server.api.runs.responses import (
    EVENTS,
    OUTCOME,
    cancels_joined_run,
    cancels_on_disconnect,
    outcome_response,
    run_response,
    stream_response,
)
from belay_server.api.runs.schemas import (
    CreateStatelessRun,
    DisconnectQuery,
    JoinQuery,
    JoinStreamQuery,
    Run,
    stream_modes,
)
from belay_server.api.security.authorization import authorized, authorizes_itself
from belay_server.api.streaming.runs import (
    FollowedRun,
    follow_new_run,
    follow_run,
    position_to_join,
)
from belay_server.db import runs as run_rows
from belay_server.domain.errors import NotFound
from belay_server.domain.run_options import RunOptions
from belay_server.domain.runs import Run as RunRow
from belay_server.services.runs import creation as run_creates

blueprint = Blueprint("stateless runs", __name__, description="Runs without a thread")


def _follow(options: RunOptions, *, events: bool) -> FollowedRun:
    asked = run_request(options, None)
    cancels = cancels_on_disconnect(options)
    return follow_new_run(parts(), asked, cancel_on_disconnect=cancels, events=events)


def _location(run: RunRow | FollowedRun) -> str:
    return f"/runs/{run.run_id}"


@blueprint.post("/runs")
@blueprint.arguments(CreateStatelessRun)
@blueprint.response(200, Run)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@authorizes_itself
def create_stateless_run(options: RunOptions) -> Response:
    """Create a stateless run, and respond without waiting for its outcome."""
    run = run_creates.create_run(parts(), run_request(options, None))
    return run_response(run, _location(run))


@blueprint.post("/runs/wait")
@blueprint.arguments(DisconnectQuery, location="query")
@blueprint.arguments(CreateStatelessRun)
@blueprint.response(200, OUTCOME, description="The run's final values, when it has ended")
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@authorizes_itself
def wait_stateless_run(_query: dict[str, Any], options: RunOptions) -> Response:
    """Create a stateless run, and respond with its outcome when it has ended."""
    followed = _follow(options, events=False)
    return outcome_response(followed, _location(followed))


@blueprint.post("/runs/stream")
@blueprint.arguments(DisconnectQuery, location="query")
@blueprint.arguments(CreateStatelessRun)
@blueprint.response(200, EVENTS, description="The run's events", content_type="text/event-stream")
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@authorizes_itself
def stream_stateless_run(_query: dict[str, Any], options: RunOptions) -> Response:
    """Create a stateless run, and stream its events as server-sent events."""
    followed = _follow(options, events=True)
    return stream_response(followed, _location(followed))


def _found(run_id: str) -> RunRow:
    """Return a stateless run by its id only, as its thread is not visible to clients. Raises
    NotFound."""
    found: UUID = path_uuid(run_id, "run")
    with parts().database.connection() as conn:
        run = run_rows.get_run(conn, found)
    if run is None or not run.temporary:
        raise NotFound("Run not found")
    return run


def _joined(run_id: str) -> tuple[RunRow, bool]:
    """Return a run to follow, and whether to cancel it when this client disconnects.

    Raises NotFound, Forbidden, Refused.
    """
    cancels = cancels_joined_run(run_id=path_uuid(run_id, "run"))
    return _found(run_id), cancels


@blueprint.get("/runs/<run_id>/join")
@blueprint.arguments(JoinQuery, location="query")
@blueprint.response(200, OUTCOME, description="The run's final values, when it has ended")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def join_stateless_run(_query: dict[str, Any], run_id: str) -> Response:
    """Wait until a stateless run has ended, and respond with its outcome."""
    run, cancels = _joined(run_id)
    followed = follow_run(run, cancel_on_disconnect=cancels)
    return outcome_response(followed, _location(run))


@blueprint.get("/runs/<run_id>/stream")
@blueprint.arguments(JoinStreamQuery, location="query")
@blueprint.response(200, EVENTS, description="The run's events", content_type="text/event-stream")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def join_stateless_stream(query: dict[str, Any], run_id: str) -> Response:
    """Join a run's stream. `Last-Event-ID` resumes it if the run has `stream_resumable`."""
    run, cancels = _joined(run_id)
    followed = follow_run(
        run,
        cancel_on_disconnect=cancels,
        stream_modes=stream_modes(query.get("stream_mode")),
        after=position_to_join(parts().event_log, run, request.headers.get("Last-Event-ID")),
    )
    return stream_response(followed, _location(run))

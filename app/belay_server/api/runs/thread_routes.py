"""The routes of runs on a thread."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask import Response, request

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint, json_response
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid, query_flag, query_names
from belay_server.api.runs.requests import run_request
from belay_server.api.runs.responses import (
    EVENTS,
    NOTHING,
    OUTCOME,
    cancels_joined_run,
    cancels_on_disconnect,
    outcome_response,
    run_body,
    run_path,
    run_response,
    stream_response,
)
from belay_server.api.runs.schemas import (
    CancelRunQuery,
    CreateThreadRun,
    DisconnectQuery,
    JoinQuery,
    JoinStreamQuery,
    ListRunsQuery,
    Run,
    SelectedRun,
    stream_modes,
)
from belay_server.api.security.authorization import authorized, authorizes_itself, cancels
from belay_server.api.streaming.runs import (
    FollowedRun,
    follow_new_run,
    follow_run,
    position_to_join,
)
from belay_server.db import runs as run_rows
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.errors import InvalidRequest, NotFound
from belay_server.domain.ids import parse_uuid
from belay_server.domain.run_options import RunOptions
from belay_server.domain.runs import RUN_FIELDS, CancelAction, user_cancel_reason
from belay_server.domain.runs import Run as RunRow
from belay_server.services.runs import creation as run_creates
from belay_server.services.runs import deletion as runs
from belay_server.services.runs.cancellation import cancel_runs, wait_until_ended

blueprint = Blueprint("thread runs", __name__, description="Runs on a thread")

NOTHING_FOUND = "No runs found to cancel."
NOTHING_MATCHES = (
    "No matching runs to cancel. Please verify the thread ID and run IDs are correct, and the runs "
    "haven't been deleted or completed."
)


def _asked(thread_id: str, options: RunOptions) -> run_creates.RunRequest:
    return run_request(options, _thread_id_of_create(thread_id))


def _follow(thread_id: str, options: RunOptions, *, events: bool) -> FollowedRun:
    asked = _asked(thread_id, options)
    cancels = cancels_on_disconnect(options)
    return follow_new_run(parts(), asked, cancel_on_disconnect=cancels, events=events)


def _thread_id_of_create(text: str) -> UUID:
    try:
        return parse_uuid(text)
    except ValueError:
        raise InvalidRequest("Invalid thread ID") from None


@blueprint.post("/threads/<thread_id>/runs")
@blueprint.arguments(CreateThreadRun)
@blueprint.response(200, Run)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error, description="The thread is busy (`reject`)")
@authorizes_itself
def create_run(options: RunOptions, thread_id: str) -> Response:
    """Create a run on a thread, and respond without waiting for its outcome."""
    run = run_creates.create_run(parts(), _asked(thread_id, options))
    return run_response(run, run_path(run))


@blueprint.post("/threads/<thread_id>/runs/wait")
@blueprint.arguments(DisconnectQuery, location="query")
@blueprint.arguments(CreateThreadRun)
@blueprint.response(200, OUTCOME, description="The run's final values, when it has ended")
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@authorizes_itself
def wait_run(_query: dict[str, Any], options: RunOptions, thread_id: str) -> Response:
    """Create a run on a thread, and respond with its outcome when it has ended."""
    followed = _follow(thread_id, options, events=False)
    return outcome_response(followed, run_path(followed))


@blueprint.post("/threads/<thread_id>/runs/stream")
@blueprint.arguments(DisconnectQuery, location="query")
@blueprint.arguments(CreateThreadRun)
@blueprint.response(200, EVENTS, description="The run's events", content_type="text/event-stream")
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@authorizes_itself
def stream_run(_query: dict[str, Any], options: RunOptions, thread_id: str) -> Response:
    """Create a run on a thread, and stream its events as server-sent events."""
    followed = _follow(thread_id, options, events=True)
    return stream_response(followed, run_path(followed))


@blueprint.get("/threads/<thread_id>/runs")
@blueprint.arguments(ListRunsQuery, location="query")
@blueprint.response(200, SelectedRun(many=True))
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "search")
def list_runs(query: dict[str, Any], thread_id: str) -> Response:
    """List runs for a thread, newest first."""
    fields = query_names(query.get("select")) or list(RUN_FIELDS)
    if unknown := [name for name in fields if name not in RUN_FIELDS]:
        raise InvalidRequest(f"Invalid select columns: {unknown}. Expected: {sorted(RUN_FIELDS)}")
    found = runs.list_runs(
        parts().database,
        path_uuid(thread_id, "thread"),
        status=query.get("status"),
        metadata=query["metadata"],
        limit=query["limit"],
        offset=query["offset"],
    )
    return json_response([run_body(run, fields) for run in found])


def _found(thread_id: str, run_id: str) -> RunRow:
    ids = path_uuid(thread_id, "thread"), path_uuid(run_id, "run")
    with parts().database.connection() as conn:
        return runs.get_run(conn, *ids)


@blueprint.get("/threads/<thread_id>/runs/<run_id>")
@blueprint.response(200, Run)
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def get_run(thread_id: str, run_id: str) -> Response:
    """Get a run by ID, with its status and its options (`kwargs`)."""
    return json_response(run_body(_found(thread_id, run_id)))


@blueprint.delete("/threads/<thread_id>/runs/<run_id>")
@blueprint.response(200, NOTHING, description="Success")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "delete")
def delete_run(thread_id: str, run_id: str) -> Response:
    """Delete a run by ID. An active run is stopped first."""
    runs.delete_run(parts(), path_uuid(thread_id, "thread"), path_uuid(run_id, "run"))
    return json_response({})


@blueprint.post("/threads/<thread_id>/runs/<run_id>/cancel")
@blueprint.arguments(CancelRunQuery, location="query")
@blueprint.response(200, NOTHING, description="With wait: the work has stopped")
@blueprint.alt_response(202, description="Without wait: the cancel is accepted and stored")
@blueprint.alt_response(404, schema=Error)
@cancels
@authorized("threads", "update")
def cancel_run(query: dict[str, Any], thread_id: str, run_id: str) -> Response:
    """Cancel a run by ID. With `wait`, respond when its work has stopped."""
    thread, run = path_uuid(thread_id, "thread"), path_uuid(run_id, "run")
    action = CancelAction(query["action"])
    reason = user_cancel_reason(action, "POST /threads/{thread_id}/runs/{run_id}/cancel")
    filter_ = CancelFilter(thread_id=thread, run_ids=[run])
    if not cancel_runs(parts(), filter_, action, reason):
        with parts().database.connection() as conn:
            known = run_rows.get_thread_run(conn, thread, run)
        raise NotFound(NOTHING_FOUND if known is None else NOTHING_MATCHES)
    if not query_flag("wait"):
        return Response(status=202)
    wait_until_ended(parts(), [run])
    location = f"/threads/{thread}/runs/{run}"
    headers = {"location": f"{location}/join", "content-location": location}
    return json_response({}, headers=headers)


@blueprint.get("/threads/<thread_id>/runs/<run_id>/join")
@blueprint.arguments(JoinQuery, location="query")
@blueprint.response(200, OUTCOME, description="The run's own final values, when it has ended")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def join_run(_query: dict[str, Any], thread_id: str, run_id: str) -> Response:
    """Wait until a run has ended, and respond with its outcome."""
    run, cancels = _joined(thread_id, run_id)
    followed = follow_run(run, cancel_on_disconnect=cancels)
    return outcome_response(followed, run_path(run))


@blueprint.get("/threads/<thread_id>/runs/<run_id>/stream")
@blueprint.arguments(JoinStreamQuery, location="query")
@blueprint.response(200, EVENTS, description="The run's events", content_type="text/event-stream")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def join_stream(query: dict[str, Any], thread_id: str, run_id: str) -> Response:
    """Join a run's stream. `Last-Event-ID` (exclusive; -1 or 0 from the start) resumes it if
    the run has `stream_resumable`."""
    run, cancels = _joined(thread_id, run_id)
    followed = follow_run(
        run,
        cancel_on_disconnect=cancels,
        stream_modes=stream_modes(query.get("stream_mode")),
        after=position_to_join(parts().event_log, run, request.headers.get("Last-Event-ID")),
    )
    return stream_response(followed, run_path(run))


def _joined(thread_id: str, run_id: str) -> tuple[RunRow, bool]:
    """Return a run to follow, and whether to cancel it when this client disconnects. A stateless
    run can be read for a short time after its end.

    Raises NotFound, Forbidden, Refused.
    """
    thread, run_uuid = path_uuid(thread_id, "thread"), path_uuid(run_id, "run")
    cancels = cancels_joined_run(thread_id=thread, run_id=run_uuid)
    with parts().database.connection() as conn:
        run = run_rows.get_thread_run(conn, thread, run_uuid, ended_stateless=True)
    if run is None:
        raise NotFound("Run not found")
    return run, cancels

"""Runs without a thread of the client's: one is made for the run, and goes when it has ended."""

from __future__ import annotations

import uuid
from typing import Any

from flask import Response, request

from app.api.error_schemas import Error
from app.api.json_body import Blueprint
from app.api.parts import parts
from app.api.run_responses import (
    cancels_on_disconnect,
    idempotency_key,
    outcome_response,
    run_response,
    stream_response,
)
from app.api.run_schemas import CreateStatelessRun, DisconnectQuery, Run
from app.domain.errors import BadRequest
from app.domain.runs import Run as RunRow
from app.services import runs
from app.services.run_stream import Follow, follow_new_run

blueprint = Blueprint("stateless runs", __name__, description="Runs without a thread")


def _asked(body: dict[str, Any]) -> runs.RunRequest:
    if (body.get("command") or {}).get("resume") is not None:
        raise BadRequest("You must provide a thread_id when resuming.")
    request_id = request.headers.get("x-request-id") or str(uuid.uuid4())
    return runs.RunRequest(
        body=body, thread_id=None, request_id=request_id, idempotency_key=idempotency_key()
    )


def _follow(body: dict[str, Any], *, events: bool) -> Follow:
    cancels = cancels_on_disconnect(body)
    return follow_new_run(parts(), _asked(body), cancel_on_disconnect=cancels, events=events)


def _location(run: RunRow | Follow) -> str:
    return f"/runs/{run.run_id}"


@blueprint.post("/runs")
@blueprint.arguments(CreateStatelessRun)
@blueprint.response(200, Run)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@blueprint.alt_response(422, schema=Error)
def create_stateless_run(body: dict[str, Any]) -> Response:
    run = runs.create_run(parts(), _asked(body))
    return run_response(run, _location(run))


@blueprint.post("/runs/wait")
@blueprint.arguments(DisconnectQuery, location="query")
@blueprint.arguments(CreateStatelessRun)
@blueprint.response(200, description="The run's final values, when it has ended")
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@blueprint.alt_response(422, schema=Error)
def wait_stateless_run(_query: dict[str, Any], body: dict[str, Any]) -> Response:
    follow = _follow(body, events=False)
    return outcome_response(follow, _location(follow))


@blueprint.post("/runs/stream")
@blueprint.arguments(DisconnectQuery, location="query")
@blueprint.arguments(CreateStatelessRun)
@blueprint.response(200, description="The run's events", content_type="text/event-stream")
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@blueprint.alt_response(422, schema=Error)
def stream_stateless_run(_query: dict[str, Any], body: dict[str, Any]) -> Response:
    follow = _follow(body, events=True)
    return stream_response(follow, _location(follow))

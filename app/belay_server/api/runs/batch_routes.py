"""The route that creates a batch of runs."""

from __future__ import annotations

import dataclasses

from flask import Response

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint, json_response
from belay_server.api.http.error_schemas import Error
from belay_server.api.runs.requests import run_request
from belay_server.api.runs.responses import run_body
from belay_server.api.runs.schemas import BatchRun, CreateBatchRun, Run
from belay_server.api.security.authorization import authorizes_itself
from belay_server.domain.errors import InvalidRequest
from belay_server.services.runs.creation import create_runs

blueprint = Blueprint("batch runs", __name__, description="Batches of runs")
_MOST = 1_000


@blueprint.post("/runs/batch")
@blueprint.arguments(CreateBatchRun(many=True))
@blueprint.response(200, Run(many=True))
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error)
@authorizes_itself
def create_batch(runs: list[BatchRun]) -> Response:
    """Create a batch of runs: all of them, or none."""
    if not 1 <= len(runs) <= _MOST:
        raise InvalidRequest(f"a batch must have 1 to {_MOST} runs, not {len(runs)}")
    # The runs share one Idempotency-Key. Without a position they would all have the same id.
    requests = [
        dataclasses.replace(run_request(run.options, run.thread_id), key_position=position)
        for position, run in enumerate(runs)
    ]
    return json_response([run_body(run) for run in create_runs(parts(), requests)])

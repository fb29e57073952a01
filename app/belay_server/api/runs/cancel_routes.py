"""The route that cancels many runs."""

from __future__ import annotations

from typing import Any

from flask import Response

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint
from belay_server.api.http.error_schemas import Error
from belay_server.api.runs.schemas import CancelQuery, CancelRuns
from belay_server.api.runs.thread_routes import NOTHING_FOUND, NOTHING_MATCHES
from belay_server.api.security.authorization import authorized, cancels
from belay_server.db import run_cancels as cancel_rows
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.errors import NotFound
from belay_server.domain.runs import CancelAction, user_cancel_reason
from belay_server.services.runs.cancellation import cancel_runs

blueprint = Blueprint("bulk runs", __name__, description="Bulk cancels of runs")


@blueprint.post("/runs/cancel")
@blueprint.arguments(CancelQuery, location="query")
@blueprint.arguments(CancelRuns)
@blueprint.alt_response(204, description="Success - Runs cancelled")
@blueprint.alt_response(404, schema=Error)
@cancels
@authorized("threads", "update")
def cancel_many_runs(query: dict[str, Any], body: dict[str, Any]) -> Response:
    """Cancel one or more runs. Can cancel runs by thread ID and run IDs, or by status filter."""
    action = CancelAction(query["action"])
    status = body.get("status")
    filter_ = CancelFilter(
        thread_id=body.get("thread_id"),
        run_ids=body.get("run_ids"),
        status=None if status == "all" else status,
    )
    reason = user_cancel_reason(action, "POST /runs/cancel")
    if not cancel_runs(parts(), filter_, action, reason):
        raise NotFound(_why_nothing(filter_))
    return Response(status=204)


def _why_nothing(filter_: CancelFilter) -> str:
    """Return the message for a cancel without matches. It differs for known runs, which have
    ended, and unknown ones."""
    if filter_.run_ids:
        with parts().database.connection() as conn:
            if cancel_rows.count_known_runs(conn, filter_.thread_id, filter_.run_ids):
                return NOTHING_MATCHES
    return NOTHING_FOUND

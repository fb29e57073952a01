"""The routes of crons, which create runs on a schedule."""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import UUID

from flask import Response

from belay_server.api.context import parts
from belay_server.api.crons.schemas import (
    CountCrons,
    CreateCron,
    CreateThreadCron,
    Cron,
    PatchCron,
    SearchCrons,
    SelectedCron,
)
from belay_server.api.http.bodies.json_body import Blueprint, json_response
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid
from belay_server.api.http.pages import COUNT, page_response, shown
from belay_server.api.runs.requests import authorize_runs, authorized_options, check_webhook
from belay_server.api.security.authorization import authorized
from belay_server.api.security.limits import asker
from belay_server.db import crons as cron_rows
from belay_server.db.crons import CronFilter
from belay_server.domain.crons import CRON_FIELDS
from belay_server.domain.crons import Cron as CronRow
from belay_server.domain.run_options import RunOptions
from belay_server.services import crons

blueprint = Blueprint("crons", __name__, description="Runs that are created on a schedule")


def _shown(cron: CronRow, fields: list[str] | None = None) -> dict[str, Any]:
    if fields:
        return shown(cron, fields)
    whole = {**shown(cron, CRON_FIELDS), "user_id": ""}
    return whole if cron.last_error is None else {**whole, "last_error": cron.last_error}


@blueprint.post("/runs/crons")
@blueprint.arguments(CreateCron)
@blueprint.response(200, Cron)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@authorized("crons", "create")
def create_cron(body: dict[str, Any]) -> Response:
    """Create a cron without a thread. Each of its runs has a new thread."""
    return _create(body, None)


@blueprint.post("/threads/<thread_id>/runs/crons")
@blueprint.arguments(CreateThreadCron)
@blueprint.response(200, Cron)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@authorized("crons", "create")
def create_thread_cron(body: dict[str, Any], thread_id: str) -> Response:
    """Create a cron on a thread, which all of its runs use."""
    return _create(body, path_uuid(thread_id, "thread"))


def _create(body: dict[str, Any], thread_id: UUID | None) -> Response:
    check_webhook(body.get("webhook"))
    options, maker = authorize_runs(RunOptions.from_document(body), thread_id)
    body |= authorized_options(options)
    maker = dataclasses.replace(maker, caller=maker.caller or asker())
    return json_response(_shown(crons.create_cron(parts(), body, thread_id, maker.as_json())))


@blueprint.get("/runs/crons/<cron_id>")
@blueprint.response(200, Cron)
@blueprint.alt_response(404, schema=Error)
@authorized("crons", "read")
def get_cron(cron_id: str) -> Response:
    """Get a cron, with the time of its next run."""
    return json_response(_shown(crons.get_cron(parts().database, path_uuid(cron_id, "cron"))))


@blueprint.patch("/runs/crons/<cron_id>")
@blueprint.arguments(PatchCron)
@blueprint.response(200, Cron)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@authorized("crons", "update")
def patch_cron(body: dict[str, Any], cron_id: str) -> Response:
    """Update a cron: replace the given fields, and merge its metadata."""
    check_webhook(body.get("webhook"))
    return json_response(_shown(crons.patch_cron(parts(), path_uuid(cron_id, "cron"), body)))


@blueprint.delete("/runs/crons/<cron_id>")
@blueprint.alt_response(204, description="Deleted; the runs that it created are kept")
@blueprint.alt_response(404, schema=Error)
@authorized("crons", "delete")
def delete_cron(cron_id: str) -> Response:
    """Delete a cron. The runs that it created are kept."""
    crons.delete_cron(parts().database, path_uuid(cron_id, "cron"))
    return Response(status=204)


def _filter(body: dict[str, Any]) -> CronFilter:
    return CronFilter(
        assistant_id=crons.assistant_id_of(parts(), body.get("assistant_id")),
        thread_id=body.get("thread_id"),
        enabled=body.get("enabled"),
        metadata=body.get("metadata") or {},
    )


@blueprint.post("/runs/crons/count")
@blueprint.arguments(CountCrons)
@blueprint.response(200, COUNT)
@authorized("crons", "search")
def count_crons(body: dict[str, Any]) -> Response:
    """Count the crons that match all given conditions."""
    filter_ = _filter(body)
    with parts().database.connection() as conn:
        return json_response(cron_rows.count_crons(conn, filter_))


@blueprint.post("/runs/crons/search")
@blueprint.arguments(SearchCrons)
@blueprint.response(200, SelectedCron(many=True))
@authorized("crons", "search")
def search_crons(body: dict[str, Any]) -> Response:
    """Search crons. The total number of matches is in `x-pagination-total`."""
    filter_ = _filter(body)
    with parts().database.connection() as conn:
        found = cron_rows.search_crons(
            conn,
            filter_,
            sort_by=body["sort_by"] or "created_at",
            sort_order=body["sort_order"] or "desc",
            limit=body["limit"],
            offset=body["offset"],
        )
        total = cron_rows.count_crons(conn, filter_)
    items = [_shown(cron, body.get("select")) for cron in found]
    return page_response(items, total=total, limit=body["limit"], offset=body["offset"])

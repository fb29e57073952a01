"""Threads: records. Their states are in `thread_states`, their runs in `thread_runs`."""

from __future__ import annotations

from typing import Any

from flask import Response, request

from app.api.error_schemas import Error
from app.api.fields import path_uuid
from app.api.json_body import Blueprint, json_response
from app.api.pages import page_response, shown
from app.api.parts import parts
from app.api.thread_schemas import CreateThread, PatchThread, SearchThreads, Thread
from app.db.threads import ThreadFilter
from app.domain.threads import THREAD_FIELDS
from app.domain.threads import Thread as ThreadRow
from app.services import threads

blueprint = Blueprint("threads", __name__, description="Conversations and their state")


def _shown(thread: ThreadRow, fields: list[str] | None = None) -> dict[str, Any]:
    """A new thread has no `interrupts` and no `error` yet, as the reference has it."""
    document = shown(thread, fields or THREAD_FIELDS)
    if not fields and thread.interrupts is None and thread.error is None:
        del document["interrupts"], document["error"]
    elif document.get("interrupts", {}) is None:
        document["interrupts"] = {}
    return document


@blueprint.post("/threads")
@blueprint.arguments(CreateThread)
@blueprint.response(200, Thread)
@blueprint.alt_response(409, schema=Error, description="The id is taken")
@blueprint.alt_response(422, schema=Error)
def create_thread(body: dict[str, Any]) -> Response:
    return json_response(_shown(threads.create_thread(parts(), body)))


@blueprint.get("/threads/<thread_id>")
@blueprint.response(200, Thread)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(422, schema=Error)
def get_thread(thread_id: str) -> Response:
    return json_response(_shown(threads.get_thread(parts(), path_uuid(thread_id, "thread"))))


@blueprint.patch("/threads/<thread_id>")
@blueprint.arguments(PatchThread)
@blueprint.response(200, Thread)
@blueprint.alt_response(204, description="With `Prefer: return=minimal`")
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(422, schema=Error)
def patch_thread(body: dict[str, Any], thread_id: str) -> Response:
    metadata = body.get("metadata") or {}
    thread = threads.patch_thread(parts(), path_uuid(thread_id, "thread"), metadata)
    if request.headers.get("Prefer") == "return=minimal":
        return Response(status=204)
    return json_response(_shown(thread))


@blueprint.delete("/threads/<thread_id>")
@blueprint.alt_response(204, description="Deleted; what ran on it was stopped first")
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(422, schema=Error)
def delete_thread(thread_id: str) -> Response:
    threads.delete_thread(parts(), path_uuid(thread_id, "thread"))
    return Response(status=204)


@blueprint.post("/threads/search")
@blueprint.arguments(SearchThreads)
@blueprint.response(200, Thread(many=True))
@blueprint.alt_response(422, schema=Error)
def search_threads(body: dict[str, Any]) -> Response:
    filter_ = ThreadFilter(
        ids=body.get("ids"),
        metadata=body.get("metadata") or {},
        values=body.get("values"),
        status=body.get("status"),
    )
    page = threads.search_threads(
        parts(),
        filter_,
        sort_by=body["sort_by"] or "updated_at",
        sort_order=body["sort_order"] or "desc",
        limit=body["limit"],
        offset=body["offset"],
    )
    items = [_shown(thread, body.get("select")) for thread in page.items]
    return page_response(items, total=page.total, limit=body["limit"], offset=body["offset"])

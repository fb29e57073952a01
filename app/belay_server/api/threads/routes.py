"""The routes of threads. Their states are in `state_routes`, their runs in `runs.thread_routes`."""

from __future__ import annotations

from typing import Any

import orjson
from flask import Response, request

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint, json_response
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid, query_list
from belay_server.api.http.pages import COUNT, page_response, shown
from belay_server.api.security.authorization import authorize, authorized
from belay_server.api.security.limits import connection_owner
from belay_server.api.threads.schemas import (
    CountThreads,
    CreateThread,
    FoundThread,
    GetThreadQuery,
    PatchThread,
    PrunedThreads,
    PruneThreads,
    SearchThreads,
    Storage,
    Thread,
)
from belay_server.db.threads import ThreadFilter
from belay_server.domain.threads import THREAD_FIELDS, TtlStrategy
from belay_server.domain.threads import Thread as ThreadRow
from belay_server.services.stored_json import as_json
from belay_server.services.threads import records as threads

blueprint = Blueprint("threads", __name__, description="Conversations and their state")


def _shown(thread: ThreadRow, fields: list[str] | None = None) -> dict[str, Any]:
    """Return a thread's document. A new thread has no `interrupts` and no `error`, as on
    LangGraph's server."""
    columns = [name for name in fields or THREAD_FIELDS if name != "context"]
    document = shown(thread, columns)
    for name in ("values", "interrupts"):
        if document.get(name) is not None:
            encoded = as_json(parts(), document[name], connection_owner())
            document[name] = orjson.Fragment(encoded)
    if fields and "context" in fields:
        document["context"] = thread.config.get("configurable") or {}
    if not fields and thread.interrupts is None and thread.error is None:
        del document["interrupts"], document["error"]
    elif document.get("interrupts", {}) is None:
        document["interrupts"] = {}
    return document


@blueprint.post("/threads")
@blueprint.arguments(CreateThread)
@blueprint.response(200, Thread)
@blueprint.alt_response(400, schema=Error, description="The graph rejects the `supersteps`")
@blueprint.alt_response(409, schema=Error, description="The id is already in use")
@authorized("threads", "create")
def create_thread(body: dict[str, Any]) -> Response:
    """Create a thread, with the states of `supersteps` if there are any."""
    return json_response(_shown(threads.create_thread(parts(), body)))


@blueprint.get("/threads/<thread_id>")
@blueprint.arguments(GetThreadQuery, location="query")
@blueprint.response(200, Thread)
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def get_thread(query: dict[str, Any], thread_id: str) -> Response:
    """Get a thread with its latest values; with `include=ttl`, also when it expires."""
    thread = threads.get_thread(parts(), path_uuid(thread_id, "thread"), with_values=True)
    document = _shown(thread)
    if "ttl" in query_list(query.get("include")):
        document["ttl"] = _ttl(thread)
    return json_response(document)


def _ttl(thread: ThreadRow) -> dict[str, Any] | None:
    if thread.ttl_minutes is None:
        return None
    return {
        "strategy": thread.ttl_strategy,
        "ttl_minutes": thread.ttl_minutes,
        "expires_at": thread.expires_at and thread.expires_at.isoformat(),
    }


@blueprint.patch("/threads/<thread_id>")
@blueprint.arguments(PatchThread)
@blueprint.response(200, Thread)
@blueprint.alt_response(204, description="With `Prefer: return=minimal`")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "update")
def patch_thread(body: dict[str, Any], thread_id: str) -> Response:
    """Update a thread: merge its metadata, and replace its TTL if one is given."""
    metadata = body.get("metadata") or {}
    thread = threads.patch_thread(
        parts(), path_uuid(thread_id, "thread"), metadata, body.get("ttl")
    )
    if request.headers.get("Prefer") == "return=minimal":
        return Response(status=204)
    return json_response(_shown(thread))


@blueprint.delete("/threads/<thread_id>")
@blueprint.alt_response(204, description="Deleted; its active runs were stopped first")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "delete")
def delete_thread(thread_id: str) -> Response:
    """Delete a thread with its runs and its history. Active runs are stopped first."""
    threads.delete_thread(parts(), path_uuid(thread_id, "thread"))
    return Response(status=204)


@blueprint.post("/threads/<thread_id>/copy")
@blueprint.response(200, Thread)
@blueprint.alt_response(409, schema=Error)
@authorized("threads", "read")
def copy_thread(thread_id: str) -> Response:
    """Copy a thread with its state and history, without its runs."""
    copied: dict[str, Any] = {"thread_id": None, "metadata": {}}
    authorize("threads", "create", copied)
    stamped = dict(copied.get("metadata") or {})
    thread = threads.copy_thread(parts(), path_uuid(thread_id, "thread"), stamped)
    return json_response(_shown(thread))


@blueprint.get("/threads/<thread_id>/storage")
@blueprint.response(200, Storage)
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def get_storage(thread_id: str) -> Response:
    """Get the size of a thread's history in the database."""
    found = path_uuid(thread_id, "thread")
    stored = threads.get_storage(parts().database, found)
    return json_response(
        {
            "thread_id": found,
            "total_bytes": stored.checkpoint_bytes + stored.value_bytes + stored.write_bytes,
            "checkpoints": {"count": stored.checkpoint_count, "bytes": stored.checkpoint_bytes},
            "channel_values": {
                "count": stored.value_count,
                "bytes": stored.value_bytes,
                "by_channel": stored.by_channel,
            },
            "pending_writes": {"count": stored.write_count, "bytes": stored.write_bytes},
        }
    )


@blueprint.post("/threads/prune")
@blueprint.arguments(PruneThreads)
@blueprint.response(200, PrunedThreads)
@blueprint.alt_response(400, schema=Error, description="A latest state depends on its history")
@authorized("threads", "delete")
def prune_threads(body: dict[str, Any]) -> Response:
    """Delete threads, or everything but their latest states. Busy threads keep their history."""
    strategy = TtlStrategy(body["strategy"])
    return json_response(
        {"pruned_count": threads.prune_threads(parts(), body["thread_ids"], strategy)}
    )


def _filter(body: dict[str, Any]) -> ThreadFilter:
    return ThreadFilter(
        ids=body.get("ids"),
        metadata=body.get("metadata") or {},
        values=body.get("values"),
        status=body.get("status"),
    )


@blueprint.post("/threads/count")
@blueprint.arguments(CountThreads)
@blueprint.response(200, COUNT)
@authorized("threads", "search")
def count_threads(body: dict[str, Any]) -> Response:
    """Count the threads that match all given conditions."""
    return json_response(threads.count_threads(parts(), _filter(body)))


@blueprint.post("/threads/search")
@blueprint.arguments(SearchThreads)
@blueprint.response(200, FoundThread(many=True))
@authorized("threads", "search")
def search_threads(body: dict[str, Any]) -> Response:
    """Search threads. The total number of matches is in `x-pagination-total`."""
    page = threads.search_threads(
        parts(),
        _filter(body),
        sort_by=body["sort_by"] or "updated_at",
        sort_order=body["sort_order"] or "desc",
        limit=body["limit"],
        offset=body["offset"],
        with_values=_wants_values(body),
    )
    items = [_found(thread, body) for thread in page.items]
    return page_response(items, total=page.total, limit=body["limit"], offset=body["offset"])


def _wants_values(body: dict[str, Any]) -> bool:
    select, paths = body.get("select"), body.get("extract") or {}
    return (
        not select
        or "values" in select
        or any(path.startswith("values") for path in paths.values())
    )


def _found(thread: ThreadRow, body: dict[str, Any]) -> dict[str, Any]:
    document = _shown(thread, body.get("select"))
    if body.get("extract"):
        document["extracted"] = threads.extracts_of(parts(), thread, body["extract"])
    return document

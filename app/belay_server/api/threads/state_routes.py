"""The routes of threads' states: read the newest, one at a checkpoint or the history; update."""

from __future__ import annotations

from typing import Any

from flask import Response

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint, encoded_response, json_response
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid, query_flag
from belay_server.api.security.authorization import authorized
from belay_server.api.threads.schemas import (
    History,
    HistoryQuery,
    PatchState,
    StateAtCheckpoint,
    StateQuery,
    ThreadState,
    UpdatedState,
    UpdateState,
)
from belay_server.domain.errors import InvalidRequest
from belay_server.domain.ids import parse_uuid
from belay_server.services.threads import records as threads
from belay_server.states.jobs import HistoryPage

blueprint = Blueprint("thread states", __name__, description="States of threads")


@blueprint.get("/threads/<thread_id>/state")
@blueprint.arguments(StateQuery, location="query")
@blueprint.response(200, ThreadState)
@blueprint.alt_response(400, schema=Error, description="The graph rejects the request")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def get_state(query: dict[str, Any], thread_id: str) -> Response:
    """Get a thread's latest state; with `subgraphs`, also the states of its subgraphs."""
    return _state(thread_id, None, query.get("select"), subgraphs=query_flag("subgraphs"))


@blueprint.get("/threads/<thread_id>/state/<checkpoint_id>")
@blueprint.arguments(StateQuery, location="query")
@blueprint.response(200, ThreadState)
@blueprint.alt_response(400, schema=Error, description="The graph rejects the request")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def get_state_at_checkpoint_id(
    query: dict[str, Any], thread_id: str, checkpoint_id: str
) -> Response:
    """Get a thread's state at a checkpoint of the root graph, by the checkpoint's id."""
    checkpoint = {"checkpoint_id": str(path_uuid(checkpoint_id, "checkpoint"))}
    return _state(thread_id, checkpoint, query.get("select"), subgraphs=query_flag("subgraphs"))


@blueprint.post("/threads/<thread_id>/state/checkpoint")
@blueprint.arguments(StateAtCheckpoint)
@blueprint.response(200, ThreadState)
@blueprint.alt_response(400, schema=Error, description="The graph rejects the request")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def get_state_at_checkpoint(body: dict[str, Any], thread_id: str) -> Response:
    """Get a thread's state at a checkpoint of the root graph or of a subgraph."""
    subgraphs = bool(body.get("subgraphs"))
    return _state(thread_id, body["checkpoint"], body.get("select"), subgraphs=subgraphs)


def _state(
    thread_id: str,
    checkpoint: dict[str, Any] | None,
    fields: list[str] | None,
    *,
    subgraphs: bool,
) -> Response:
    uuid = path_uuid(thread_id, "thread")
    return encoded_response(
        threads.get_state(parts(), uuid, checkpoint, fields, subgraphs=subgraphs)
    )


@blueprint.post("/threads/<thread_id>/state")
@blueprint.arguments(UpdateState)
@blueprint.response(200, UpdatedState)
@blueprint.alt_response(400, schema=Error, description="The graph rejects the request")
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error, description="Runs are in flight")
@authorized("threads", "update")
def update_state(body: dict[str, Any], thread_id: str) -> Response:
    """Update a thread's state as if a node had written the values."""
    return json_response(threads.update_state(parts(), path_uuid(thread_id, "thread"), body))


@blueprint.patch("/threads/<thread_id>/state")
@blueprint.arguments(PatchState)
@blueprint.alt_response(204, description="The thread's metadata is merged")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "update")
def patch_state(body: dict[str, Any], thread_id: str) -> Response:
    """Merge metadata into the thread's, as the JavaScript SDK's `patchState` does."""
    threads.patch_thread(parts(), path_uuid(thread_id, "thread"), body.get("metadata") or {}, None)
    return Response(status=204)


@blueprint.get("/threads/<thread_id>/history")
@blueprint.arguments(HistoryQuery, location="query")
@blueprint.response(200, ThreadState(many=True))
@blueprint.alt_response(400, schema=Error, description="The graph rejects the request")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read", changes_body=False)
def get_history(query: dict[str, Any], thread_id: str) -> Response:
    """List a thread's states, newest first."""
    return _history(thread_id, query)


@blueprint.post("/threads/<thread_id>/history")
@blueprint.arguments(History)
@blueprint.response(200, ThreadState(many=True))
@blueprint.alt_response(400, schema=Error, description="The graph rejects the request")
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read", changes_body=False)
def search_history(body: dict[str, Any], thread_id: str) -> Response:
    """List a thread's states, newest first, filtered by metadata or namespace."""
    return _history(thread_id, body)


def _history(thread_id: str, asked: dict[str, Any]) -> Response:
    page = HistoryPage(
        limit=asked["limit"],
        before=_before(asked.get("before")),
        metadata=asked.get("metadata"),
        checkpoint_ns=(asked.get("checkpoint") or {}).get("checkpoint_ns"),
        fields=asked.get("select"),
    )
    return encoded_response(threads.get_history(parts(), path_uuid(thread_id, "thread"), page))


def _before(value: Any) -> str | None:
    """Return the checkpoint id in a Checkpoint, a config, or a string; None without one.

    Raises InvalidRequest.
    """
    if isinstance(value, dict):
        value = value.get("configurable", value)
        value = value.get("checkpoint_id") if isinstance(value, dict) else value
    if value is None:
        return None
    try:
        return str(parse_uuid(value))
    except ValueError:
        raise InvalidRequest("before: must be a checkpoint or a checkpoint id") from None

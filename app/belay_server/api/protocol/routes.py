"""The HTTP routes of version 2 of the streaming protocol (the SDK's `threads.stream`).

The response to a command that fails has status 200 and an error in its envelope, as on
LangGraph's server. Only an invalid command and the errors without a protocol code have another
status.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import marshmallow as ma
from flask import Response, request

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint, describe, json_response, read_json_of
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid
from belay_server.api.protocol.commands import NoCommand, answer_of, frame_of
from belay_server.api.protocol.schemas import CommandAnswer, CommandFrame, EventStream
from belay_server.api.runs.responses import EVENTS, STREAM_HEADERS, STREAM_TYPE, stream_client
from belay_server.api.security.authorization import authorized, authorizes_itself, is_confined
from belay_server.api.streaming.protocol import EventFilter, sse_frame, stream_protocol
from belay_server.domain.errors import BadRequest, InvalidRequest
from belay_server.services.threads.records import get_thread

blueprint = Blueprint("protocol", __name__, description="The streaming protocol, version 2")

_NO_COMMAND = {"anyOf": [CommandAnswer, Error]}


@blueprint.post("/threads/<thread_id>/commands")
@blueprint.response(200, CommandAnswer, description="The command's result or error")
@blueprint.alt_response(400, schema=_NO_COMMAND, description="Not a valid command, or invalid JSON")
@blueprint.doc(
    requestBody={
        "required": True,
        "content": {"application/json": {"schema": CommandFrame}},
    }
)
@authorizes_itself
def command(thread_id: str) -> Response:
    """Execute a command of the streaming protocol: run.start, input.respond or agent.getTree."""
    thread = path_uuid(thread_id, "thread")
    try:
        frame = frame_of(_json_of_request())
    except NoCommand as refused:
        return json_response(refused.answer, 400)
    return json_response(answer_of(thread, frame))


@blueprint.post("/threads/<thread_id>/stream/events")
@blueprint.response(
    200, EVENTS, description="The thread's events", content_type="text/event-stream"
)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error, description="The caller may not see the thread")
@blueprint.doc(
    requestBody={"required": True, "content": {"application/json": {"schema": EventStream}}}
)
@authorized("threads", "read")
def events(thread_id: str) -> Response:
    """Stream a thread with the streaming protocol: the past and future events of its runs. The
    thread need not exist yet."""
    thread = path_uuid(thread_id, "thread")
    wanted = event_filter(_json_of_request())
    refuse_inaccessible_thread(thread)
    body = stream_protocol(parts(), thread, wanted, sse_frame, stream_client())
    return Response(body, 200, STREAM_HEADERS, content_type=STREAM_TYPE)


def refuse_inaccessible_thread(thread_id: UUID) -> None:
    """Raise NotFound when the caller's access is restricted and the thread does not exist, or the
    caller may not see it. A thread that does not exist yet might become another caller's."""
    if is_confined():
        get_thread(parts(), thread_id)


def _json_of_request() -> Any:
    try:
        return read_json_of(request)
    except InvalidRequest as error:
        detail = error.detail.replace("Invalid JSON in request body", "Invalid JSON body")
        raise BadRequest(detail) from error


def event_filter(document: Any) -> EventFilter:
    """Return the filter of a subscription. Raises BadRequest."""
    if not isinstance(document, dict) or "channels" not in document:
        raise BadRequest("channels is required and must be a non-empty array")
    try:
        loaded = EventStream().load(document)
    except ma.ValidationError as error:
        raise BadRequest(describe(error).replace(": ", " ", 1)) from error
    since = loaded.get("since")
    return EventFilter(
        channels=loaded["channels"],
        namespaces=loaded.get("namespaces"),
        depth=loaded.get("depth"),
        since=-1 if since is None else since,
    )

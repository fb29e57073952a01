"""Version 2 of the streaming protocol (the SDK's `threads.stream`): commands, and their events.

A command that cannot be done is answered with status 200 and an error in its envelope, as the
reference does; only what is no command at all, and a server that is not well, have another status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import marshmallow as ma
from flask import Response, request

from app.api.authorization import authorize, authorized, authorizes_itself, is_confined
from app.api.error_schemas import Error
from app.api.fields import path_uuid
from app.api.json_body import Blueprint, describe, json_response, read_json
from app.api.parts import parts
from app.api.protocol_schemas import (
    CommandAnswer,
    CommandFrame,
    EventStream,
    InputRespond,
    RunStart,
)
from app.api.run_requests import run_request
from app.api.run_responses import EVENTS, STREAM_HEADERS, STREAM_TYPE, watch_client
from app.api.run_schemas import CreateThreadRun
from app.domain.errors import BadRequest, Conflict, InvalidRequest, NotFound
from app.graphs.protocol_events import STREAM_MODES
from app.services.protocol_commands import (
    NoSuchInterrupt,
    NoSuchRun,
    body_of_answers,
    body_of_start,
    tree_of,
)
from app.services.protocol_stream import EventFilter, sse_frame, stream_protocol
from app.services.runs import create_run
from app.services.threads import get_thread

blueprint = Blueprint("protocol", __name__, description="The streaming protocol, version 2")

Answer = dict[str, Any]
#: What a command fails with: the protocol's code for it, and what its message begins with.
_CODES: Mapping[type[Exception], tuple[str, str]] = {
    InvalidRequest: ("invalid_argument", ""),
    BadRequest: ("invalid_argument", ""),
    NoSuchInterrupt: ("no_such_interrupt", ""),
    NoSuchRun: ("no_such_run", ""),
    NotFound: ("unknown_error", "404: "),
    Conflict: ("unknown_error", "409: "),
}
_FAILURES = tuple(_CODES)
NO_COMMAND = {"anyOf": [CommandAnswer, Error]}
_ON_A_SOCKET = ("subscription.subscribe", "subscription.unsubscribe", "subscription.reconnect")


@blueprint.post("/threads/<thread_id>/commands")
@blueprint.response(200, CommandAnswer, description="What became of it, `error`s too")
@blueprint.alt_response(400, schema=NO_COMMAND, description="It is no command, or no JSON")
@blueprint.doc(
    requestBody={
        "required": True,
        "content": {"application/json": {"schema": CommandFrame}},
    }
)
@authorizes_itself
def command(thread_id: str) -> Response:
    """Do a command of the streaming protocol: run.start, input.respond, agent.getTree."""
    thread = path_uuid(thread_id, "thread")
    frame = _json_of_request()
    answer = answer_of(thread, frame)
    refused = answer["type"] == "error" and not is_frame(frame)
    return json_response(answer, 400 if refused else 200)


@blueprint.post("/threads/<thread_id>/stream/events")
@blueprint.response(
    200, EVENTS, description="The thread's events", content_type="text/event-stream"
)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error, description="It is not this caller's")
@blueprint.doc(
    requestBody={"required": True, "content": {"application/json": {"schema": EventStream}}}
)
@authorized("threads", "read")
def events(thread_id: str) -> Response:
    """Follow a thread by the streaming protocol: all that its runs have streamed, and what they
    will. The thread may be one that is yet to be created."""
    thread = path_uuid(thread_id, "thread")
    wanted = event_filter(_json_of_request())
    refuse_strange_thread(thread)
    body = stream_protocol(parts(), thread, wanted, sse_frame, watch_client())
    return Response(body, 200, STREAM_HEADERS, content_type=STREAM_TYPE)


def refuse_strange_thread(thread_id: UUID) -> None:
    """A thread that is yet to be created may be anybody's: who may not see everything is told that
    it is not there. Raises NotFound."""
    if is_confined():
        get_thread(parts(), thread_id)


def _json_of_request() -> Any:
    try:
        return read_json(request, parts().settings.body_seconds)
    except InvalidRequest as error:
        detail = error.detail.replace("Invalid JSON in request body", "Invalid JSON body")
        raise BadRequest(detail) from error


def event_filter(asked: Any) -> EventFilter:
    """Raises BadRequest."""
    if not isinstance(asked, dict) or "channels" not in asked:
        raise BadRequest("channels is required and must be a non-empty array")
    try:
        loaded = EventStream().load(asked)
    except ma.ValidationError as error:
        raise BadRequest(describe(error).replace(": ", " ", 1)) from error
    namespaces = loaded.get("namespaces")
    since = loaded.get("since")
    return EventFilter(
        channels=tuple(loaded["channels"]),
        namespaces=None if namespaces is None else tuple(map(tuple, namespaces)),
        depth=loaded.get("depth"),
        since=-1 if since is None else since,
    )


def is_frame(frame: Any) -> bool:
    return not CommandFrame().validate(frame) if isinstance(frame, dict) else False


def answer_of(thread_id: UUID, frame: Any) -> Answer:
    """Do what a command says. Raises Unavailable; every other failure is in the answer."""
    command_id = frame.get("id") if isinstance(frame, dict) else None
    if not isinstance(command_id, int) or isinstance(command_id, bool):
        command_id = None
    try:
        known = CommandFrame().load(frame) if isinstance(frame, dict) else None
    except ma.ValidationError as error:
        return failure(command_id, "invalid_argument", describe(error))
    if known is None:
        return failure(None, "invalid_argument", "A command is an object with id and method.")
    method = known["method"]
    if method in _ON_A_SOCKET:
        return failure(
            command_id,
            "not_supported",
            f"{method} is for a WebSocket: POST /threads/{{thread_id}}/stream/events streams.",
        )
    if method not in _METHODS:
        return failure(command_id, "unknown_command", f"Unknown protocol command: {method}")
    return _done(command_id, _METHODS[method], thread_id, known["params"])


def _done(
    command_id: int | None,
    method: Callable[[UUID, Mapping[str, Any]], Answer],
    thread_id: UUID,
    params: Mapping[str, Any],
) -> Answer:
    try:
        return success(command_id, method(thread_id, params))
    except ma.ValidationError as error:
        return failure(command_id, "invalid_argument", describe(error))
    except _FAILURES as error:
        code, prefix = next(named for kind, named in _CODES.items() if isinstance(error, kind))
        return failure(command_id, code, f"{prefix}{error}")


def success(command_id: int | None, result: Mapping[str, Any]) -> Answer:
    meta = {"applied_through_seq": 0}
    return {"type": "success", "id": command_id, "result": dict(result), "meta": meta}


def failure(command_id: int | None, code: str, message: str) -> Answer:
    return {"type": "error", "id": command_id, "error": code, "message": message}


def _start(thread_id: UUID, params: Mapping[str, Any]) -> Answer:
    if not params.get("assistant_id"):
        raise InvalidRequest("run.start requires an assistant_id.")
    authorize("threads", "read", {"thread_id": thread_id})
    return _run(thread_id, body_of_start(parts(), thread_id, _loaded(RunStart(), params)))


def _respond(thread_id: UUID, params: Mapping[str, Any]) -> Answer:
    authorize("threads", "read", {"thread_id": thread_id})
    return _run(thread_id, body_of_answers(parts(), thread_id, _loaded(InputRespond(), params)))


def _run(thread_id: UUID, body: Mapping[str, Any]) -> Answer:
    """The same checks as of any create; it streams what a client of the REST API cannot ask for."""
    open_to_clients = {key: value for key, value in body.items() if key != "stream_mode"}
    checked = CreateThreadRun().load(open_to_clients)
    checked["stream_mode"] = list(STREAM_MODES)
    run = create_run(parts(), run_request(checked, thread_id))
    return {"run_id": str(run.run_id)}


def _tree(thread_id: UUID, _params: Mapping[str, Any]) -> Answer:
    authorize("threads", "read", {"thread_id": thread_id})
    return {"tree": tree_of(parts(), thread_id).as_json()}


def _loaded(schema: ma.Schema, params: Mapping[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = schema.load(params)
    return loaded


_METHODS: Mapping[str, Callable[[UUID, Mapping[str, Any]], Answer]] = {
    "run.start": _start,
    "input.respond": _respond,
    "agent.getTree": _tree,
}

"""Execute the commands of version 2 of the streaming protocol, and build their responses.

The response to a command that fails is the protocol's envelope with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import marshmallow as ma
from flask import current_app, request

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import describe
from belay_server.api.http.bodies.large_answers import large_answers
from belay_server.api.protocol.schemas import CommandFrame, InputRespond, RunStart
from belay_server.api.runs.requests import run_request
from belay_server.api.security.authorization import authorize
from belay_server.domain.errors import BadRequest, Conflict, InvalidRequest, NotFound
from belay_server.domain.run_options import RunOptions
from belay_server.runtime.turns import Turns
from belay_server.services.protocol.commands import (
    NoSuchInterrupt,
    NoSuchRun,
    options_of_answers,
    options_of_start,
    tree_of,
)
from belay_server.services.runs.creation import create_run

#: The key of the extension that lets one tree be built at a time: each reads a long event log.
TREE_TURNS = "belay.tree_turns"
Answer = dict[str, Any]
SUBSCRIBE, UNSUBSCRIBE = "subscription.subscribe", "subscription.unsubscribe"
_ON_A_SOCKET = (SUBSCRIBE, UNSUBSCRIBE, "subscription.reconnect")
#: The protocol's error code for each exception, and the prefix of the message.
_CODES: Mapping[type[Exception], tuple[str, str]] = {
    InvalidRequest: ("invalid_argument", ""),
    BadRequest: ("invalid_argument", ""),
    NoSuchInterrupt: ("no_such_interrupt", ""),
    NoSuchRun: ("no_such_run", ""),
    NotFound: ("unknown_error", "404: "),
    Conflict: ("unknown_error", "409: "),
}
_FAILURES = tuple(_CODES)


@dataclass(frozen=True, slots=True)
class Frame:
    """A received command whose parameters are not validated yet."""

    id: int
    method: str
    params: dict[str, Any]


class NoCommand(Exception):
    """A received message is not a valid command. `answer` is the error response."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer["message"])
        self.answer = answer


def frame_of(document: Any) -> Frame:
    """Return the command in a JSON document. Raises NoCommand."""
    if not isinstance(document, dict):
        message = "A command is an object with id and method."
        raise NoCommand(failure(None, "invalid_argument", message))
    try:
        return Frame(**CommandFrame().load(document))
    except ma.ValidationError as error:
        given = document.get("id")
        known_id = given if type(given) is int else None
        raise NoCommand(failure(known_id, "invalid_argument", describe(error))) from error


def answer_of(thread_id: UUID, frame: Frame) -> Answer:
    """Execute a command and return its response, which also reports failures.

    Raises the errors that have no protocol code, such as Unavailable, Forbidden and TooMany.
    """
    if frame.method in _ON_A_SOCKET:
        where = "use POST /threads/{thread_id}/stream/events to stream."
        message = f"{frame.method} is only available on a WebSocket: {where}"
        return failure(frame.id, "not_supported", message)
    method = _METHODS.get(frame.method)
    if method is None:
        message = f"Unknown protocol command: {frame.method}"
        return failure(frame.id, "unknown_command", message)
    try:
        return success(frame.id, method(thread_id, frame.params))
    except ma.ValidationError as error:
        return failure(frame.id, "invalid_argument", describe(error))
    except _FAILURES as error:
        code, prefix = next(named for kind, named in _CODES.items() if isinstance(error, kind))
        return failure(frame.id, code, f"{prefix}{error}")


def success(command_id: int | None, result: Mapping[str, Any]) -> Answer:
    """Return the response to a command that succeeded."""
    meta = {"applied_through_seq": 0}
    return {"type": "success", "id": command_id, "result": dict(result), "meta": meta}


def failure(command_id: int | None, code: str, message: str) -> Answer:
    """Return an error response to a command; `command_id` is None if it has no valid id."""
    return {"type": "error", "id": command_id, "error": code, "message": message}


def _start(thread_id: UUID, params: Mapping[str, Any]) -> Answer:
    if not params.get("assistant_id"):
        raise InvalidRequest("run.start requires an assistant_id.")
    authorize("threads", "read", {"thread_id": thread_id})
    return _run(thread_id, options_of_start(parts(), thread_id, _loaded(RunStart(), params)))


def _respond(thread_id: UUID, params: Mapping[str, Any]) -> Answer:
    authorize("threads", "read", {"thread_id": thread_id})
    return _run(thread_id, options_of_answers(parts(), thread_id, _loaded(InputRespond(), params)))


def _run(thread_id: UUID, options: RunOptions) -> Answer:
    run = create_run(parts(), run_request(options, thread_id))
    return {"run_id": str(run.run_id)}


def _tree(thread_id: UUID, _params: Mapping[str, Any]) -> Answer:
    authorize("threads", "read", {"thread_id": thread_id})
    turns: Turns = current_app.extensions[TREE_TURNS]
    with turns.turn(large_answers().share_of(request).caller):
        return {"tree": tree_of(parts(), thread_id).as_json()}


def _loaded(schema: ma.Schema, params: Mapping[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = schema.load(params)
    return loaded


_METHODS: Mapping[str, Callable[[UUID, Mapping[str, Any]], Answer]] = {
    "run.start": _start,
    "input.respond": _respond,
    "agent.getTree": _tree,
}

"""Return every error of the agent runs API as `{"error": {"type", "code", "message"}}`.

The statuses are those of Exa's documentation: 400, 401, 404, 429 and 500. So other client errors,
such as 405, 413 or 422, have status 400, and an unavailable database has 500 with a Retry-After.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from flask import Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import NotFound as NoRoute

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import json_response
from belay_server.domain.agent_runs import errors as agent_errors
from belay_server.domain.agent_runs.errors import AgentError
from belay_server.domain.errors import (
    BelayError,
    Forbidden,
    NotFound,
    Refused,
    TooMany,
    Unauthorized,
    Unavailable,
)

log = logging.getLogger(__name__)

_ROOT = "/agent"
_RETRY_AFTER_SECONDS = "2"
#: Status and type of errors. All other errors are invalid requests.
_KINDS: dict[type[AgentError], tuple[int, str]] = {
    agent_errors.TeamNotFound: (401, "AUTHENTICATION_ERROR"),
    agent_errors.RunNotFound: (404, "NOT_FOUND"),
    agent_errors.TooManyRuns: (429, "RATE_LIMIT_ERROR"),
}
_INVALID = (400, "INVALID_REQUEST")


def is_agent_request() -> bool:
    """Return whether the current request's path belongs to the agent runs API, with a route or
    not."""
    return request.path == _ROOT or request.path.startswith(f"{_ROOT}/")


def agent_error(error: Exception) -> Response:
    """Return the response for an error."""
    for kinds, answer in _ANSWERS:
        if isinstance(error, kinds):
            return answer(error)
    log.error("unexpected error", exc_info=error)
    return _server_error("Internal Server Error")


def _agent_error(error: AgentError) -> Response:
    status, kind = _KINDS.get(type(error), _INVALID)
    response = _envelope(status, kind, error.code, error.detail, error.about)
    if status == 429:
        response.headers["Retry-After"] = _RETRY_AFTER_SECONDS
    return response


def _unavailable(error: Unavailable) -> Response:
    response = _server_error(error.detail)
    response.headers["Retry-After"] = _RETRY_AFTER_SECONDS
    return response


def _not_found(error: NotFound) -> Response:
    return _envelope(404, "NOT_FOUND", "RUN_NOT_FOUND", error.detail)


def _invalid(error: BelayError) -> Response:
    return _envelope(*_INVALID, "INVALID_REQUEST", error.detail)


def _no_team(error: BelayError) -> Response:
    """Return the response for every failed authentication and authorization: Exa's documentation
    has one status and one code for them."""
    response = _envelope(401, "AUTHENTICATION_ERROR", "TEAM_NOT_FOUND", error.detail)
    if isinstance(error, Refused):
        response.headers.extend(dict(error.headers))
    return response


def _too_many(error: TooMany) -> Response:
    response = _envelope(429, "RATE_LIMIT_ERROR", "CONCURRENCY_LIMIT_REACHED", error.detail)
    response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return response


def _http_error(error: HTTPException) -> Response:
    """Return the response for an error of Flask's. RUN_NOT_FOUND is not used for unknown routes: a
    server without agent runs must not report that a run does not exist."""
    if isinstance(error, NoRoute):
        return _envelope(404, "NOT_FOUND", "INVALID_REQUEST", _no_route())
    message = error.description or error.name
    if error.code is not None and error.code < 500:
        return _envelope(*_INVALID, "INVALID_REQUEST", message)
    return _server_error(message)


def _no_route() -> str:
    if parts().graphs.project.agent_runs_graph is None:
        return "This server has no agent runs: set agent_runs in langgraph.json to a graph."
    return f"There is no route {request.method} {request.path}."


def _server_error(message: str) -> Response:
    return _envelope(500, "SERVER_ERROR", "SERVER_ERROR", message)


def _envelope(
    status: int, kind: str, code: str, message: str, about: dict[str, str] | None = None
) -> Response:
    error = {"type": kind, "code": code, "message": message, **(about or {})}
    return json_response({"error": error}, status)


#: The first matching entry is used.
_ANSWERS: tuple[
    tuple[type[Exception] | tuple[type[Exception], ...], Callable[[Any], Response]], ...
]
_ANSWERS = (
    (AgentError, _agent_error),
    ((Unauthorized, Forbidden, Refused), _no_team),
    (TooMany, _too_many),
    (NotFound, _not_found),
    (Unavailable, _unavailable),
    (BelayError, _invalid),
    (HTTPException, _http_error),
)

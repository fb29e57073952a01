"""Return every error as `{"detail": "..."}`, with the status of its class. The agent runs API
returns its errors in another form."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeVar

from flask import Flask, Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from belay_server.api.agent_runs.errors import agent_error, is_agent_request
from belay_server.api.http.bodies.json_body import json_response
from belay_server.domain.errors import (
    BadRequest,
    BelayError,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    Refused,
    TooLarge,
    TooMany,
    TooSlow,
    Unauthorized,
    Unavailable,
)

log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[BelayError], int], ...] = (
    (BadRequest, 400),
    (InvalidRequest, 422),
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (TooSlow, 408),
    (TooLarge, 413),
    (TooMany, 429),
    (Unavailable, 503),
)
_RETRY_AFTER_SECONDS = "2"
_Error = TypeVar("_Error", bound=Exception)


def register_error_handlers(app: Flask) -> None:
    """Register the handlers of Belay's errors, of HTTP errors, and of all others (logged, 500)."""
    app.register_error_handler(BelayError, _in_the_form_of_the_api(_belay_error))
    app.register_error_handler(HTTPException, _in_the_form_of_the_api(_http_error))
    app.register_error_handler(Exception, _in_the_form_of_the_api(_unexpected))


def _in_the_form_of_the_api(answer: Callable[[_Error], Response]) -> Callable[[_Error], Response]:
    return lambda error: agent_error(error) if is_agent_request() else answer(error)


def _belay_error(error: BelayError) -> Response:
    if isinstance(error, Refused):
        return json_response({"detail": error.detail}, error.status, dict(error.headers))
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    response = json_response({"detail": error.detail}, status)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooMany):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if status == 503:
        response.headers["Retry-After"] = _RETRY_AFTER_SECONDS
    return response


def _http_error(error: HTTPException) -> Response:
    """Return the response for an error of Flask's."""
    if error.code == 404:
        return json_response({"detail": "Not Found"}, 404)
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(error.valid_methods or ()))
        return json_response({"detail": "Method Not Allowed"}, 405, {"Allow": allowed})
    if error.code is not None and 300 <= error.code < 400:
        response = error.get_response()
        return Response(response.get_data(), error.code, dict(response.headers))
    detail = error.description or error.name
    return json_response({"detail": detail}, error.code or 500)


def _unexpected(error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    return json_response({"detail": "Internal Server Error"}, 500)

"""The state of a request: its id, the fields of its log records, and what ends with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flask import request

from belay_server.api.http.bodies.unread_bodies import CountedBody

_CONTEXT = "belay.context"
#: The key in a request's environment of the credential of the run whose code sends it.
RUN_CREDENTIAL = "belay.run_credential"


@dataclass(slots=True)
class RequestContext:
    """The state of a request. `about` has the fields of its log records."""

    request_id: str
    about: dict[str, Any]
    began: float
    route: str | None = None
    #: The request's body, if it is large.
    body: CountedBody | None = None
    #: Called when the request has ended; None when open requests are not counted.
    leave: Callable[[], None] | None = None


def begin_request_context(context: RequestContext) -> RequestContext:
    """Set the state of the current request, and return it."""
    request.environ[_CONTEXT] = context
    return context


def request_context() -> RequestContext:
    """Return the state of the current request. Raises KeyError before `begin_request_context`."""
    found: RequestContext = request.environ[_CONTEXT]
    return found


def request_id() -> str:
    """Return the id of the current request."""
    return request_context().request_id

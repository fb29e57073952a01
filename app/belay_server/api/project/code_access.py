"""Give the project's code in a web process access to the server.

`langgraph_sdk` clients without a URL use it.

Code that handles an authenticated request of a project's route may do what the request's caller
may. All other code of the project (routes without authentication, its lifespan, its background
tasks) may do everything, as in LangGraph's server: it is the operator's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar

from werkzeug.datastructures import Headers

from belay_server.graphs.project.loopback import SERVER_HEADER
from belay_server.settings import SERVER_TOKEN

_OF_CALLER: ContextVar[Mapping[str, str] | None] = ContextVar("belay_code_access", default=None)
#: Headers that are about the request itself, not about who sends it.
_OF_THE_REQUEST = frozenset(
    {
        "connection",
        "expect",
        "forwarded",
        "host",
        "idempotency-key",
        "last-event-id",
        "origin",
        "range",
        "referer",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    }
)
_PREFIXES = ("accept", "content-", "if-", "sec-", "x-forwarded-", "x-request-id")


def act_as_caller(headers: Headers) -> None:
    """Let the code that handles this request send the headers that authenticate its caller."""
    named = {name.lower(): value for name, value in headers.items()}
    _OF_CALLER.set(
        {
            name: value
            for name, value in named.items()
            if name not in _OF_THE_REQUEST and not name.startswith(_PREFIXES)
        }
    )


def act_as_server() -> None:
    """Let the code that handles this request do everything."""
    _OF_CALLER.set(None)


def access_headers() -> Mapping[str, str]:
    """Return the headers that authenticate the code that is running."""
    of_caller = _OF_CALLER.get()
    if of_caller is not None:
        return of_caller
    return {SERVER_HEADER: os.environ.get(SERVER_TOKEN, "")}

"""Give the project's code in a web process access to the server.

`langgraph_sdk` clients without a URL use it.

Code that handles an authenticated request may do what the request's caller may: a route of the
project, and a graph's own code that reads or updates a state. Routes without authentication,
middleware, and the lifespan with the tasks that it starts may do everything, as in LangGraph's
server: they are the operator's own. Which it is, is known by the context (`contextvars`), which
tasks and `asyncio.to_thread` inherit. A thread that was started otherwise has no access.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from werkzeug.datastructures import Headers

from belay_server.configuration.settings import SERVER_TOKEN
from belay_server.graphs.project.loopback import SERVER_HEADER

#: The headers that authenticate the code of the current context. Code of which nothing is known,
#: such as a thread that a route has started, has none.
_OF_CODE: ContextVar[Callable[[], Mapping[str, str]]] = ContextVar(
    "belay_code_access", default=dict
)
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


def act_as_caller(headers: Headers, credential: Mapping[str, str]) -> None:
    """Let the code that handles this request send the headers that authenticate its caller.
    `credential` is that of the run whose code has sent the request, if one has."""

    def of_caller() -> Mapping[str, str]:
        named = {name.lower(): value for name, value in headers.items()}
        selected = {
            name: value
            for name, value in named.items()
            if name not in _OF_THE_REQUEST and not name.startswith(_PREFIXES)
        }
        return {**selected, **credential}

    _OF_CODE.set(of_caller)


def act_as_server() -> None:
    """Give code in the current context the server's full access."""
    _OF_CODE.set(lambda: {SERVER_HEADER: os.environ.get(SERVER_TOKEN, "")})


def act_unauthenticated() -> None:
    """Let the code of this context send no headers that authenticate it."""
    _OF_CODE.set(dict)


def access_headers() -> Mapping[str, str]:
    """Return the headers that authenticate the code that is running."""
    return _OF_CODE.get()()

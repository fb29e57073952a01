"""Authenticate callers by an API key or the project's own `auth`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flask import request

from belay_server.api.context import ApiContext, Authentication
from belay_server.api.project.auth import ProjectAuth
from belay_server.db.connection import Database
from belay_server.domain.access import Caller
from belay_server.domain.errors import Forbidden, Refused, TooMany, Unauthorized
from belay_server.graphs.project.langgraph_json import Project
from belay_server.services.api_keys import ApiKeys
from belay_server.settings import Settings

_View = TypeVar("_View", bound=Callable[..., object])
#: The key of the authenticated caller in a request's environment.
CALLER = "belay.caller"
#: The prefix of the names of callers with API keys.
_KEY = "key:"
#: The prefix of the paths that a key of the scope `agent_runs` may use.
AGENT_RUNS = "/agent/"


def authentication_of(
    settings: Settings, project: Project, database: Database
) -> Authentication | None:
    """Return how requests are authenticated. None: they are not, and everything is permitted.

    Raises ProjectError.
    """
    if project.auth is not None:
        return ProjectAuth.load(project)
    return KeyAuthentication(ApiKeys(database)) if settings.auth == "keys" else None


class KeyAuthentication:
    """Authenticates requests by an API key, in `x-api-key` or `Authorization: Bearer`."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def caller(self) -> Caller:
        """Return the caller. Raises Unauthorized, Forbidden, Unavailable."""
        key = key_of_request()
        if not key:
            raise Unauthorized("An API key is required: x-api-key, or Authorization: Bearer")
        caller = self._keys.caller_of(key)
        if caller is None:
            raise Unauthorized("This API key is unknown, revoked or expired")
        if not caller.everything and not request.path.startswith(AGENT_RUNS):
            raise Forbidden("This API key is for Agent runs only")
        return caller


def key_of_request() -> str:
    """Return the API key in the request's headers; "" without one. `x-api-key` has precedence."""
    if key := request.headers.get("x-api-key", "").strip():
        return key
    scheme, _, key = request.headers.get("Authorization", "").strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def identify(found: ApiContext) -> Caller | None:
    """Return the caller that the request's headers authenticate; None without authentication.

    Raises Unauthorized, Forbidden, Refused; TooMany for an address that has failed too often.
    """
    if found.authentication is None:
        return None
    try:
        return found.authentication.caller()
    except (Unauthorized, Refused) as error:
        address = request.remote_addr or ""
        is_failure = isinstance(error, Unauthorized) or error.status == 401
        if is_failure and found.failed_logins is not None:
            wait = found.failed_logins.seconds_to_wait(address)
            if wait:
                detail = "Too many failed authentications from this address; try again later"
                raise TooMany(detail, retry_after=wait) from error
        raise


def watch_key(
    found: ApiContext, who: Caller | None, close: Callable[[], None]
) -> Callable[[], None]:
    """Call `close` when the caller's API key is revoked or expires. Return a function that ends the
    watch."""
    if found.open_keys is None or who is None or not who.name.startswith(_KEY):
        return lambda: None
    return found.open_keys.watch(who.name.removeprefix(_KEY), close)


def caller() -> Caller | None:
    """Return the authenticated caller of the request; None without authentication."""
    found: Caller | None = request.environ.get(CALLER)
    return found


def public(view: _View) -> _View:
    """Mark a view as public: it needs no authentication."""
    view.is_public = True  # type: ignore[attr-defined]
    return view

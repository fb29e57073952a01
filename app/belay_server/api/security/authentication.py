"""Authenticate callers by an API key or the project's own `auth`."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from flask import request

from belay_server.api.context import ApiContext, Authentication
from belay_server.api.http.request_context import RUN_CREDENTIAL
from belay_server.api.project.auth import ProjectAuth
from belay_server.api.project.exchange import ADDED_TO_SCOPE
from belay_server.configuration.settings import SERVER_TOKEN, Settings
from belay_server.db import runs as run_rows
from belay_server.db.postgres.pool import Database
from belay_server.domain.access import Caller, hash_of
from belay_server.domain.errors import Forbidden, Refused, TooMany, Unauthorized
from belay_server.domain.ids import parse_uuid
from belay_server.graphs.project.langgraph_json import Project
from belay_server.graphs.project.loopback import RUN_HEADER, SERVER_HEADER
from belay_server.graphs.project.user import ProjectUser
from belay_server.graphs.serde import to_plain
from belay_server.services.api_keys import ApiKeys

_View = TypeVar("_View", bound=Callable[..., object])
#: The key of the run whose code sends the request, in the request's environment.
_PARENT_RUN = "belay.parent_run"
_SERVER_CREDENTIAL = "belay.server_credential"
_NO_SUCH_RUN = f"{RUN_HEADER}: there is no running run with this token"
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
        refuse_out_of_scope(caller)
        return caller

    def accepts(self, who: Caller) -> bool:
        return self._keys.is_good(who.name.removeprefix(_KEY))


def key_of_request() -> str:
    """Return the API key in the request's headers; "" without one. `x-api-key` has precedence."""
    if key := request.headers.get("x-api-key", "").strip():
        return key
    scheme, _, key = request.headers.get("Authorization", "").strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def identify(found: ApiContext) -> Caller | None:
    """Return the caller that the request's headers authenticate; None without authentication, and
    for the project's own code in this server.

    Raises Unauthorized, Forbidden, Refused; TooMany for an address that has failed too often.
    """
    of_run = request.environ.get(RUN_CREDENTIAL)
    if found.authentication is None and of_run is None:
        return None
    try:
        if of_run is not None:
            return _creator_of_run(found, of_run)
        if _is_this_server(request.environ.get(_SERVER_CREDENTIAL)):
            return None
        assert found.authentication is not None
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


def _creator_of_run(found: ApiContext, credential: str) -> Caller | None:
    """Return the caller who created the run whose code sends the request. None without
    authentication. Raises Unauthorized, Forbidden."""
    named, _, token = credential.partition(".")
    try:
        run_id = parse_uuid(named)
    except ValueError:
        raise Unauthorized(_NO_SUCH_RUN) from None
    with found.parts.database.connection() as conn:
        run = run_rows.creator_of_run(conn, run_id, hash_of(token))
    if run is None:
        raise Unauthorized(_NO_SUCH_RUN)
    request.environ[_PARENT_RUN] = run_id
    if found.authentication is None:
        return None
    if run.creator is None:
        raise Unauthorized("The run was created without authentication; its code has no access")
    who = Caller.of_creator(run.creator, run.auth_user)
    if not found.authentication.accepts(who):
        raise Unauthorized(
            "The API key that created the run is revoked or expired; the run's code has no access"
        )
    refuse_out_of_scope(who)
    return who


def user_of_middleware(environ: Mapping[str, Any]) -> Caller | None:
    """Return the user whom the project's middleware has set in `scope["user"]`, as Starlette's
    AuthenticationMiddleware does; None without one, and for one who is not authenticated."""
    added = environ.get(ADDED_TO_SCOPE) or {}
    user, auth = added.get("user"), added.get("auth")
    if user is None or not getattr(user, "is_authenticated", False):
        return None
    try:
        name = str(user.identity)
    except NotImplementedError:  # by Starlette's SimpleUser
        name = str(user.display_name)
    fields = {
        **(to_plain(dict(user)) if isinstance(user, Mapping) else {}),
        "identity": name,
        "display_name": str(user.display_name),
        "permissions": [str(scope) for scope in getattr(auth, "scopes", ())],
    }
    return Caller(f"user:{name}", name, user=dict(ProjectUser(fields)))


@dataclass(frozen=True, slots=True)
class _Permissions:
    """`scope["auth"]`, as Starlette's AuthCredentials."""

    scopes: list[str]


def show_caller(environ: MutableMapping[str, Any], who: Caller) -> None:
    """Set the caller of a route of the project's app: `scope["user"]` and `scope["auth"]`, in WSGI
    REMOTE_USER. A user whom the app's middleware has set stays only if that user is the caller."""
    user = ProjectUser(who.user or {"identity": who.name})
    environ["REMOTE_USER"] = user.identity
    if user_of_middleware(environ) != who:
        added = {"user": user, "auth": _Permissions(list(user.permissions))}
        environ[ADDED_TO_SCOPE] = {**(environ.get(ADDED_TO_SCOPE) or {}), **added}


def parent_run() -> UUID | None:
    """Return the run whose code sends the request; None for other clients."""
    found: UUID | None = request.environ.get(_PARENT_RUN)
    return found


def take_credentials(environ: MutableMapping[str, Any]) -> None:
    """Take the credentials of the server's own code out of a request's headers, so that nothing
    copies or shows them: graphs and routes of the project get headers, too."""
    for header, key in ((RUN_HEADER, RUN_CREDENTIAL), (SERVER_HEADER, _SERVER_CREDENTIAL)):
        given = environ.pop(f"HTTP_{header.upper().replace('-', '_')}", None)
        if given is not None:
            environ[key] = given


def credential_of_run() -> dict[str, str]:
    """Return the header with which the code of a run has sent the request; {} for other clients."""
    given = request.environ.get(RUN_CREDENTIAL)
    return {} if given is None else {RUN_HEADER: given}


def _is_this_server(token: str | None) -> bool:
    """Return whether the request is sent by the project's code in a process of this server."""
    own = os.environ.get(SERVER_TOKEN)
    if not own or token is None:
        return False
    return hmac.compare_digest(token.encode(), own.encode())


def refuse_out_of_scope(who: Caller) -> None:
    """Raise Forbidden for a caller that may not use the requested path."""
    if not who.everything and not request.path.startswith(AGENT_RUNS):
        raise Forbidden("This API key is for Agent runs only")


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

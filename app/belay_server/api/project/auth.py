"""Run the project's own authentication and authorization handlers, its `langgraph_sdk.Auth`.

The handlers are coroutines and run in an event loop in a separate thread. Their parameters, their
return values and the choice of the handler follow the documentation of `langgraph_sdk.Auth`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from a2wsgi.asgi import build_scope
from flask import request
from langgraph_sdk import Auth

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import read_body_of
from belay_server.api.http.bodies.json_documents import parse_document
from belay_server.api.project.auth_cache import AuthCache
from belay_server.domain.access import Caller, Filter
from belay_server.domain.errors import Forbidden, InvalidRequest, Refused, Unavailable
from belay_server.graphs.project.langgraph_json import Project
from belay_server.graphs.project.loading import ProjectError, load_object
from belay_server.graphs.project.user import ProjectUser
from belay_server.graphs.serde import to_plain
from belay_server.runtime.event_loop import loop_in_a_real_thread

log = logging.getLogger(__name__)

_HANDLER_SECONDS = 30.0


class ProjectAuth:
    """Calls the project's handlers."""

    def __init__(self, auth: Auth, wants: Sequence[str], cache: AuthCache | None = None) -> None:
        self._auth = auth
        self._cache = cache
        #: The names of the parameters of `authenticate`.
        self._wants = wants
        self._loop = loop_in_a_real_thread()

    @classmethod
    def load(cls, project: Project) -> ProjectAuth:
        """Load the project's Auth object. Raises ProjectError."""
        assert project.auth is not None
        auth = load_object(project.root, project.dependencies, project.auth, "auth.path")
        if not isinstance(auth, Auth) or auth._authenticate_handler is None:
            raise ProjectError(
                f"auth.path ({project.auth}): must be a langgraph_sdk.Auth with an @authenticate"
            )
        wants = _wanted(auth._authenticate_handler, project.auth)
        if not auth._handlers and not auth._global_handlers:
            log.warning(
                "%s has no @auth.on handler: every authenticated user is permitted everything",
                project.auth,
            )
        cache = None if project.auth_cache is None else AuthCache(project.auth_cache)
        return cls(auth, wants, cache)

    def caller(self) -> Caller:
        """Return the authenticated caller. Raises Refused with the project's status and message,
        Unavailable."""
        if self._cache is None:
            return self._authenticate()
        return self._cache.caller(request.headers, self._authenticate)

    def _authenticate(self) -> Caller:
        handler = self._auth._authenticate_handler
        assert handler is not None
        wanted = {name: _INJECTED[name]() for name in self._wants}
        found = self._call(partial(handler, **wanted))
        user = _user_of(found)
        fields = to_plain(dict(user))
        return Caller(f"user:{user.identity}", user.identity, user=fields)

    def accepts(self, who: Caller) -> bool:  # noqa: ARG002  (only the project's code knows)
        return True

    def decide(
        self, caller: Caller, resource: str, action: str, value: MutableMapping[str, Any]
    ) -> Filter | None:
        """Call the authorization handler for an action, and return its filter of resources; None
        means no restriction. The handler may change `value`.

        Raises Forbidden, Refused, Unavailable.
        """
        handler = self._handler_of(resource, action)
        if handler is None:
            return None
        user = ProjectUser(caller.user or {"identity": caller.team})
        context = Auth.types.AuthContext(
            permissions=user.permissions,
            user=user,
            resource=resource,  # type: ignore[arg-type]
            action=action,  # type: ignore[arg-type]
        )
        try:
            decided = self._call(partial(handler, ctx=context, value=value))
        except AssertionError as error:  # as in LangGraph's documentation of store handlers
            raise Refused(403, str(error) or "Forbidden", {}) from error
        if decided is None or decided is True:
            return None
        if decided is False:
            raise Forbidden()
        if not isinstance(decided, Mapping):
            raise TypeError(f"a handler for {resource}.{action} returned {type(decided).__name__}")
        return dict(decided)

    def _handler_of(self, resource: str, action: str) -> Callable[..., Any] | None:
        """Return the most specific handler; None when there is none."""
        handlers = self._auth._handlers
        for key in ((resource, action), (resource, "*"), ("*", action), ("*", "*")):
            if found := handlers.get(key):
                return found[-1]
        return self._auth._global_handlers[-1] if self._auth._global_handlers else None

    def _call(self, handler: Callable[[], Any]) -> Any:
        """Return a handler's result. Raises Unavailable after the time limit, Refused, and what the
        handler raises; instead of an exception that would end the process, RuntimeError."""
        try:
            answer = handler()
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError(f"an auth handler raised {type(error).__name__}") from error
        if not inspect.isawaitable(answer):
            return answer
        future = asyncio.run_coroutine_threadsafe(_awaited(answer), self._loop)
        try:
            return future.result()
        except TimeoutError as error:
            raise Unavailable("The project's auth handler exceeded its time limit") from error
        except Exception as error:
            if (refusal := _refusal(error)) is not None:
                raise refusal from error
            raise


async def _awaited(answer: Any) -> Any:
    try:
        async with asyncio.timeout(_HANDLER_SECONDS):
            return await answer
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:  # SystemExit would end the event loop
        raise RuntimeError(f"an auth handler raised {type(error).__name__}") from error


def _refusal(error: Exception) -> Refused | None:
    """Return Refused for the SDK's HTTPException or Starlette's with a 4xx status; otherwise
    None."""
    status, detail = getattr(error, "status_code", None), getattr(error, "detail", None)
    if not isinstance(status, int) or not 400 <= status < 500:
        return None
    headers = getattr(error, "headers", None)
    return Refused(status, str(detail or "Unauthorized"), dict(headers or {}))


def _user_of(found: Any) -> ProjectUser:
    """Return the user from the result of `authenticate`: an id, a mapping, an object with an
    identity, or a pair of the permissions and one of these. Raises TypeError for any other."""
    if isinstance(found, tuple) and len(found) == 2:
        permissions, user = found
        return ProjectUser({**_user_of(user), "permissions": permissions})
    if isinstance(found, str):
        return ProjectUser({"identity": found})
    if isinstance(found, Mapping) and found.get("identity"):
        return ProjectUser(found)
    identity = getattr(found, "identity", None)
    if identity is None:
        raise TypeError(
            "authenticate must return a user: an id, or a mapping or object with an identity"
        )
    known = ("identity", "display_name", "is_authenticated", "permissions")
    fields = {name: getattr(found, name) for name in known if hasattr(found, name)}
    return ProjectUser({**getattr(found, "__dict__", {}), **fields})


def _wanted(handler: Callable[..., Any], target: str) -> list[str]:
    """Return the parameter names of `authenticate`. Raises ProjectError for a required parameter
    that is not supported."""
    wanted = []
    for parameter in inspect.signature(handler).parameters.values():
        if parameter.name in _INJECTED:
            wanted.append(parameter.name)
        elif parameter.default is parameter.empty:
            known = ", ".join(_INJECTED)
            raise ProjectError(
                f"auth.path ({target}): authenticate takes '{parameter.name}', "
                f"which is none of {known}"
            )
    if "request" in wanted and importlib.util.find_spec("starlette") is None:
        raise ProjectError(f"auth.path ({target}): its `request` needs starlette to be installed")
    return wanted


def _asgi_request() -> Any:
    from starlette.requests import Request  # noqa: PLC0415

    body = read_body_of(request)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(build_scope(request.environ), receive)  # type: ignore[arg-type]


def _json_body() -> Any:
    """Return the JSON body; None when there is none, or it is invalid. It is read before the caller
    is authenticated, so the limits of all bodies apply. Raises TooLarge, TooMany, TooSlow."""
    raw = read_body_of(request)
    try:
        return parse_document(raw, most_values=parts().settings.max_body_values)
    except InvalidRequest:
        return None


def _headers() -> dict[bytes, bytes]:
    return {
        name.lower().encode("latin-1"): value.encode("latin-1") for name, value in request.headers
    }


_INJECTED: Mapping[str, Callable[[], Any]] = {
    "request": _asgi_request,
    "body": _json_body,
    "path": lambda: request.path,
    "method": lambda: request.method,
    "path_params": lambda: dict(request.view_args or {}),
    "query_params": lambda: dict(request.args.items()),
    "headers": _headers,
    "authorization": lambda: request.headers.get("Authorization"),
}

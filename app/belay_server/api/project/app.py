"""Serve the project's own routes (`http.app` of `langgraph.json`) beside Belay's.

The app's routing table decides: a request that matches one of its routes goes to the app, all
others go to Belay. An app without a routing table (a bare WSGI or ASGI callable) gets the requests
that match no route of Belay's. In both cases the response passes through Flask, so it has a request
id and CORS headers, and is counted in the metrics.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import Any, cast

from a2wsgi.asgi import build_scope
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import RequestRedirect

from belay_server.api.project.asgi_bridge import AsgiBridge, is_text
from belay_server.api.project.middleware import (
    ProjectMiddleware,
    allows_origins,
    middleware_of,
    without_middleware,
)
from belay_server.graphs.project.langgraph_json import Project
from belay_server.graphs.project.loading import ProjectError, load_object

WsgiApp = Callable[..., Any]


class Fit(enum.IntEnum):
    """How well a routing table matches a request. Names and numbers are those of Starlette."""

    NONE = 0
    #: The path matches, but not the method.
    PARTIAL = 1
    FULL = 2


class ProjectApp:
    """The project's app. `close` ends its lifespan."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._bridge = AsgiBridge(without_middleware(app)) if _is_asgi(app) else None
        self._wsgi: WsgiApp = self._bridge or app
        self._fit = _table_of(app)
        self._documents = _documents_of(app)

    @classmethod
    def load(cls, project: Project) -> ProjectApp | None:
        """Load and start the project's app. Return None when it has none. Raises ProjectError."""
        target = project.http.app
        if target is None:
            return None
        made = cls(cls.check(project))
        made._start(target)
        return made

    @staticmethod
    def check(project: Project) -> Any:
        """Import the project's app and return it, without starting it. Raises ProjectError."""
        target = project.http.app
        assert target is not None
        app = load_object(project.root, project.dependencies, target, "http.app")
        if not callable(app):
            kind = type(app).__name__
            raise ProjectError(f"http.app ({target}): must be a WSGI or ASGI app, not a {kind}")
        return app

    def _start(self, target: str) -> None:
        try:
            if self._bridge is not None:
                self._bridge.start()
        except Exception as error:
            raise ProjectError(f"http.app ({target}): {error}") from error

    @property
    def allows_origins(self) -> bool:
        """Whether the app's middleware adds CORS headers, so that Belay must not."""
        return self._bridge is not None and allows_origins(self._app)

    def inside_middleware(
        self,
        app: WsgiApp,
        *,
        before: Callable[[dict[str, Any]], WsgiApp | None],
        opens_socket: Callable[[dict[str, Any]], bool],
    ) -> WsgiApp:
        """Return a WSGI app with the middleware of the project's app around it; the same app if
        there is none. `before` may answer a request before any middleware; `opens_socket`
        returns whether a request opens a WebSocket of Belay's."""
        if self._bridge is None or not middleware_of(self._app):
            return app
        bridge = self._bridge
        return ProjectMiddleware(
            app, self._app, bridge.loop, bridge.state, before=before, opens_socket=opens_socket
        )

    def close(self) -> None:
        if self._bridge is not None:
            self._bridge.close()

    def answers(self, *, ours: bool) -> bool:
        """Return whether the current request goes to the project's app. `ours`: it matches a route
        of Belay's. ASGI cannot represent a path that is not UTF-8, so an ASGI app never gets one.
        """
        if self._bridge is not None and not is_text(request.environ["PATH_INFO"]):
            return False
        if self._fit is None and request.path == "/":
            return True
        if self._fit is None or request.path in self._documents:
            return not ours
        fit = self._fit(request.environ)
        return fit is Fit.FULL or (fit is Fit.PARTIAL and not ours)

    def respond(self) -> Response:
        """Return the app's response to the current request."""
        return cast(Response, Response.from_app(self._wsgi, request.environ))


def _is_asgi(app: Any) -> bool:
    if isinstance(app, Flask):
        return False
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(type(app).__call__):
        return True
    required = [
        parameter
        for parameter in inspect.signature(app).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    return len(required) == 3  # scope, receive, send; a WSGI app has two parameters


def _documents_of(app: Any) -> frozenset[str]:
    """Return the paths of FastAPI's generated documentation, which would hide Belay's."""
    names = ("openapi_url", "docs_url", "redoc_url", "swagger_ui_oauth2_redirect_url")
    return frozenset(filter(None, (getattr(app, name, None) for name in names)))


def _table_of(app: Any) -> Callable[[dict[str, Any]], Fit] | None:
    """Return a function that matches a request's environment with the app's routing table; None
    when the app has no table."""
    if hasattr(app, "url_map"):
        return lambda environ: _fit_of_flask(app, environ)
    if hasattr(app, "routes"):
        return lambda environ: _fit_of_starlette(app, environ)
    return None


def _fit_of_flask(app: Any, environ: dict[str, Any]) -> Fit:
    try:
        app.url_map.bind_to_environ(environ).match()
    except RequestRedirect:
        return Fit.FULL
    except MethodNotAllowed:
        return Fit.PARTIAL
    except (NotFound, HTTPException):
        return Fit.NONE
    return Fit.FULL


def _fit_of_starlette(app: Any, environ: dict[str, Any]) -> Fit:
    scope = build_scope(environ)  # type: ignore[arg-type]
    best = Fit.NONE
    for route in app.routes:
        fit = Fit(route.matches(scope)[0].value)
        if fit is Fit.FULL:
            return fit
        best = max(best, fit)
    return best

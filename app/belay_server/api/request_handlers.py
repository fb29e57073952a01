"""Handle what is common to all requests, Belay's own and the project's: request ids, log fields,
metrics, CORS, authentication, limits, and the choice of the app that responds."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flask import Flask, Response, current_app, request

from belay_server.api.context import CONTEXT, ApiContext, ProjectRoutes, context
from belay_server.api.http.bodies.large_answers import LARGE_ANSWERS, LargeAnswers
from belay_server.api.http.bodies.large_bodies import LARGE_BODIES, LargeBodies
from belay_server.api.http.bodies.unread_bodies import count_body, keep_body
from belay_server.api.http.request_context import (
    RUN_CREDENTIAL,
    RequestContext,
    begin_request_context,
    request_context,
)
from belay_server.api.project.code_access import act_as_caller, act_as_server, act_unauthenticated
from belay_server.api.protocol.commands import TREE_TURNS
from belay_server.api.security.authentication import (
    CALLER,
    caller,
    credential_of_run,
    identify,
    show_caller,
    take_credentials,
    user_of_middleware,
)
from belay_server.api.security.authorization import confine_request, use_database
from belay_server.api.security.cors import REQUEST_ID, cors_headers
from belay_server.api.security.limits import asker, count_request, take_place
from belay_server.api.security.origins import ORIGINS, Origins
from belay_server.api.streaming.clients import STREAM_TURNS
from belay_server.configuration.settings import Settings
from belay_server.domain.errors import TooMany
from belay_server.domain.headers import HeaderPatterns
from belay_server.graphs.project.http_section import HttpConfig
from belay_server.runtime import logs
from belay_server.runtime.turns import Turns
from belay_server.web_metrics import WebMetrics

access_log = logging.getLogger("belay.access")

#: The key in a request's environment of its caller, if it was authenticated before any middleware.
_IDENTIFIED = "belay.identified"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: Responses are private data: no content sniffing, no framing, no referrer, no caching.
_SECURITY = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
#: The route labels in the metrics of unknown routes, and of the project's routes.
_NO_ROUTE, _PROJECT = "none", "http.app"


def prepare_requests(
    app: Flask, settings: Settings, http: HttpConfig, *, authenticates: bool
) -> None:
    """Register the handlers that run before and after every request. There is one of each, as each
    handler adds to the cost of every request."""
    access = logging.INFO if settings.access_log else logging.DEBUG
    templates = {rule.rule: _template(rule.rule) for rule in app.url_map.iter_rules()}
    project: ProjectRoutes | None = app.extensions[CONTEXT].project_routes
    has_cors = project is not None and project.allows_origins
    allow = None if has_cors else cors_headers(settings, http.cors)

    answers = app.extensions[LARGE_ANSWERS] = LargeAnswers(
        settings.max_answers_bytes,
        settings.max_answer_bytes,
        seconds=settings.body_seconds,
        whose=asker,
    )

    def end_request(response: Response) -> Response:
        try:
            answers.hold(request, response)
        except TooMany as error:
            response = current_app.make_response(current_app.handle_user_exception(error))
        if allow is not None and "HTTP_ORIGIN" in request.environ:
            response = allow(response)
        return _end_request(response, context().metrics, templates, access)

    origins = Origins(settings, http.cors, is_open=not authenticates and settings.auth is None)
    app.extensions[ORIGINS] = origins
    app.extensions[STREAM_TURNS] = Turns()
    app.extensions[TREE_TURNS] = Turns()
    bodies = app.extensions[LARGE_BODIES] = LargeBodies(settings.max_bodies_bytes, asker)
    app.before_request(partial(_begin_request, origins, http.logging_headers))
    app.teardown_request(lambda _error: bodies.release(request))
    app.after_request(end_request)


def _begin_request(origins: Origins, logged: HeaderPatterns) -> Response | None:
    environ = request.environ
    take_credentials(environ)
    given = environ.get("HTTP_X_REQUEST_ID", "")
    sane = given if _SANE_ID.fullmatch(given) else str(uuid.uuid4())
    method, path = environ["REQUEST_METHOD"], request.path
    about = {"request_id": sane, "method": method, "path": path}
    state = begin_request_context(RequestContext(sane, about, time.perf_counter()))
    state.body = count_body(environ)
    # The project's own app sees the same id.
    environ["HTTP_X_REQUEST_ID"] = sane
    logs.in_request(about)
    if logged.includes:
        about["headers"] = logged.pick(dict(request.headers))
    host = environ.get("HTTP_HOST")
    if host is not None:  # a browser always sends it
        origins.refuse_foreign_host(host)
    origins.refuse_foreign_change(method, environ.get("HTTP_ORIGIN"), host or "")
    if method == "OPTIONS" and _is_preflight(environ):
        return Response("OK", content_type="text/plain; charset=utf-8")
    found = context()
    project = found.project_routes
    act_unauthenticated()  # this greenlet may have handled another request of its connection
    if project is not None and project.answers(ours=request.url_rule is not None):
        state.route = _PROJECT
        if found.parts.graphs.project.http.authenticates_project:
            _authenticate(found)
            if (who := caller()) is not None:
                show_caller(environ, who)
        else:
            act_as_server()
        return project.respond()
    if request.endpoint is not None:
        view = current_app.view_functions[request.endpoint]
        state.leave = _admit(found, view)
    return None


def _admit(found: ApiContext, view: Any) -> Callable[[], None] | None:
    """Authenticate a request and apply the limits. Return a function to call when the request has
    ended; None when there is nothing to call.

    Raises Unauthorized, Forbidden, Refused, TooMany.
    """
    if getattr(view, "is_public", False):
        return None
    is_cancel = getattr(view, "is_cancel", False)
    if is_cancel:
        use_database(found.cancel_database)
    _authenticate(found)
    count_request(found, is_cancel=is_cancel)
    return take_place(found, is_cancel=is_cancel)


def refuse_unauthenticated(app: Flask, environ: dict[str, Any]) -> Response | None:
    """Authenticate a request before the project's middleware gets it (`middleware_order`). Return
    the refusal, or None."""
    if environ["REQUEST_METHOD"] == "OPTIONS" and _is_preflight(environ):
        return None
    take_credentials(environ)
    with app.request_context(environ):
        found = context()
        if not _needs_caller(app, found):
            return None
        try:
            environ[_IDENTIFIED] = (identify(found),)
            keep_body(request, environ)
        except Exception as error:  # noqa: BLE001  (as Flask handles one of a view)
            return app.make_response(app.handle_user_exception(error))
    return None


def _needs_caller(app: Flask, found: ApiContext) -> bool:
    """Return whether the route of the current request authenticates its callers."""
    project = found.project_routes
    if project is not None and project.answers(ours=request.url_rule is not None):
        return found.parts.graphs.project.http.authenticates_project
    view = app.view_functions.get(request.endpoint or "")
    return view is not None and not getattr(view, "is_public", False)


def _authenticate(found: ApiContext) -> None:
    """Set the request's caller. With the project's authentication, restrict the request's access
    until a view authorizes it. Raises Unauthorized, Forbidden, Refused, TooMany.

    A user whom the project's middleware has set is the caller where nothing authenticates after it:
    with `auth_first`, and without authentication.
    """
    identified = request.environ.get(_IDENTIFIED)
    who = identify(found) if identified is None else identified[0]
    is_last = identified is not None or found.authentication is None
    if is_last and RUN_CREDENTIAL not in request.environ:
        who = user_of_middleware(request.environ) or who
    if who is None:
        if found.authentication is not None:  # the project's own code in this server
            act_as_server()
        return
    request.environ[CALLER] = who
    act_as_caller(request.headers, credential_of_run())
    if found.authorization is not None:
        confine_request()


def _is_preflight(environ: Mapping[str, Any]) -> bool:
    """Return whether the request is a CORS preflight. Preflights are handled for every path, before
    Belay's and the project's routes."""
    return "HTTP_ORIGIN" in environ and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ


def _end_request(
    response: Response, metrics: WebMetrics, templates: Mapping[str, str], level: int
) -> Response:
    current, state = request, request_context()
    response.headers[REQUEST_ID] = state.request_id
    for name, value in _SECURITY:
        response.headers.setdefault(name, value)
    seconds = time.perf_counter() - state.began
    about, status = state.about, response.status_code
    rule = current.url_rule
    route = state.route or (templates[rule.rule] if rule is not None else _NO_ROUTE)
    metrics.answered(about["method"], route, status, seconds)
    about["status"] = status
    if access_log.isEnabledFor(level):
        extra = {"seconds": round(seconds, 6)}
        words = "%s %s %d in %.1f ms"
        milliseconds = seconds * 1000
        access_log.log(
            level, words, about["method"], about["path"], status, milliseconds, extra=extra
        )
    # A thread that was started for this request shares these log fields, and may outlive it.
    response.call_on_close(about.clear)
    if state.leave is not None:
        response.call_on_close(state.leave)
    if state.body is not None and "gunicorn.socket" in current.environ:
        response.call_on_close(partial(state.body.discard, current.environ["gunicorn.socket"]))
    return response


def _template(rule: str) -> str:
    """Return a rule such as `/threads/<thread_id>` in OpenAPI's form: `/threads/{thread_id}`."""
    return re.sub(r"<(?:[^:<>]*:)?([^<>]*)>", r"{\1}", rule)

"""What holds for every request, Belay's own and the project's: its id, its log fields, its metrics,
CORS, and who answers it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from flask import Flask, Response, g, request
from flask_cors import CORS

from app import logs
from app.api.parts import parts
from app.api.project_app import ProjectApp
from app.graphs.http_config import CorsRules
from app.meters import WebMeters
from app.settings import Settings

access_log = logging.getLogger("belay.access")

REQUEST_ID = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: What a page in a browser may read of an answer, besides what it may read of any.
_EXPOSED = (
    "x-pagination-total",
    "x-pagination-next",
    "content-location",
    "location",
    REQUEST_ID,
)
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
#: What the metrics call a route that is not there, and one that is the project's.
_NO_ROUTE, _PROJECT = "none", "http.app"


def request_id() -> str:
    """The id of the request being answered."""
    found: str = g.request_id
    return found


def prepare_requests(app: Flask, settings: Settings, cors: CorsRules) -> None:
    """In the order in which a request meets them; what is done to answers runs backwards."""
    access = logging.INFO if settings.access_log else logging.DEBUG
    templates = {rule.rule: _template(rule.rule) for rule in app.url_map.iter_rules()}

    def end_request(response: Response) -> Response:
        return _end_request(response, parts().meters, templates, access)

    app.before_request(_begin_request)
    app.before_request(_answer_preflight)
    app.before_request(_answer_by_project)
    app.after_request(end_request)
    _allow_origins(app, settings, cors)


def _begin_request() -> None:
    given = request.headers.get(REQUEST_ID, "")
    g.request_id = given if _SANE_ID.fullmatch(given) else str(uuid.uuid4())
    g.began = time.perf_counter()
    g.about = {"request_id": g.request_id, "method": request.method, "path": request.path}
    # The project's own app sees the same id.
    request.environ["HTTP_X_REQUEST_ID"] = g.request_id
    logs.in_request(g.about)


def _answer_preflight() -> Response | None:
    """Before anybody's routes: a browser asks whether it may ask, at any path."""
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not asks or "Origin" not in request.headers:
        return None
    return Response("OK", content_type="text/plain; charset=utf-8")


def _answer_by_project() -> Response | None:
    project = parts().project_app
    if not isinstance(project, ProjectApp) or not project.answers(ours=_is_ours()):
        return None
    g.route = _PROJECT
    return project.respond()


def _is_ours() -> bool:
    return request.url_rule is not None


def _end_request(
    response: Response, meters: WebMeters, templates: dict[str, str], level: int
) -> Response:
    response.headers[REQUEST_ID] = g.request_id
    seconds = time.perf_counter() - g.began
    rule = request.url_rule
    route = g.get("route") or (templates[rule.rule] if rule is not None else _NO_ROUTE)
    meters.answered(request.method, route, str(response.status_code), seconds)
    about: dict[str, Any] = g.about
    about["status"] = response.status_code
    if access_log.isEnabledFor(level):
        access_log.log(
            level,
            "%s %s %d in %.1f ms",
            request.method,
            about["path"],
            response.status_code,
            seconds * 1000,
            extra={"seconds": round(seconds, 6)},
        )
    # A thread that was started for this request has its fields too, and outlives it.
    response.call_on_close(about.clear)
    return response


def _template(rule: str) -> str:
    """`/threads/<thread_id>` as the document has it: `/threads/{thread_id}`."""
    return re.sub(r"<(?:[^:<>]*:)?([^<>]*)>", r"{\1}", rule)


def _allow_origins(app: Flask, settings: Settings, cors: CorsRules) -> None:
    """The project's rules, and where it has none the settings'."""
    origins = settings.cors_origins
    if cors.allow_origins is not None or cors.allow_origin_regex is not None:
        origins = cors.allow_origins or ()
    allowed: list[str | re.Pattern[str]] = ["*"] if "*" in origins else []
    if not allowed:
        # As patterns of our own: what looks like one would be taken for one.
        allowed = [re.compile(re.escape(origin) + r"\Z", re.IGNORECASE) for origin in origins]
    if cors.allow_origin_regex is not None:
        allowed.append(re.compile(f"(?:{cors.allow_origin_regex})\\Z"))
    if not allowed:
        return
    headers: Any = list(cors.allow_headers) if cors.allow_headers is not None else "*"
    methods = list(cors.allow_methods) if cors.allow_methods is not None else list(_METHODS)
    exposed = list(cors.expose_headers) if cors.expose_headers is not None else list(_EXPOSED)
    CORS(
        app,
        origins=allowed,
        methods=list(_METHODS) if "*" in methods else methods,
        allow_headers="*" if "*" in headers else headers,
        expose_headers=exposed,
        supports_credentials=cors.allow_credentials,
        max_age=cors.max_age,
        # With credentials a browser takes no wildcard: then it is told its own origin.
        send_wildcard=not cors.allow_credentials,
        always_send=False,
        intercept_exceptions=False,
        allow_private_network=True,
    )

"""Decide by CORS which origins may call the server and, by the same rules, open a WebSocket."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

from flask import Response
from flask_cors import cross_origin

from belay_server.configuration.settings import Settings
from belay_server.graphs.project.http_section import CorsRules

REQUEST_ID = "x-request-id"
#: The response headers that a page may read, besides those that are always readable.
_EXPOSED = (
    "x-pagination-total",
    "x-pagination-next",
    "content-location",
    "location",
    REQUEST_ID,
)
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


def _allowed_origins(settings: Settings, cors: CorsRules) -> list[str | re.Pattern[str]]:
    """Return the allowed origins of the project, or those of the settings if it has none."""
    origins = settings.cors_origins
    if cors.allow_origins is not None or cors.allow_origin_regex is not None:
        origins = cors.allow_origins or ()
    allowed: list[str | re.Pattern[str]] = ["*"] if "*" in origins else []
    if not allowed:
        # flask-cors would treat an origin that looks like a pattern as one, so all are escaped.
        allowed = [re.compile(re.escape(origin) + r"\Z", re.IGNORECASE) for origin in origins]
    if cors.allow_origin_regex is not None:
        allowed.append(re.compile(f"(?:{cors.allow_origin_regex})\\Z"))
    return allowed


def origin_may_ask(settings: Settings, cors: CorsRules, origin: str) -> bool:
    """Return whether an origin may call the server."""
    return any(
        allowed == "*" if isinstance(allowed, str) else bool(allowed.match(origin))
        for allowed in _allowed_origins(settings, cors)
    )


def cors_headers(settings: Settings, cors: CorsRules) -> Callable[[Response], Response] | None:
    """Return a function that adds CORS headers to a response; None when no origin is allowed."""
    allowed = _allowed_origins(settings, cors)
    if not allowed:
        return None
    headers: Any = list(cors.allow_headers) if cors.allow_headers is not None else "*"
    methods = list(cors.allow_methods) if cors.allow_methods is not None else list(_METHODS)
    exposed = list(cors.expose_headers) if cors.expose_headers is not None else list(_EXPOSED)
    allow = cross_origin(
        origins=allowed,
        methods=list(_METHODS) if "*" in methods else methods,
        allow_headers="*" if "*" in headers else headers,
        expose_headers=exposed,
        supports_credentials=cors.allow_credentials,
        max_age=cors.max_age,
        # Browsers accept no wildcard with credentials; the header then has the request's origin.
        send_wildcard=not cors.allow_credentials,
        automatic_options=False,
        allow_private_network=settings.cors_private_network,
    )
    return cast(Callable[[Response], Response], allow(lambda response: response))

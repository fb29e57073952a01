"""The `http` section of `langgraph.json`: the project's own routes, disabled routes, CORS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from belay_server.domain.headers import HeaderPatterns
from belay_server.graphs.project.loading import ProjectError

#: The nouns of `disable_<noun>`. Each except `webhooks` is a group of routes; `event_streaming` is
#: version 2 of the streaming protocol.
NOUNS = (
    "assistants",
    "threads",
    "runs",
    "store",
    "meta",
    "mcp",
    "a2a",
    "ui",
    "webhooks",
    "event_streaming",
)


_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")
#: A token of RFC 9110: the name of a header or a method.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class CorsRules:
    """Which web pages may call the API, and how. None: use the settings or the defaults."""

    allow_origins: tuple[str, ...] | None = None
    allow_origin_regex: str | None = None
    allow_methods: tuple[str, ...] | None = None
    allow_headers: tuple[str, ...] | None = None
    expose_headers: tuple[str, ...] | None = None
    allow_credentials: bool = False
    max_age: int = 600


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """The project's configuration of the HTTP API."""

    #: `path:variable` of a WSGI or ASGI app whose routes are served beside Belay's.
    app: str | None = None
    disabled: frozenset[str] = frozenset()
    cors: CorsRules = field(default_factory=CorsRules)
    #: What all paths start with, except that of the health check: `/prefix`, or "".
    mount_prefix: str = ""
    #: The project's own routes authenticate the caller, as Belay's do.
    authenticates_project: bool = False
    #: Whether a request is authenticated before the middleware of `app` gets it.
    auth_first: bool = False
    #: The headers of a request that its runs can read.
    configurable_headers: HeaderPatterns = field(default_factory=HeaderPatterns)
    #: The headers of a request that its log records have.
    logging_headers: HeaderPatterns = field(default_factory=HeaderPatterns)

    def serves(self, noun: str) -> bool:
        return noun not in self.disabled


def read_http_config(path: Path, http: Any) -> HttpConfig:
    """Read the `http` section. Raise ProjectError with the name of the entry that is wrong."""
    if http is None:
        return HttpConfig()
    if not isinstance(http, dict):
        raise ProjectError(f"{path}: 'http' must be an object")
    app = http.get("app")
    if app is not None and not (isinstance(app, str) and ":" in app):
        raise ProjectError(f"{path}: 'http.app' must be 'path/to/file.py:variable'")
    return HttpConfig(
        app=app,
        disabled=frozenset(noun for noun in NOUNS if _flag(path, http, f"disable_{noun}")),
        auth_first=_auth_first(path, http.get("middleware_order")),
        authenticates_project=_flag(path, http, "enable_custom_route_auth"),
        cors=_cors(path, http.get("cors")),
        mount_prefix=_mount_prefix(path, http.get("mount_prefix")),
        configurable_headers=_headers(path, http, "configurable_headers"),
        logging_headers=_headers(path, http, "logging_headers"),
    )


def _headers(path: Path, http: Mapping[str, Any], name: str) -> HeaderPatterns:
    try:
        return HeaderPatterns.of(http.get(name) or {})
    except ValueError as error:
        raise ProjectError(f"{path}: 'http.{name}' {error}") from error


def _flag(path: Path, section: Mapping[str, Any], name: str, where: str = "http") -> bool:
    value = section.get(name, False)
    if not isinstance(value, bool):
        raise ProjectError(f"{path}: '{where}.{name}' must be true or false")
    return value


def _auth_first(path: Path, order: Any) -> bool:
    if order not in (None, "auth_first", "middleware_first"):
        raise ProjectError(
            f"{path}: 'http.middleware_order' must be 'auth_first' or 'middleware_first'"
        )
    return bool(order == "auth_first")


def _mount_prefix(path: Path, prefix: Any) -> str:
    if prefix is None:
        return ""
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise ProjectError(f"{path}: 'http.mount_prefix' must be a path such as '/agents'")
    return prefix.rstrip("/")


def _cors(path: Path, cors: Any) -> CorsRules:
    if cors is None:
        return CorsRules()
    if not isinstance(cors, dict):
        raise ProjectError(f"{path}: 'http.cors' must be an object")
    max_age = cors.get("max_age", 600)
    if isinstance(max_age, bool) or not isinstance(max_age, int) or max_age < 0:
        raise ProjectError(f"{path}: 'http.cors.max_age' must be whole seconds from 0")
    return CorsRules(
        allow_origins=_words(path, cors, "allow_origins"),
        allow_origin_regex=_pattern(path, cors.get("allow_origin_regex")),
        allow_methods=_tokens(path, cors, "allow_methods"),
        allow_headers=_tokens(path, cors, "allow_headers"),
        expose_headers=_tokens(path, cors, "expose_headers"),
        allow_credentials=_flag(path, cors, "allow_credentials", "http.cors"),
        max_age=max_age,
    )


def _words(path: Path, cors: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    words = cors.get(name)
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ProjectError(f"{path}: 'http.cors.{name}' must be a list of strings")
    return tuple(words)


def _tokens(path: Path, cors: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    words = _words(path, cors, name)
    for word in words or ():
        if not _TOKEN.fullmatch(word):
            raise ProjectError(f"{path}: 'http.cors.{name}': {word!r} is no token of HTTP")
    return words


def _pattern(path: Path, pattern: Any) -> str | None:
    if pattern is None:
        return None
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ProjectError(f"{path}: 'http.cors.allow_origin_regex' {error}") from error
    return str(pattern)

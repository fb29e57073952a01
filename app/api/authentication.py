"""Who asks: by an API key, or as the project's own `auth` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flask import request

from app.api.project_auth import ProjectAuth
from app.db.connection import Database
from app.domain.access import Caller
from app.domain.errors import Forbidden, Unauthorized
from app.graphs.project import Project
from app.services.api_keys import ApiKeys
from app.services.parts import Authentication
from app.settings import Settings

_View = TypeVar("_View", bound=Callable[..., object])
#: Where in a request's environment the one who asks is.
CALLER = "belay.caller"
#: What a key of the scope `agent_runs` opens.
AGENT_RUNS = "/agent/"


def authentication_of(
    settings: Settings, project: Project, database: Database
) -> Authentication | None:
    """None: anybody may do anything. Raises ProjectError."""
    if project.auth is not None:
        return ProjectAuth.load(project)
    return KeyAuthentication(ApiKeys(database)) if settings.auth == "keys" else None


class KeyAuthentication:
    """Requests have `x-api-key`, or `Authorization: Bearer`."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def caller(self) -> Caller:
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
    """As the two headers say; `x-api-key` goes before the other."""
    if key := request.headers.get("x-api-key", "").strip():
        return key
    scheme, _, key = request.headers.get("Authorization", "").strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def caller() -> Caller | None:
    """Who asks; None when nobody is asked who they are."""
    found: Caller | None = request.environ.get(CALLER)
    return found


def public(view: _View) -> _View:
    """Marks a view that anybody may see, whoever they are."""
    view.is_public = True  # type: ignore[attr-defined]
    return view

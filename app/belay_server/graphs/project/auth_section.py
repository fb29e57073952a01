"""The `auth` section of `langgraph.json`: the project's own authentication and authorization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from belay_server.graphs.project.loading import ProjectError


@dataclass(frozen=True, slots=True)
class AuthCacheConfig:
    """Which requests have the same caller, and for how long that is remembered."""

    #: The names of headers. Requests with the same values have the same caller.
    headers: tuple[str, ...]
    seconds: float = 60.0
    most_callers: int = 1_000


def read_auth_path(path: Path, auth: Any) -> str | None:
    """Return the path of `{"path": "./auth.py:auth"}`. Raise ProjectError."""
    if auth is None:
        return None
    target = auth.get("path") if isinstance(auth, dict) else None
    if not isinstance(target, str) or ":" not in target:
        raise ProjectError(f"{path}: 'auth.path' must be 'path/to/file.py:variable'")
    return target


def read_auth_cache(path: Path, auth: Any) -> AuthCacheConfig | None:
    """Read `{"cache": {"cache_keys": ["authorization"], "ttl_seconds": 60, "max_size": 1000}}`.
    Raise ProjectError."""
    cache = auth.get("cache") if isinstance(auth, dict) else None
    if cache is None:
        return None
    who = f"{path}: 'auth.cache"
    names = cache.get("cache_keys") if isinstance(cache, dict) else None
    if not names or not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise ProjectError(f"{who}.cache_keys' must list the headers that identify a caller")
    seconds, most = cache.get("ttl_seconds", 60), cache.get("max_size", 1_000)
    for name, value in (("ttl_seconds", seconds), ("max_size", most)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ProjectError(f"{who}.{name}' must be a number above 0")
    return AuthCacheConfig(tuple(name.lower() for name in names), float(seconds), int(most))


def read_auth_openapi(path: Path, auth: Any) -> dict[str, Any]:
    """Return the `securitySchemes`, `security` and `paths` of `auth.openapi`. Raise
    ProjectError."""
    openapi = auth.get("openapi") or {} if isinstance(auth, dict) else {}
    types = {"securitySchemes": dict, "security": list, "paths": dict}
    if not isinstance(openapi, dict) or not all(
        isinstance(openapi.get(name, kind()), kind) for name, kind in types.items()
    ):
        raise ProjectError(
            f"{path}: 'auth.openapi' must have objects 'securitySchemes' and 'paths', and a list "
            "'security'"
        )
    return openapi

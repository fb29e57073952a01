"""Serve all paths below a prefix (`http.mount_prefix`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

WsgiApp = Callable[..., Iterable[bytes]]
#: A load balancer may check the health of the server without the prefix.
_HEALTH = "/ok"


class Mounted:
    """A WSGI app whose paths start with a prefix. Other paths have no route, except `/ok`."""

    def __init__(self, app: WsgiApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == self._prefix or path.startswith(f"{self._prefix}/"):
            environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + self._prefix
            environ["PATH_INFO"] = path.removeprefix(self._prefix) or "/"
        elif path != _HEALTH:
            environ["PATH_INFO"] = f"/outside of {self._prefix}"  # no route has a space
        return self._app(environ, start_response)

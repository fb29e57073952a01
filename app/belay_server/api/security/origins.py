"""Refuse requests from pages of foreign origins, and requests for foreign host names.

CORS prevents a page from reading a response, not from sending the request: a form's POST needs no
permission, nor does a WebSocket. So a request with a foreign `Origin` that would change something
is refused here. A page's host name can also resolve to 127.0.0.1 (DNS rebinding), so a server
without authentication accepts only loopback names.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from flask import current_app
from werkzeug.datastructures import Headers

from belay_server.api.security.cors import origin_may_ask
from belay_server.configuration.exposure import is_loopback
from belay_server.configuration.settings import Settings
from belay_server.domain.errors import Forbidden
from belay_server.graphs.project.http_section import CorsRules

ORIGINS = "belay.origins"
#: A name or an address, and a port.
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]*)?")
_CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS"})
#: What `Sec-Fetch-Site` says of a page that is of another origin.
_OTHER_SITES = ("cross-site", "same-site")


class Origins:
    """The rules of one application."""

    def __init__(self, settings: Settings, cors: CorsRules, *, is_open: bool) -> None:
        """`is_open`: there is no authentication, and BELAY_AUTH is not set."""
        self._settings = settings
        self._cors = cors
        self._is_open = is_open

    def refuse_foreign_host(self, host: str) -> None:
        """Raise Forbidden, on an open server, for a Host header that is neither a loopback name
        nor in BELAY_HOSTS."""
        if not self._is_open:
            return
        found = _HOST.fullmatch(host.lower())
        name = "" if found is None else found[1].strip("[]")
        if is_loopback(name) or name.endswith(".localhost") or name in self._settings.hosts:
            return
        raise Forbidden(
            f"This server accepts only loopback names, not {name!r}: set BELAY_HOSTS to allow it, "
            "or BELAY_AUTH to authenticate callers"
        )

    def refuse_foreign_change(self, method: str, origin: str | None, host: str) -> None:
        """Raise Forbidden for a request of a foreign page that would change something."""
        if method not in _CHANGES_NOTHING and not self.may_ask(origin, host):
            raise Forbidden(
                f"Pages of {origin} may not call this server (BELAY_CORS_ORIGINS, or http.cors in "
                "langgraph.json)"
            )

    def refuse_foreign_stop(self, headers: Headers) -> None:
        """Raise Forbidden for a GET of a foreign page that may stop a run when it ends. A request
        whose response the page cannot read (such as an image) has no `Origin`, but the browser
        sends `Sec-Fetch-Site`. A page of another port or subdomain is same-site, but foreign."""
        origin = headers.get("Origin")
        if origin is None and headers.get("Sec-Fetch-Site") in _OTHER_SITES:
            origin = "another site"
        self.refuse_foreign_change("POST", origin, headers.get("Host", ""))

    def may_ask(self, origin: str | None, host: str) -> bool:
        """Return whether a request is from a page of this server, from an origin that CORS allows,
        or not from a page."""
        if origin is None or _host_of(origin) == host:
            return True
        return origin_may_ask(self._settings, self._cors, origin)


def _host_of(origin: str) -> str | None:
    """Return the host and port of an origin; None if it has none, or is not an origin."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def origins() -> Origins:
    """Return the rules for origins of the current application."""
    found: Origins = current_app.extensions[ORIGINS]
    return found

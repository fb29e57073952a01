"""Which pages in a browser may have this server do something.

CORS keeps a page from reading an answer, not from sending the request: a form's POST needs no
permission, and neither does a WebSocket. So a foreign `Origin` is refused here on everything that
changes something. And a page of any name can have its name resolve to 127.0.0.1 (DNS rebinding);
a server without authentication therefore answers to loopback names only.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from werkzeug.datastructures import Headers

from belay_server.api.security.cors import origin_may_ask
from belay_server.domain.errors import Forbidden
from belay_server.exposure import is_loopback
from belay_server.graphs.project.http_section import CorsRules
from belay_server.settings import Settings

#: A name or an address, and a port.
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]*)?")
_CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS"})


class Origins:
    """The rules of one application."""

    def __init__(self, settings: Settings, cors: CorsRules, *, is_open: bool) -> None:
        """`is_open`: there is no authentication, and BELAY_AUTH does not say that this is meant."""
        self._settings = settings
        self._cors = cors
        self._is_open = is_open

    def refuse_foreign_host(self, host: str) -> None:
        """`host` is the Host header. Raises Forbidden."""
        if not self._is_open:
            return
        found = _HOST.fullmatch(host.lower())
        name = "" if found is None else found[1].strip("[]")
        if is_loopback(name) or name.endswith(".localhost") or name in self._settings.hosts:
            return
        raise Forbidden(
            f"This server answers to loopback names, not to {name!r}: set BELAY_HOSTS to allow it, "
            "or BELAY_AUTH to have callers say who they are"
        )

    def refuse_foreign_change(self, method: str, origin: str | None, host: str) -> None:
        """Raises Forbidden for a request that would change something for a foreign page."""
        if method not in _CHANGES_NOTHING and not self.may_ask(origin, host):
            raise Forbidden(f"Pages of {origin} may not call this server (BELAY_CORS_ORIGINS)")

    def refuse_foreign_stop(self, headers: Headers) -> None:
        """The same for a GET whose end may stop a run. A page that does not ask to read the answer
        (an image, say) sends no `Origin`; a browser then says that it comes from another site.

        Raises Forbidden.
        """
        origin = headers.get("Origin")
        if origin is None and headers.get("Sec-Fetch-Site") == "cross-site":
            origin = "another site"
        self.refuse_foreign_change("POST", origin, headers.get("Host", ""))

    def may_ask(self, origin: str | None, host: str) -> bool:
        """A page of this server, or of an origin that CORS allows; or no page."""
        if origin is None or urlsplit(origin).netloc == host:
            return True
        return origin_may_ask(self._settings, self._cors, origin)

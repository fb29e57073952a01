"""What an application is made of, for its views: `context()`, and `parts()` of it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flask import Response, current_app, request

from belay_server.bus.open_requests import OpenRequests
from belay_server.bus.rate_limits import FailedLogins, RateLimits
from belay_server.db.postgres.pool import Database
from belay_server.domain.access import Caller, Filter
from belay_server.services.agent_runs.output_schemas import OutputSchemaChecks
from belay_server.services.open_keys import OpenKeys
from belay_server.services.parts import Parts
from belay_server.services.webhooks.host_names import HostNames
from belay_server.web_metrics import WebMetrics

WsgiApp = Callable[..., Any]
CONTEXT = "belay"
#: The key in a request's environment of the request's own parts, if it has any.
OWN_PARTS = "belay.parts"


class Authentication(Protocol):
    """Authenticates the current request."""

    def caller(self) -> Caller:
        """Return the authenticated caller. Raises Unauthorized, Refused."""

    def accepts(self, who: Caller) -> bool:
        """Return whether a caller that was authenticated before still has access, as far as this
        is known without its credential. Raises Unavailable."""


class Authorization(Protocol):
    """The project's authorization handlers."""

    def decide(
        self, caller: Caller, resource: str, action: str, value: MutableMapping[str, Any]
    ) -> Filter | None:
        """Return the filter of the resources that the caller may use; None: all of them.

        Raises Forbidden, Refused, Unavailable.
        """


class ProjectRoutes(Protocol):
    """The project's own HTTP app."""

    def answers(self, *, ours: bool) -> bool:
        """Return whether the current request goes to the project's app."""

    def respond(self) -> Response:
        """Return the app's response to the current request."""

    def close(self) -> None:
        """End the app's lifespan."""

    @property
    def allows_origins(self) -> bool:
        """Whether the app's middleware adds CORS headers, so that Belay must not."""

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


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The components of a web process: those of its services, and those that only the API uses."""

    parts: Parts
    #: Cancels have separate connections, so that a flood of other requests does not delay them.
    cancel_database: Database
    metrics: WebMetrics
    output_schemas: OutputSchemaChecks
    #: None: requests are not authenticated, and everything is permitted.
    authentication: Authentication | None
    #: None: every authenticated caller is permitted everything.
    authorization: Authorization | None = None
    project_routes: ProjectRoutes | None = None
    #: None: no rate limit.
    rate_limits: RateLimits | None = None
    #: None: no limit on a caller's open requests.
    open_requests: OpenRequests | None = None
    #: Ends the open requests of a revoked key. None without API keys.
    open_keys: OpenKeys | None = None
    #: Counts failed authentications by address.
    failed_logins: FailedLogins | None = None
    #: Resolves the host names of webhooks.
    host_names: HostNames = field(default_factory=HostNames)

    def close(self) -> None:
        """Close all components. Call it while the event loop still runs: closing connections needs
        it."""
        for component in (self.project_routes, self.open_requests, self.open_keys):
            if component is not None:
                component.close()
        self.parts.close()
        self.cancel_database.close()


def context() -> ApiContext:
    """Return the components of the current application."""
    found: ApiContext = current_app.extensions[CONTEXT]
    return found


def parts() -> Parts:
    """Return the components that services use for the current request. Their database may have
    the request's own restrictions."""
    own: Parts | None = request.environ.get(OWN_PARTS)
    return own or context().parts

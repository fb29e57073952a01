"""The components that services use. `belay_server.factory` or a worker creates them once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.event_log import EventLog
from belay_server.bus.open_requests import OpenRequests
from belay_server.bus.rate_limits import FailedLogins, RateLimits
from belay_server.bus.run_feed import RunFeed
from belay_server.db.connection import Database
from belay_server.domain.access import Caller
from belay_server.domain.webhooks import WebhookPolicy
from belay_server.doorbell import Doorbell
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.store import ApiStore
from belay_server.services.agent_runs.output_schemas import OutputSchemaChecks
from belay_server.services.assistant_cache import AssistantCache
from belay_server.services.open_keys import OpenKeys
from belay_server.services.stream_clients import StreamTurns
from belay_server.services.webhooks.host_names import HostNames
from belay_server.settings import Settings
from belay_server.states.process import StateProcess
from belay_server.web_metrics import WebMetrics


class Closeable(Protocol):
    def close(self) -> None: ...


class Authentication(Protocol):
    """Authenticates the current request."""

    def caller(self) -> Caller:
        """Return the authenticated caller. Raises Unauthorized, Refused."""


@dataclass(frozen=True, slots=True)
class RunParts:
    """The components that create and cancel runs. A worker has them too, to fire crons."""

    settings: Settings
    graphs: GraphRegistry
    doorbell: Doorbell
    cancel_flags: CancelFlags
    event_log: EventLog
    assistant_cache: AssistantCache
    #: Called with the status of each run that a cancel ended before it started, for the metrics.
    count_unstarted: Callable[[str | None], None]

    @property
    def webhook_policy(self) -> WebhookPolicy:
        """Return the project's webhook policy, restricted by the operator's settings."""
        asked, settings = self.graphs.project.webhook_policy, self.settings
        return dataclasses.replace(
            asked,
            https_only=asked.https_only or settings.webhook_https_only,
            allow_private=settings.webhook_allow_private,
            allowed_domains=settings.webhook_domains or asked.allowed_domains,
        )


@dataclass(frozen=True, slots=True)
class Parts(RunParts):
    """All components of a web process."""

    database: Database
    #: Cancels have separate connections, so that a flood of other requests does not delay them.
    cancel_database: Database
    feed: RunFeed
    store: ApiStore
    metrics: WebMetrics
    #: Reads and writes the states of threads; large ones in separate processes.
    states: StateProcess
    output_schemas: OutputSchemaChecks
    #: The project's own HTTP app. Only the API calls it.
    project_app: Closeable | None = None
    stream_turns: StreamTurns = field(default_factory=StreamTurns)
    #: Resolves the host names of webhooks.
    host_names: HostNames = field(default_factory=HostNames)
    #: None: no rate limit.
    rate_limits: RateLimits | None = None
    #: None: no limit on a caller's open requests.
    open_requests: OpenRequests | None = None
    #: None: requests are not authenticated, and everything is permitted.
    authentication: Authentication | None = None
    #: Ends the open requests of a revoked key. None without API keys.
    open_keys: OpenKeys | None = None
    #: Counts failed authentications by address.
    failed_logins: FailedLogins | None = None

    def close(self) -> None:
        """Close all components. Call it while the event loop still runs: closing connections needs
        it."""
        self.states.close()
        if self.project_app is not None:
            self.project_app.close()
        if self.open_requests is not None:
            self.open_requests.close()
        if self.open_keys is not None:
            self.open_keys.close()
        self.database.close()
        self.cancel_database.close()

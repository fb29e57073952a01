"""The components that services use. `belay_server.factory` or a worker creates them once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from langgraph.store.base import BaseStore

from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.event_log import EventLog
from belay_server.bus.isolated_graphs import IsolatedGraphs
from belay_server.bus.run_feed import RunFeed
from belay_server.configuration.settings import Settings
from belay_server.db.postgres.pool import Database
from belay_server.domain.webhooks import WebhookPolicy
from belay_server.doorbell import Doorbell
from belay_server.graphs.registry import GraphRegistry
from belay_server.services.assistant_cache import AssistantCache
from belay_server.states.process import StateProcess


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
        project_policy, settings = self.graphs.project.webhooks.policy, self.settings
        return dataclasses.replace(
            project_policy,
            https_only=project_policy.https_only or settings.webhook_https_only,
            allow_private=settings.webhook_allow_private,
            allowed_domains=settings.webhook_domains or project_policy.allowed_domains,
        )


@dataclass(frozen=True, slots=True)
class Parts(RunParts):
    """The components that the services of a web process use."""

    database: Database
    feed: RunFeed
    store: BaseStore
    isolated_graphs: IsolatedGraphs
    #: Reads and writes the states of threads; large ones in separate processes.
    states: StateProcess
    #: The user of the request, if the project's own authentication returned one.
    user: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def identity(self) -> str | None:
        """Return the identity of the request's user; None without one."""
        return None if self.user is None else str(self.user["identity"])

    def close(self) -> None:
        self.states.close()
        self.database.close()

"""The parts the services of a web process work with, joined once by `app.factory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from app.bus.cancel_flag import CancelFlags
from app.bus.event_log import EventLog
from app.bus.run_feed import RunFeed
from app.db.connection import Database
from app.dispatch import Doorbell
from app.graphs.registry import GraphRegistry
from app.meters import WebMeters
from app.services.known_assistants import KnownAssistants
from app.settings import Settings


class Closeable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    settings: Settings
    database: Database
    graphs: GraphRegistry
    doorbell: Doorbell
    cancel_flags: CancelFlags
    event_log: EventLog
    feed: RunFeed
    known_assistants: KnownAssistants
    meters: WebMeters
    #: The project's own HTTP app, which only the API knows how to call.
    project_app: Closeable | None = None

    def close(self) -> None:
        """While there is still an event loop to close connections with."""
        if self.project_app is not None:
            self.project_app.close()
        self.database.close()

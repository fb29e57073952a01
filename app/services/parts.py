"""The parts the services of a web process work with, joined once by `app.factory`."""

from __future__ import annotations

from dataclasses import dataclass

from app.bus.cancel_flag import CancelFlags
from app.bus.event_log import EventLog
from app.bus.run_feed import RunFeed
from app.db.connection import Database
from app.dispatch import Doorbell
from app.graphs.registry import GraphRegistry
from app.graphs.store import ApiStore
from app.services.known_assistants import KnownAssistants
from app.settings import Settings


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
    store: ApiStore

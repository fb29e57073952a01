"""The parts that services work with, joined once by `app.factory`, or by a worker."""

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
class RunParts:
    """What it takes to create and cancel runs; a worker has it too, for its crons."""

    settings: Settings
    graphs: GraphRegistry
    doorbell: Doorbell
    cancel_flags: CancelFlags
    event_log: EventLog
    known_assistants: KnownAssistants


@dataclass(frozen=True, slots=True)
class Parts(RunParts):
    """All of it, in a web process."""

    database: Database
    feed: RunFeed
    store: ApiStore

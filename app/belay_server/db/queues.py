"""Measure the queues from the rows of active runs. The query is in `sql/queues.sql`."""

from __future__ import annotations

from dataclasses import dataclass

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import fetch_all

SQL = load_queries("queues")


@dataclass(frozen=True, slots=True)
class QueueState:
    """The state of one queue. Times are in seconds."""

    #: None: all queues together.
    queue: str | None
    running: int
    pending: int
    #: Pending and not scheduled for later.
    due: int
    #: Due and not blocked by another run of the same thread.
    claimable: int
    oldest_seconds: float
    oldest_claimable_seconds: float
    median_seconds: float


def queue_states(conn: Connection) -> list[QueueState]:
    """Return the state of each queue that has active runs, and of all queues together."""
    return fetch_all(conn, SQL.queue_states, {}, QueueState)

"""How long the queues are, from the rows of active runs. The query is in `sql/queues.sql`."""

from __future__ import annotations

from dataclasses import dataclass

from belay_server.db.connection import Connection, fetch_all
from belay_server.db.queries import load_queries

SQL = load_queries("queues")


@dataclass(frozen=True, slots=True)
class QueueState:
    """One queue; all of them together when it has no name. Times are in seconds."""

    queue: str | None
    running: int
    pending: int
    #: Pending, and not scheduled for later.
    due: int
    #: Due, and not behind another run of the same thread.
    claimable: int
    oldest_seconds: float
    oldest_claimable_seconds: float
    median_seconds: float


def queue_states(conn: Connection) -> list[QueueState]:
    return fetch_all(conn, SQL.queue_states, {}, QueueState)

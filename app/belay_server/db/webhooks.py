"""Read and write webhook calls. Each function runs the query of its name in `sql/webhooks.sql`.

Triggers on `run` queue the calls in the transaction of the run's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import execute, fetch_all

SQL = load_queries("webhooks")


@dataclass(frozen=True, slots=True)
class WebhookCall:
    """A webhook call. `run` is the run's row at its end. `attempts` includes the current one."""

    call_id: UUID
    url: str
    run: dict[str, Any]
    attempts: int


def take_calls(
    conn: Connection, *, limit: int, each: int, host: int, lease_seconds: float
) -> list[WebhookCall]:
    """Take calls that are due, for `lease_seconds`.

    All workers together have at most `each` calls in progress per caller and at most `host` per
    host, so that slow receivers delay neither the calls to others nor those of other callers.
    """
    params = {"limit": limit, "each": each, "host": host, "lease_seconds": lease_seconds}
    return fetch_all(conn, SQL.take_calls, params, WebhookCall)


def delete_call(conn: Connection, call_id: UUID) -> None:
    """Delete a call that succeeded, or failed for the last time."""
    execute(conn, SQL.delete_call, {"call_id": call_id})


def retry_call(conn: Connection, call_id: UUID, *, seconds: float) -> None:
    """Make a call due again in `seconds`, and end its lease."""
    execute(conn, SQL.retry_call, {"call_id": call_id, "seconds": seconds})

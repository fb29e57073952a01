"""Webhook calls in Postgres. Each function runs the query of its own name in `sql/webhooks.sql`.

They are queued by triggers on `run`, in the transaction of its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from belay_server.db.connection import Connection, execute, fetch_all
from belay_server.db.queries import load_queries

SQL = load_queries("webhooks")


@dataclass(frozen=True, slots=True)
class WebhookCall:
    """`run` is the run's row as its end left it; `attempts` counts the one that begins."""

    call_id: UUID
    url: str
    run: dict[str, Any]
    attempts: int


def take_calls(
    conn: Connection, *, limit: int, each: int, lease_seconds: float
) -> list[WebhookCall]:
    """Take calls that are due: of one host and of one caller no more than `each` are under way, by
    all workers together, so that slow receivers hold up nobody else's calls."""
    params = {"limit": limit, "each": each, "lease_seconds": lease_seconds}
    return fetch_all(conn, SQL.take_calls, params, WebhookCall)


def delete_call(conn: Connection, call_id: UUID) -> None:
    execute(conn, SQL.delete_call, {"call_id": call_id})


def retry_call(conn: Connection, call_id: UUID, *, seconds: float) -> None:
    execute(conn, SQL.retry_call, {"call_id": call_id, "seconds": seconds})

"""Delete expired items of LangGraph's store. The library does everything else with the store."""

from __future__ import annotations

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import execute

SQL = load_queries("store")


def delete_expired_items(conn: Connection, *, limit: int) -> int:
    """Delete up to `limit` expired items. Return how many."""
    return execute(conn, SQL.delete_expired_items, {"limit": limit})

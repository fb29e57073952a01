"""Items of LangGraph's store that nobody will read again. All else about them is the library's."""

from __future__ import annotations

from belay_server.db.connection import Connection, execute
from belay_server.db.queries import load_queries

SQL = load_queries("store")


def delete_expired_items(conn: Connection, *, limit: int) -> int:
    """Returns how many."""
    return execute(conn, SQL.delete_expired_items, {"limit": limit})

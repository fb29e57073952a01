"""Assistants in Postgres. Each function runs the query of its own name in `sql/assistants.sql`."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from app.db.connection import Connection, execute, fetch_all, fetch_one, fetch_value
from app.db.queries import load_queries
from app.domain.assistants import Assistant, system_assistant_id

SQL = load_queries("assistants")
SORT_COLUMNS = ("assistant_id", "graph_id", "name", "created_at", "updated_at")


def put_system_assistants(conn: Connection, graph_ids: list[str]) -> None:
    """One assistant per graph, with the id every installation derives from the graph's."""
    for graph_id in graph_ids:
        assistant_id = system_assistant_id(graph_id)
        params = {"assistant_id": assistant_id, "graph_id": graph_id}
        execute(conn, SQL.put_system_assistant, params)
        execute(conn, SQL.put_first_version, {"assistant_id": assistant_id})


def insert_assistant(
    conn: Connection,
    *,
    assistant_id: UUID,
    graph_id: str,
    name: str,
    description: str | None,
    config: dict[str, Any],
    context: dict[str, Any],
    metadata: dict[str, Any],
) -> Assistant | None:
    """None when the id is taken."""
    params = {
        "assistant_id": assistant_id,
        "graph_id": graph_id,
        "name": name,
        "description": description,
        "config": Jsonb(config),
        "context": Jsonb(context),
        "metadata": Jsonb(metadata),
    }
    assistant = fetch_one(conn, SQL.insert_assistant, params, Assistant)
    if assistant is not None:
        execute(conn, SQL.put_first_version, {"assistant_id": assistant_id})
    return assistant


def get_assistant(conn: Connection, assistant_id: UUID) -> Assistant | None:
    return fetch_one(conn, SQL.get_assistant, {"assistant_id": assistant_id}, Assistant)


def delete_assistant(conn: Connection, assistant_id: UUID) -> bool:
    return fetch_value(conn, SQL.delete_assistant, {"assistant_id": assistant_id}) is not None


def search_assistants(
    conn: Connection,
    *,
    graph_id: str | None,
    name: str | None,
    metadata: dict[str, Any],
    sort_by: str,
    sort_order: str,
    limit: int,
    offset: int,
) -> list[Assistant]:
    if sort_by not in SORT_COLUMNS or sort_order not in ("asc", "desc"):
        raise ValueError(f"cannot sort by {sort_by} {sort_order}")
    sql = SQL.search_assistants.format(sort_by=sort_by, sort_order=sort_order)
    params = {
        "graph_id": graph_id,
        "name": name,
        "metadata": Jsonb(metadata),
        "limit": limit,
        "offset": offset,
    }
    return fetch_all(conn, sql, params, Assistant)


def count_assistants(
    conn: Connection, *, graph_id: str | None, name: str | None, metadata: dict[str, Any]
) -> int:
    params = {"graph_id": graph_id, "name": name, "metadata": Jsonb(metadata)}
    return int(fetch_value(conn, SQL.count_assistants, params))

"""Read and write assistants. Each function runs the query of its name in `sql/assistants.sql`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import (
    execute,
    fetch_dicts,
    fetch_one,
    fetch_page,
    fetch_value,
)
from belay_server.domain.assistants import Assistant, AssistantVersion, system_assistant_id

log = logging.getLogger(__name__)

SQL = load_queries("assistants")
SORT_COLUMNS = ("assistant_id", "graph_id", "name", "created_at", "updated_at")


@dataclass(frozen=True, slots=True)
class SystemAssistant:
    """The assistant that the server makes for a graph."""

    graph_id: str
    name: str
    description: str | None = None
    #: The defaults that the project sets for the graph, as an assistant's context.
    context: Mapping[str, Any] = field(default_factory=dict)

    def params(self) -> dict[str, Any]:
        config = {"configurable": dict(self.context)} if self.context else {}
        return {
            "assistant_id": system_assistant_id(self.graph_id),
            "graph_id": self.graph_id,
            "name": self.name,
            "description": self.description,
            "config": Jsonb(config),
            "context": Jsonb(dict(self.context)),
        }


def put_system_assistants(conn: Connection, assistants: Iterable[SystemAssistant]) -> None:
    """Insert the system assistant of each graph. Its id is derived from the graph's id.

    A client may have created an assistant with that id before the graph existed. The server then
    takes it over: otherwise every caller of the graph would run the client's assistant.
    """
    for one in assistants:
        params = one.params()
        assistant_id = params["assistant_id"]
        execute(conn, SQL.own_system_assistant, params)
        version = fetch_value(conn, SQL.put_system_assistant, params)
        if version is not None and version > 1:
            log.warning(
                "assistant %s of graph %s was created by a client; the server replaced it by the "
                "system assistant and kept the client's content as version %d",
                assistant_id,
                one.graph_id,
                version - 1,
            )
        execute(conn, SQL.put_version, {"assistant_id": assistant_id})
        execute(conn, SQL.describe_system_assistant, params)


@dataclass(frozen=True, slots=True)
class AssistantContent:
    """The fields of an assistant that a client may set and a version keeps."""

    graph_id: str
    name: str
    description: str | None
    config: dict[str, Any]
    context: dict[str, Any]
    metadata: dict[str, Any]

    @classmethod
    def of(cls, assistant: Assistant) -> AssistantContent:
        return cls(*(getattr(assistant, field.name) for field in dataclasses.fields(cls)))

    def params(self) -> dict[str, Any]:
        return {
            "graph_id": self.graph_id,
            "name": self.name,
            "description": self.description,
            "config": Jsonb(self.config),
            "context": Jsonb(self.context),
            "metadata": Jsonb(self.metadata),
        }


@dataclass(frozen=True, slots=True)
class AssistantFilter:
    """The conditions of a search or a count. None means any."""

    graph_id: str | None
    name: str | None
    metadata: dict[str, Any]

    def params(self) -> dict[str, Any]:
        return {
            "graph_id": self.graph_id,
            "name": self.name,
            "metadata": Jsonb(self.metadata),
        }


def insert_assistant(
    conn: Connection, assistant_id: UUID, content: AssistantContent
) -> Assistant | None:
    """Insert an assistant. Return None if the id is taken."""
    params = {"assistant_id": assistant_id, **content.params()}
    return _with_version(conn, fetch_one(conn, SQL.insert_assistant, params, Assistant))


def update_assistant(conn: Connection, assistant_id: UUID, content: AssistantContent) -> Assistant:
    """Replace an assistant's content and give it a new version. The caller has locked the row."""
    params = {"assistant_id": assistant_id, **content.params()}
    updated = _with_version(conn, fetch_one(conn, SQL.update_assistant, params, Assistant))
    assert updated is not None
    return updated


def _with_version(conn: Connection, assistant: Assistant | None) -> Assistant | None:
    if assistant is not None:
        execute(conn, SQL.put_version, {"assistant_id": assistant.assistant_id})
    return assistant


def drop_old_versions(conn: Connection, assistant: Assistant, *, most_bytes: int) -> None:
    """Delete the oldest versions of an assistant beyond `most_bytes`, never its current one."""
    params = {
        "assistant_id": assistant.assistant_id,
        "current": assistant.version,
        "most_bytes": most_bytes,
    }
    execute(conn, SQL.drop_old_versions, params)


def set_latest_version(conn: Connection, assistant_id: UUID, version: int) -> Assistant | None:
    """Restore an assistant's fields from a version. Return None if there is no such version."""
    params = {"assistant_id": assistant_id, "version": version}
    return fetch_one(conn, SQL.set_latest_version, params, Assistant)


def assistant_versions(
    conn: Connection, assistant_id: UUID, *, metadata: dict[str, Any], limit: int, offset: int
) -> list[AssistantVersion]:
    """Return a page of an assistant's versions, newest first."""
    params = {
        "assistant_id": assistant_id,
        "metadata": Jsonb(metadata),
        "limit": limit,
        "offset": offset,
    }
    return fetch_page(conn, SQL.assistant_versions, params, AssistantVersion)


def lock_assistant(conn: Connection, assistant_id: UUID) -> Assistant | None:
    """Lock and return an assistant. Return None if there is none that the caller may change."""
    return fetch_one(conn, SQL.lock_assistant, {"assistant_id": assistant_id}, Assistant)


def threads_of_assistant(conn: Connection, assistant_id: UUID, *, limit: int) -> list[UUID]:
    """Return the ids of threads whose last run was this assistant's."""
    params = {"assistant_id": str(assistant_id), "limit": limit}
    return [row["thread_id"] for row in fetch_dicts(conn, SQL.threads_of_assistant, params)]


def get_assistant(conn: Connection, assistant_id: UUID) -> Assistant | None:
    """Return an assistant; None if there is none that the caller may read."""
    return fetch_one(conn, SQL.get_assistant, {"assistant_id": assistant_id}, Assistant)


def keep_assistant(conn: Connection, assistant: Assistant) -> bool:
    """Prevent the deletion of an assistant until the transaction ends. Return whether it exists.
    System assistants cannot be deleted, so they are not locked."""
    params = {"assistant_id": assistant.assistant_id}
    return assistant.is_system or fetch_value(conn, SQL.keep_assistant, params) is not None


def delete_assistant(conn: Connection, assistant_id: UUID) -> bool:
    """Delete an assistant. Return False if there is none that the caller may change."""
    return fetch_value(conn, SQL.delete_assistant, {"assistant_id": assistant_id}) is not None


def search_assistants(
    conn: Connection,
    filter_: AssistantFilter,
    *,
    sort_by: str,
    sort_order: str,
    limit: int,
    offset: int,
) -> list[Assistant]:
    """Return a page of assistants. Raises ValueError for an unknown column or order."""
    if sort_by not in SORT_COLUMNS or sort_order not in ("asc", "desc"):
        raise ValueError(f"cannot sort by {sort_by} {sort_order}")
    sql = SQL.search_assistants.format(sort_by=sort_by, sort_order=sort_order)
    params = filter_.params() | {"limit": limit, "offset": offset}
    return fetch_page(conn, sql, params, Assistant)


def count_assistants(conn: Connection, filter_: AssistantFilter) -> int:
    """Return how many assistants match the filter, of those that the caller may read."""
    return int(fetch_value(conn, SQL.count_assistants, filter_.params()))

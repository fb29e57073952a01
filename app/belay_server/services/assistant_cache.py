"""Resolve the assistant that a run names, by its id or by a graph's name.

A web process caches assistants, so that most creates need no query for them.
"""

from __future__ import annotations

from uuid import UUID

from belay_server.db import assistants as assistant_rows
from belay_server.db.postgres.connection import Connection
from belay_server.domain.assistants import Assistant, system_assistant_id
from belay_server.domain.errors import InvalidRequest, NotFound
from belay_server.domain.ids import parse_uuid
from belay_server.graphs.registry import GraphRegistry


class AssistantCache:
    """A cache of assistants, by the id or graph name that runs use.

    An entry may be stale. The SQL statement that relies on an entry must also check that the row's
    `updated_at` is unchanged.
    """

    _MOST = 1_000

    def __init__(self) -> None:
        self._known: dict[str, Assistant] = {}

    def get(self, named: str) -> Assistant | None:
        return self._known.get(named)

    def keep(self, named: str, assistant: Assistant) -> None:
        if len(self._known) >= self._MOST:
            self._known.clear()
        self._known[named] = assistant


def resolve_assistant(conn: Connection, graphs: GraphRegistry, named: str) -> Assistant:
    """Return the assistant with this id, or the system assistant of the graph with this name.

    Raises NotFound; InvalidRequest for what is neither a UUID nor a graph's name.
    """
    if named in graphs:
        assistant = assistant_rows.get_assistant(conn, system_assistant_id(named))
    else:
        assistant = assistant_rows.get_assistant(conn, _uuid_or_refuse(named, graphs))
    if assistant is None or assistant.graph_id not in graphs:
        raise NotFound("Thread or assistant not found.")
    return assistant


def _uuid_or_refuse(named: str, graphs: GraphRegistry) -> UUID:
    try:
        return parse_uuid(named)
    except ValueError:
        known = ", ".join(sorted(graphs.project.graphs))
        raise InvalidRequest(
            f"Invalid assistant: '{named}'. Must be either:\n- A valid assistant UUID, or\n"
            f"- One of the registered graphs: {known}"
        ) from None

"""Assistants: creating them, and finding the one a run names by id or by graph."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from app.db import assistants as assistant_rows
from app.db.connection import Connection
from app.db.runs import CancelFilter
from app.domain.assistants import Assistant, system_assistant_id
from app.domain.errors import BadRequest, Conflict, InvalidRequest, NotFound
from app.domain.ids import parse_uuid
from app.graphs.registry import GraphRegistry
from app.services.cancellation import stop_runs
from app.services.parts import Parts


def create_assistant(parts: Parts, body: dict[str, Any]) -> Assistant:
    """Raises NotFound for an unknown graph, Conflict for a taken id."""
    graph_id = body["graph_id"]
    if graph_id not in parts.graphs:
        known = sorted(parts.graphs.project.graphs)
        raise NotFound(f"Graph '{graph_id}' not found. Expected one of: {known}")
    config, context = dict(body.get("config") or {}), dict(body.get("context") or {})
    if context and config.get("configurable"):
        raise BadRequest("Cannot specify both configurable and context. Use only one.")
    if config.get("configurable"):
        context = dict(config["configurable"])
    elif context:
        config["configurable"] = context
    assistant_id = body.get("assistant_id") or uuid4()

    def create(conn: Connection) -> Assistant:
        created = assistant_rows.insert_assistant(
            conn,
            assistant_id=assistant_id,
            graph_id=graph_id,
            name=body.get("name") or "Untitled",
            description=body.get("description"),
            config=config,
            context=context,
            metadata=body.get("metadata") or {},
        )
        if created is not None:
            return created
        if body.get("if_exists") != "do_nothing":
            raise Conflict(f"Assistant {assistant_id} already exists")
        return get_assistant(conn, assistant_id)

    return parts.database.transaction(create)


def delete_assistant(parts: Parts, assistant_id: UUID) -> None:
    """Stop the assistant's runs, then delete it. A graph's own assistant stays with its graph."""
    if assistant_id in {system_assistant_id(graph_id) for graph_id in parts.graphs.project.graphs}:
        raise Conflict("The assistant of a graph of this project cannot be deleted")
    message = "interrupt requested via DELETE /assistants/{assistant_id}"
    reason = {"error": "UserInterrupt", "message": message}
    with parts.database.connection() as conn:
        deleted = assistant_rows.delete_assistant(conn, assistant_id)
    if not deleted:
        raise NotFound(f"Assistant with ID {assistant_id} not found")
    # No new run can name it now; what it has in flight is stopped before we answer.
    stop_runs(parts, CancelFilter(assistant_id=assistant_id), reason)


def get_assistant(conn: Connection, assistant_id: UUID) -> Assistant:
    assistant = assistant_rows.get_assistant(conn, assistant_id)
    if assistant is None:
        raise NotFound()
    return assistant


def resolve_assistant(conn: Connection, graphs: GraphRegistry, named: str) -> Assistant:
    """The assistant with this id, or the system assistant of the graph with this name."""
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

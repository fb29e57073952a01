"""Assistants: creating and changing them, their versions, and what their graphs look like."""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import UUID, uuid4

from belay_server.db import assistants as assistant_rows
from belay_server.db.assistants import AssistantContent
from belay_server.db.connection import Connection
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.assistants import Assistant, AssistantVersion, system_assistant_id
from belay_server.domain.errors import BadRequest, Conflict, NotFound
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.registry import Graph
from belay_server.services.assistant_cache import resolve_assistant
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import stop_runs
from belay_server.services.size_limits import refuse_large
from belay_server.services.threads.records import delete_thread

_BATCH = 100


def create_assistant(parts: Parts, body: dict[str, Any]) -> Assistant:
    """Raises NotFound for an unknown graph, Conflict for a taken id."""
    _refuse_unknown_graph(parts, body["graph_id"])
    config, context = _mirrored(body, {}, {})
    assistant_id = body.get("assistant_id") or uuid4()
    content = AssistantContent(
        graph_id=body["graph_id"],
        name=body.get("name") or "Untitled",
        description=body.get("description"),
        config=config,
        context=context,
        metadata=body.get("metadata") or {},
    )
    _refuse_large(parts, content)

    def create(conn: Connection) -> Assistant:
        created = assistant_rows.insert_assistant(conn, assistant_id, content)
        if created is not None:
            return created
        takes_it = body.get("if_exists") == "do_nothing"
        existing = assistant_rows.get_assistant(conn, assistant_id) if takes_it else None
        if existing is None:  # also one that is there, and not to be seen by whoever asks
            raise Conflict(f"Assistant {assistant_id} already exists")
        return existing

    return parts.database.transaction(create)


def _refuse_large(parts: Parts, content: AssistantContent) -> None:
    """Raises TooLarge."""
    refuse_large(
        parts.settings.max_metadata_bytes,
        "BELAY_MAX_METADATA_BYTES",
        config=content.config,
        context=content.context,
        metadata=content.metadata,
    )


def _refuse_unknown_graph(parts: Parts, graph_id: str) -> None:
    if graph_id not in parts.graphs:
        known = sorted(parts.graphs.project.graphs)
        raise NotFound(f"Graph '{graph_id}' not found. Expected one of: {known}")


def _mirrored(
    body: dict[str, Any], config: dict[str, Any], context: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and context after a body: `config.configurable` and `context` are always the same."""
    asked_config, asked_context = body.get("config"), body.get("context")
    if asked_context and (asked_config or {}).get("configurable"):
        raise BadRequest("Cannot specify both configurable and context. Use only one.")
    if asked_config is not None:
        config = dict(asked_config)
        if asked_context is None:
            context = dict(config.get("configurable") or {})
    if asked_context is not None:
        context = dict(asked_context)
    config = {key: value for key, value in config.items() if key != "configurable"}
    return ({**config, "configurable": context} if context else config), context


def patch_assistant(parts: Parts, assistant_id: UUID, body: dict[str, Any]) -> Assistant:
    """Metadata is merged, what else is given is replaced. A new version only if that changes
    anything. Raises NotFound (assistant or graph)."""
    if body.get("graph_id") is not None:
        _refuse_unknown_graph(parts, body["graph_id"])

    def patch(conn: Connection) -> Assistant:
        current = assistant_rows.lock_assistant(conn, assistant_id)
        if current is None:
            raise NotFound(f"Assistant {assistant_id} not found")
        before = AssistantContent.of(current)
        config, context = _mirrored(body, current.config, current.context)
        given = {name: body[name] for name in ("graph_id", "name", "description") if body.get(name)}
        after = dataclasses.replace(
            before,
            config=config,
            context=context,
            metadata={**current.metadata, **(body.get("metadata") or {})},
            **given,
        )
        if after == before:
            return current
        _refuse_large(parts, after)
        return assistant_rows.update_assistant(conn, assistant_id, after) or current

    return parts.database.transaction(patch)


def list_versions(
    parts: Parts, assistant_id: UUID, *, metadata: dict[str, Any], limit: int, offset: int
) -> list[AssistantVersion]:
    """Newest first. Raises NotFound."""
    with parts.database.connection() as conn:
        if assistant_rows.get_assistant(conn, assistant_id) is None:
            raise NotFound(f"Assistant {assistant_id} not found")
        return assistant_rows.assistant_versions(
            conn, assistant_id, metadata=metadata, limit=limit, offset=offset
        )


def set_latest(parts: Parts, assistant_id: UUID, version: int) -> Assistant:
    """Make an older version the one that runs use: all of it, config and context too."""
    with parts.database.connection() as conn:
        assistant = assistant_rows.set_latest_version(conn, assistant_id, version)
        if assistant is not None:
            return assistant
        if assistant_rows.get_assistant(conn, assistant_id) is None:
            raise NotFound(f"Assistant {assistant_id} not found")
    raise NotFound(f"Version {version} not found for assistant {assistant_id}")


def delete_assistant(parts: Parts, assistant_id: UUID, *, delete_threads: bool = False) -> None:
    """Stop the assistant's runs, then delete it; with `delete_threads` the threads whose last run
    was its own, too. A graph's own assistant stays with its graph."""
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
    while delete_threads and (thread_ids := _threads_of(parts, assistant_id)):
        for thread_id in thread_ids:
            _delete_thread_if_there(parts, thread_id)


def _threads_of(parts: Parts, assistant_id: UUID) -> list[UUID]:
    with parts.database.connection() as conn:
        return assistant_rows.threads_of_assistant(conn, assistant_id, limit=_BATCH)


def _delete_thread_if_there(parts: Parts, thread_id: UUID) -> None:
    try:
        delete_thread(parts, thread_id)
    except NotFound:
        return  # somebody else has deleted it: that is all that was wanted


def get_assistant(conn: Connection, assistant_id: UUID) -> Assistant:
    assistant = assistant_rows.get_assistant(conn, assistant_id)
    if assistant is None:
        raise NotFound()
    return assistant


def graph_of(parts: Parts, named: str) -> tuple[str, Graph]:
    """The graph, and its id, of the assistant with this id, or with this name. Raises NotFound,
    InvalidRequest, BadRequest (a factory of graphs that fails)."""
    with parts.database.connection() as conn:
        assistant = resolve_assistant(conn, parts.graphs, named)
    try:
        graph = parts.graphs.read(assistant.graph_id, {"configurable": {}, **assistant.config})
    except ProjectError as error:
        raise BadRequest(str(error)) from error
    except Exception as error:
        kind = type(error).__name__
        raise BadRequest(f"Graph '{assistant.graph_id}' cannot be made: {kind}: {error}") from error
    return assistant.graph_id, graph

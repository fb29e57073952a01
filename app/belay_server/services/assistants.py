"""Create, change and delete assistants; manage their versions; load their graphs."""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import UUID, uuid4

from belay_server.configuration.settings import Settings
from belay_server.db import assistants as assistant_rows
from belay_server.db import crons as cron_rows
from belay_server.db.assistants import AssistantContent
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.pool import Database
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.assistants import Assistant, AssistantVersion, system_assistant_id
from belay_server.domain.errors import BadRequest, Conflict, NotFound, OutOfReach
from belay_server.graphs.project.factories import GraphUse
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.project.raised import is_of_project
from belay_server.graphs.registry import Graph, GraphRegistry
from belay_server.graphs.store import factory_store
from belay_server.services.assistant_cache import resolve_assistant
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import stop_runs
from belay_server.services.size_limits import refuse_large, refuse_many_keys
from belay_server.services.threads.records import delete_thread

_BATCH = 100


def create_assistant(parts: Parts, body: dict[str, Any]) -> Assistant:
    """Create an assistant. With `if_exists: do_nothing`, return the existing one with this id.

    Raises NotFound for an unknown graph, Conflict for an id that is already in use, TooLarge,
    OutOfReach.
    """
    _refuse_unknown_graph(parts.graphs, body["graph_id"])
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
    _refuse_large(parts.settings, content)

    def create(conn: Connection) -> Assistant:
        created = assistant_rows.insert_assistant(conn, assistant_id, content)
        if created is not None:
            return _within_reach(conn, created)
        may_exist = body.get("if_exists") == "do_nothing"
        existing = assistant_rows.get_assistant(conn, assistant_id) if may_exist else None
        if existing is None:  # also when it exists and the caller may not see it
            raise Conflict(f"Assistant {assistant_id} already exists")
        return existing

    return parts.database.transaction(create)


def _within_reach(conn: Connection, assistant: Assistant) -> Assistant:
    """Return an assistant that was just written; raise OutOfReach if the caller's filter does not
    match it, which rolls the change back. Otherwise a caller could give it to another one."""
    if assistant_rows.lock_assistant(conn, assistant.assistant_id) is None:
        raise OutOfReach("assistant")
    return assistant


def _refuse_large(settings: Settings, content: AssistantContent) -> None:
    """Raise TooLarge when the config, context or metadata exceed BELAY_MAX_METADATA_BYTES or have
    too many keys."""
    refuse_many_keys(config=content.config, context=content.context, metadata=content.metadata)
    refuse_large(
        settings.max_metadata_bytes,
        "BELAY_MAX_METADATA_BYTES",
        config=content.config,
        context=content.context,
        metadata=content.metadata,
    )


def _refuse_unknown_graph(graphs: GraphRegistry, graph_id: str) -> None:
    if graph_id not in graphs:
        known = sorted(graphs.project.graphs)
        raise NotFound(f"Graph '{graph_id}' not found. Expected one of: {known}")


def _mirrored(
    body: dict[str, Any], config: dict[str, Any], context: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and context that a request body results in. `config.configurable` and
    `context` are always equal. Raises BadRequest when the body sets both."""
    new_config, new_context = body.get("config"), body.get("context")
    if new_context and (new_config or {}).get("configurable"):
        raise BadRequest("Cannot specify both configurable and context. Use only one.")
    if new_config is not None:
        config = dict(new_config)
        if new_context is None:
            context = dict(config.get("configurable") or {})
    if new_context is not None:
        context = dict(new_context)
    config = {key: value for key, value in config.items() if key != "configurable"}
    return ({**config, "configurable": context} if context else config), context


def patch_assistant(parts: Parts, assistant_id: UUID, body: dict[str, Any]) -> Assistant:
    """Change an assistant: merge its metadata, and replace the other fields that are given. Create
    a new version, even if nothing changes, and delete the oldest versions beyond
    BELAY_MAX_VERSIONS_BYTES.

    Raises NotFound (assistant or graph), BadRequest, TooLarge, OutOfReach.
    """
    if body.get("graph_id") is not None:
        _refuse_unknown_graph(parts.graphs, body["graph_id"])

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
        _refuse_large(parts.settings, after)
        changed = _within_reach(conn, assistant_rows.update_assistant(conn, assistant_id, after))
        most = parts.settings.max_versions_bytes
        assistant_rows.drop_old_versions(conn, changed, most_bytes=most)
        return changed

    return parts.database.transaction(patch)


def list_versions(
    database: Database, assistant_id: UUID, *, metadata: dict[str, Any], limit: int, offset: int
) -> list[AssistantVersion]:
    """Return a page of the assistant's versions, newest first. Raises NotFound."""
    with database.connection() as conn:
        if assistant_rows.get_assistant(conn, assistant_id) is None:
            raise NotFound(f"Assistant {assistant_id} not found")
        return assistant_rows.assistant_versions(
            conn, assistant_id, metadata=metadata, limit=limit, offset=offset
        )


def set_latest(database: Database, assistant_id: UUID, version: int) -> Assistant:
    """Make a version the latest: runs use its config, its context and all its other fields.

    Raises NotFound (assistant or version), OutOfReach.
    """

    def set_version(conn: Connection) -> Assistant:
        assistant = assistant_rows.set_latest_version(conn, assistant_id, version)
        if assistant is not None:
            return _within_reach(conn, assistant)
        if assistant_rows.get_assistant(conn, assistant_id) is None:
            raise NotFound(f"Assistant {assistant_id} not found")
        raise NotFound(f"Version {version} not found for assistant {assistant_id}")

    return database.transaction(set_version)


def delete_assistant(parts: Parts, assistant_id: UUID, *, delete_threads: bool = False) -> None:
    """Delete an assistant with the user's crons of it, then cancel its active runs and wait until
    they have ended. Crons of other users are disabled. With `delete_threads`, also delete the
    threads whose last run was the assistant's.

    Raises NotFound; Conflict for the system assistant of a graph.
    """
    if assistant_id in {system_assistant_id(graph_id) for graph_id in parts.graphs.project.graphs}:
        raise Conflict("The assistant of a graph of this project cannot be deleted")
    message = "interrupt requested via DELETE /assistants/{assistant_id}"
    reason = {"error": "UserInterrupt", "message": message}

    def delete(conn: Connection) -> None:
        if not assistant_rows.delete_assistant(conn, assistant_id):
            raise NotFound(f"Assistant with ID {assistant_id} not found")
        cron_rows.end_crons_of_assistant(
            conn, assistant_id, user=parts.identity, reason="Its assistant was deleted."
        )

    parts.database.transaction(delete)
    # No new run can use it now. Its active runs are stopped before this function returns.
    stop_runs(parts, CancelFilter(assistant_id=assistant_id), reason)
    while delete_threads and (thread_ids := _threads_of(parts.database, assistant_id)):
        for thread_id in thread_ids:
            _delete_thread_if_there(parts, thread_id)


def _threads_of(database: Database, assistant_id: UUID) -> list[UUID]:
    with database.connection() as conn:
        return assistant_rows.threads_of_assistant(conn, assistant_id, limit=_BATCH)


def _delete_thread_if_there(parts: Parts, thread_id: UUID) -> None:
    try:
        delete_thread(parts, thread_id)
    except NotFound:
        return  # another request has deleted it


def get_assistant(conn: Connection, assistant_id: UUID) -> Assistant:
    """Return an assistant. Raises NotFound."""
    assistant = assistant_rows.get_assistant(conn, assistant_id)
    if assistant is None:
        raise NotFound()
    return assistant


def graph_of(parts: Parts, named: str) -> tuple[str, Graph]:
    """Return the graph id and the graph of the assistant with this id, or of the graph with this
    name.

    Raises NotFound, InvalidRequest; BadRequest when the project's graph factory fails.
    """
    with parts.database.connection() as conn:
        assistant = resolve_assistant(conn, parts.graphs, named)
    try:
        use = GraphUse(
            "assistants.read",
            {"configurable": {}, **assistant.config},
            store=lambda: factory_store(parts.settings, parts.graphs),
            user=parts.user,
        )
        graph = parts.graphs.read(assistant.graph_id, use)
    except ProjectError as error:
        raise BadRequest(str(error)) from error
    except BaseException as error:
        if not is_of_project(error):
            raise
        kind = type(error).__name__
        raise BadRequest(f"Graph '{assistant.graph_id}' cannot be made: {kind}: {error}") from error
    return assistant.graph_id, graph

"""Threads: their records, and their states read and written through their graph."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from uuid import UUID

import orjson

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import STATE_UPDATE
from belay_server.db import run_cancels as cancel_rows
from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.connection import Connection
from belay_server.db.run_cancels import CancelFilter
from belay_server.db.threads import DeletedThread, ThreadFilter, ThreadStorage
from belay_server.domain.errors import BadRequest, Conflict, NotFound, StateTooLarge
from belay_server.domain.runs import CancelAction, user_cancel_reason
from belay_server.domain.threads import Thread, ThreadStatus, ThreadTtl, TtlStrategy
from belay_server.graphs import thread_state
from belay_server.graphs.checkpoints.thread_saver import LargeState, ThreadSaver
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.serde import to_json
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import announcer, stop_runs
from belay_server.services.runs.chosen_ids import drop_old_log
from belay_server.services.runs.creation import new_id
from belay_server.services.size_limits import refuse_large
from belay_server.services.threads.pruning import keep_latest
from belay_server.states import jobs as state_jobs
from belay_server.states.jobs import HistoryPage, ThreadGraph, with_fragments

log = logging.getLogger(__name__)

_AnyThread = TypeVar("_AnyThread", Thread, Thread | None)


def create_thread(parts: Parts, body: dict[str, Any]) -> Thread:
    """Raises Conflict when the id is taken and `if_exists` is not `do_nothing`; BadRequest for
    `supersteps` that its graph does not take, and then there is no thread."""
    thread_id = body.get("thread_id") or new_id()
    metadata = dict(body.get("metadata") or {})
    if body.get("graph_id"):
        metadata["graph_id"] = body["graph_id"]
    ttl = body.get("ttl") or parts.graphs.project.thread_ttl
    supersteps = body.get("supersteps") or []
    if supersteps and str(metadata.get("graph_id")) not in parts.graphs:
        raise BadRequest("supersteps: metadata.graph_id must name the graph they are of")

    def create(conn: Connection) -> tuple[Thread, bool]:
        created = thread_rows.insert_thread(conn, thread_id, metadata, ttl)
        takes_it = created or body.get("if_exists") == "do_nothing"
        thread = thread_rows.get_thread(conn, thread_id, with_values=True) if takes_it else None
        if created:
            _refuse_large(parts, thread)
            if "thread_id" in body:
                drop_old_log(parts.event_log, thread_id)
        if thread is None:  # also one that is there, and not to be seen by whoever asks
            raise Conflict(f"Thread with ID {thread_id} already exists")
        return thread, created

    thread, created = parts.database.transaction(create)
    if not created or not supersteps:
        return thread
    return _with_supersteps(parts, thread, supersteps)


def _refuse_large(parts: Parts, thread: _AnyThread) -> _AnyThread:
    """Metadata is merged, so what it has become is looked at. Raises TooLarge, which undoes it."""
    if thread is not None:
        limit = parts.settings.max_metadata_bytes
        refuse_large(limit, "BELAY_MAX_METADATA_BYTES", metadata=thread.metadata)
    return thread


def _with_supersteps(parts: Parts, thread: Thread, supersteps: list[dict[str, Any]]) -> Thread:
    """The new thread with the states that another one had, as another server may export them."""
    with parts.database.connection() as conn:
        its_graph = _graph_of(parts, conn, thread)
    updates = [[thread_state.state_update(u) for u in step["updates"]] for step in supersteps]
    config = thread_state.thread_config(str(thread.thread_id))
    graph = its_graph.load(parts.states.here)
    saver = ThreadSaver(parts.database.pool, most_stored_bytes=parts.settings.max_answer_bytes)
    try:
        thread_state.write_state(graph, saver, config, updates)
    except thread_state.StateRefused as error:
        delete_thread(parts, thread.thread_id)
        raise BadRequest(f"supersteps: {error}") from error
    except LargeState as error:
        delete_thread(parts, thread.thread_id)
        raise BadRequest(
            f"supersteps: the states have {error} together (BELAY_MAX_ANSWER_BYTES)"
        ) from error
    _rest(parts, its_graph, keep_error=False)
    with parts.database.connection() as conn:
        return _found(conn, thread.thread_id, with_values=True)


def get_thread(parts: Parts, thread_id: UUID, *, with_values: bool = False) -> Thread:
    """Return a thread; its values, which may be large, only if they are asked for.

    Raises NotFound.
    """
    with parts.database.connection() as conn:
        thread = _found(conn, thread_id, with_values=with_values)
    return _settled(parts, thread, with_values=with_values)


def _found(conn: Connection, thread_id: UUID, *, with_values: bool = False) -> Thread:
    thread = thread_rows.get_thread(conn, thread_id, with_values=with_values)
    if thread is None:
        raise NotFound(f"Thread with ID {thread_id} not found")
    return thread


def patch_thread(
    parts: Parts, thread_id: UUID, metadata: dict[str, Any], ttl: ThreadTtl | None
) -> Thread:
    def patch(conn: Connection) -> Thread:
        if not thread_rows.patch_thread(conn, thread_id, metadata, ttl):
            raise NotFound()
        return _refuse_large(parts, _found(conn, thread_id, with_values=True))

    return parts.database.transaction(patch)


def delete_thread(
    parts: Parts, thread_id: UUID, *, route: str = "DELETE /threads/{thread_id}"
) -> None:
    """Stop what runs on it, then delete it with all its runs and checkpoints."""
    reason = user_cancel_reason(CancelAction.INTERRUPT, route)

    def delete_if_idle(conn: Connection) -> DeletedThread | None:
        if not thread_rows.lock_thread(conn, thread_id):
            raise NotFound(f"Thread with ID {thread_id} not found")
        if cancel_rows.active_runs_of_thread(conn, thread_id):
            return None
        return thread_rows.delete_thread(conn, thread_id)

    while (deleted := parts.database.transaction(delete_if_idle)) is None:
        stop_runs(parts, CancelFilter(thread_id=thread_id), reason)
    announcer(parts).announce_deleted_threads([deleted])


def copy_thread(parts: Parts, thread_id: UUID, metadata: dict[str, Any]) -> Thread:
    """A new thread with the same state and history, and this in its metadata. Raises NotFound."""
    copy_id = new_id()

    def copy(conn: Connection) -> Thread:
        # The row and the checkpoints are of one moment, whatever runs on the thread meanwhile.
        thread_rows.repeatable_read(conn)
        if not thread_rows.copy_thread(conn, thread_id, copy_id, metadata):
            raise NotFound(f"Thread with ID {thread_id} not found")
        return _refuse_large(parts, _found(conn, copy_id, with_values=True))

    return _settled(parts, parts.database.transaction(copy), with_values=True)


def prune_threads(parts: Parts, thread_ids: list[UUID], strategy: TtlStrategy) -> int:
    """Delete threads, or all but their latest state; returns how many. Unknown ones do not count,
    nor do busy ones that were to keep their latest state. Raises BadRequest for a thread whose
    state cannot do without its history."""
    pruned = 0
    for thread_id in dict.fromkeys(thread_ids):
        if strategy is TtlStrategy.KEEP_LATEST:
            with parts.database.connection() as conn:
                pruned += keep_latest(conn, thread_id)
            continue
        with suppress(NotFound):
            delete_thread(parts, thread_id)
            pruned += 1
    return pruned


def get_storage(parts: Parts, thread_id: UUID) -> ThreadStorage:
    """Raises NotFound."""
    with parts.database.connection() as conn:
        _found(conn, thread_id)
        return thread_rows.thread_storage(conn, thread_id)


def _tell_followers(parts: Parts, thread_id: UUID, name: str, data: Any) -> None:
    """For those who follow the thread; it has happened, whether they hear of it or not."""
    try:
        parts.event_log.append_to_thread(thread_id, name, to_json(data))
    except RedisError as error:
        log.warning("followers of thread %s not told: %s", thread_id, error)


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a search, and how many there are in all."""

    items: list[Any]
    total: int


def search_threads(
    parts: Parts,
    filter_: ThreadFilter,
    *,
    sort_by: str,
    sort_order: str,
    limit: int,
    offset: int,
    with_values: bool,
) -> Page:
    if filter_.values is not None:
        _read_unknown_values(parts, filter_)

    def search(conn: Connection) -> tuple[list[Thread], int]:
        found = thread_rows.search_threads(
            conn,
            filter_,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
            with_values=with_values,
        )
        return found, thread_rows.count_threads(conn, filter_)

    threads, total = parts.database.transaction(search)
    return Page([_settled(parts, one, with_values=with_values) for one in threads], total)


def extracts_of(parts: Parts, thread: Thread, paths: dict[str, str]) -> dict[str, Any]:
    """Return what is at paths into a thread, by name. Raises TooMany, StateTooLarge."""
    encoded = {name: getattr(thread, name) or "null" for name in ("values", "interrupts")}
    documents = {"config": thread.config, "metadata": thread.metadata}
    large = sum(map(len, encoded.values())) > parts.settings.large_state_bytes
    run = parts.states.run_aside if large else parts.states.run
    return cast(
        "dict[str, Any]",
        with_fragments(run(state_jobs.extracts, documents, encoded, paths)),
    )


def count_threads(parts: Parts, filter_: ThreadFilter) -> int:
    if filter_.values is not None:
        _read_unknown_values(parts, filter_)
    with parts.database.connection() as conn:
        return thread_rows.count_threads(conn, filter_)


def _read_unknown_values(parts: Parts, filter_: ThreadFilter) -> None:
    """A search by values must not miss, or find, threads whose values nobody has read yet."""
    unfiltered = dataclasses.replace(filter_, values=None, status=None)
    with parts.database.connection() as conn:
        threads = thread_rows.threads_with_unknown_values(conn, unfiltered)
    for thread in threads:
        _settled(parts, thread, with_values=False)


def _settled(parts: Parts, thread: Thread, *, with_values: bool) -> Thread:
    """After a run was killed nobody has read the thread's values yet: read them now, and keep."""
    if thread.values_known or thread.status == ThreadStatus.BUSY:
        return thread
    try:
        with parts.database.connection() as conn:
            graph = _graph_of(parts, conn, thread)
        _rest(parts, graph, keep_error=True)
    except (BadRequest, ProjectError) as error:
        log.warning("values of thread %s not read: %s", thread.thread_id, error)
        return thread
    with parts.database.connection() as conn:
        return _found(conn, thread.thread_id, with_values=with_values)


def _rest(parts: Parts, thread: ThreadGraph, *, keep_error: bool) -> None:
    """Set the thread's row to what its newest checkpoint says."""
    try:
        parts.states.run(state_jobs.rest, thread, keep_error=keep_error)
    except StateTooLarge as error:
        log.warning("values of thread %s not read: %s", thread.thread_id, error)
        state_jobs.rest_unread(parts.states.here, thread.thread_id, keep_error=keep_error)


def _graph_of(parts: Parts, conn: Connection, thread: Thread) -> ThreadGraph:
    """The graph of the thread's last run. Raises BadRequest when it has none."""
    graph_id = thread.metadata.get("graph_id")
    if not isinstance(graph_id, str) or graph_id not in parts.graphs:
        graph_id = run_rows.oldest_active_graph_id(conn, thread.thread_id)
    if graph_id is None or graph_id not in parts.graphs:
        raise BadRequest(
            f"Thread '{thread.thread_id}' has no assigned graph ID. This usually occurs when no "
            "runs have been made on this particular thread. This operation requires a graph ID. "
            "Please ensure a run has been made for the thread or manually update the thread "
            "metadata (by setting the 'graph_id' field) before running this operation."
        )
    return ThreadGraph(thread.thread_id, graph_id, thread.config)


def get_state(
    parts: Parts,
    thread_id: UUID,
    checkpoint: dict[str, Any] | None,
    fields: list[str] | None,
    *,
    subgraphs: bool,
) -> bytes:
    """Return the JSON of the newest state, or of the one at `checkpoint`: its `fields`, None for
    all. Raises NotFound for an unknown thread or checkpoint, TooMuch, StateTooLarge."""
    with parts.database.connection() as conn:
        thread = _found(conn, thread_id)
        try:
            graph = _graph_of(parts, conn, thread)
        except BadRequest:
            return to_json(thread_state.selected(thread_state.EMPTY_STATE, fields))
    return parts.states.run(state_jobs.read_state, graph, checkpoint, fields, subgraphs=subgraphs)


def get_history(parts: Parts, thread_id: UUID, page: HistoryPage) -> bytes:
    """Return a JSON list of states, newest first. Raises NotFound for an unknown thread, TooMuch,
    StateTooLarge."""
    with parts.database.connection() as conn:
        thread = _found(conn, thread_id)
        try:
            graph = _graph_of(parts, conn, thread)
        except BadRequest:
            return b"[]"
    return parts.states.run(state_jobs.read_history, graph, page)


def update_state(parts: Parts, thread_id: UUID, body: dict[str, Any]) -> dict[str, Any]:
    """Write a state as a node would. Raises Conflict while runs are in flight, and BadRequest
    for what the graph refuses; then nothing is written."""
    with parts.database.connection() as conn:
        thread = _found(conn, thread_id)
        if thread.status == ThreadStatus.BUSY:
            raise Conflict(f"Thread {thread_id} has in-flight runs. Wait for them or cancel them.")
        graph = _graph_of(parts, conn, thread)
    checkpoint = dict(body.get("checkpoint") or {})
    if body.get("checkpoint_id"):
        checkpoint["checkpoint_id"] = str(body["checkpoint_id"])
    written = parts.states.run(state_jobs.update_state, graph, checkpoint, body)
    saved = written.configurable
    if written.state is not None:
        _tell_followers(parts, thread_id, STATE_UPDATE, {"state": orjson.Fragment(written.state)})
    address = {key: saved.get(key) for key in ("thread_id", "checkpoint_ns", "checkpoint_id")}
    if saved.get("checkpoint_map"):
        # A subgraph's checkpoint: only with the map a run goes on from there.
        address["checkpoint_map"] = saved["checkpoint_map"]
    return {
        "checkpoint": address,
        "configurable": address,
        "checkpoint_id": address["checkpoint_id"],
    }

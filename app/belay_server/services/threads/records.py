"""Create, read, change and delete threads; read and write their states through their graphs."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from uuid import UUID

import orjson

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import STATE_UPDATE, EventLog
from belay_server.configuration.settings import Settings
from belay_server.db import run_cancels as cancel_rows
from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.own_checkpoints import find_garbage, forget_garbage
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.pool import Database
from belay_server.db.run_cancels import CancelFilter
from belay_server.db.threads import DeletedThread, ThreadFilter, ThreadStorage
from belay_server.domain.errors import (
    BadRequest,
    Conflict,
    NotFound,
    OutOfReach,
    StateTooLarge,
    StateUnreadable,
    Unavailable,
)
from belay_server.domain.runs import CancelAction, user_cancel_reason
from belay_server.domain.threads import Thread, ThreadStatus, ThreadTtl, TtlStrategy
from belay_server.graphs import thread_state
from belay_server.graphs.checkpoints.own_checkpointer import lacks_values
from belay_server.graphs.checkpoints.thread_saver import LargeState, RowSaver
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.serde import to_json
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import announcer, stop_runs
from belay_server.services.runs.chosen_ids import drop_old_log
from belay_server.services.runs.creation import new_id
from belay_server.services.size_limits import refuse_large, refuse_many_keys
from belay_server.services.threads.pruning import keep_latest
from belay_server.states import jobs as state_jobs
from belay_server.states.jobs import HistoryPage, ThreadGraph, with_fragments
from belay_server.states.process import StateProcess

log = logging.getLogger(__name__)

_AnyThread = TypeVar("_AnyThread", Thread, Thread | None)


def create_thread(parts: Parts, body: dict[str, Any]) -> Thread:
    """Create a thread, with the states of `supersteps` if there are any. With `if_exists:
    do_nothing`, return the existing thread with this id.

    Raises Conflict for an id in use; TooLarge; OutOfReach; BadRequest for `supersteps` that the
    graph rejects, in which case no thread is created.
    """
    thread_id = body.get("thread_id") or new_id()
    metadata = dict(body.get("metadata") or {})
    if body.get("graph_id"):
        metadata["graph_id"] = body["graph_id"]
    ttl = body.get("ttl") or parts.graphs.project.thread_ttl
    supersteps = body.get("supersteps") or []
    if supersteps and str(metadata.get("graph_id")) not in parts.graphs:
        raise BadRequest("supersteps: set metadata.graph_id to the graph that they belong to")

    def create(conn: Connection) -> tuple[Thread, bool]:
        created = thread_rows.insert_thread(conn, thread_id, metadata, ttl)
        may_exist = created or body.get("if_exists") == "do_nothing"
        thread = thread_rows.get_thread(conn, thread_id, with_values=True) if may_exist else None
        if created:
            _refuse_large(parts.settings, thread)
            if "thread_id" in body:
                drop_old_log(parts.event_log, thread_id)
        if created and thread is None:
            raise OutOfReach("thread")
        if thread is None:  # also when it exists and the caller may not see it
            raise Conflict(f"Thread with ID {thread_id} already exists")
        return thread, created

    thread, created = parts.database.transaction(create)
    if not created or not supersteps:
        return thread
    return _with_supersteps(parts, thread, supersteps)


def _refuse_large(settings: Settings, thread: _AnyThread) -> _AnyThread:
    """Return the thread; raise TooLarge for its merged metadata, which rolls the change back."""
    if thread is not None:
        refuse_many_keys(metadata=thread.metadata)
        limit = settings.max_metadata_bytes
        refuse_large(limit, "BELAY_MAX_METADATA_BYTES", metadata=thread.metadata)
    return thread


def _with_supersteps(parts: Parts, thread: Thread, supersteps: list[dict[str, Any]]) -> Thread:
    """Write the states of `supersteps`, which another server may have exported, and return the new
    thread. Raises BadRequest, after deleting the thread."""
    here = parts.states.here
    with parts.database.connection() as conn:
        its_graph = _graph_of(parts, conn, thread)
    updates = [[thread_state.state_update(u) for u in step["updates"]] for step in supersteps]
    config = thread_state.thread_config(str(thread.thread_id))
    graph = its_graph.load(here, access="threads.update")
    saver = here.saver(is_limited=False, most_stored_bytes=parts.settings.max_answer_bytes)
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
    _rest(parts.states, its_graph, keep_error=False)
    with parts.database.connection() as conn:
        return _found(conn, thread.thread_id, with_values=True)


def get_thread(parts: Parts, thread_id: UUID, *, with_values: bool = False) -> Thread:
    """Return a thread. Read its values, which may be large, only with `with_values`.

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
    """Merge metadata into a thread's and set its TTL, if given. Raises NotFound, TooLarge,
    OutOfReach."""

    def patch(conn: Connection) -> Thread:
        if not thread_rows.patch_thread(conn, thread_id, metadata, ttl):
            raise NotFound()
        thread = thread_rows.get_thread(conn, thread_id, with_values=True)
        if thread is None:
            raise OutOfReach("thread")
        return _refuse_large(parts.settings, thread)

    return parts.database.transaction(patch)


def delete_thread(
    parts: Parts, thread_id: UUID, *, route: str = "DELETE /threads/{thread_id}"
) -> None:
    """Cancel the thread's active runs, wait until they have ended, then delete the thread with its
    runs and checkpoints. Raises NotFound."""
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
    _delete_own_values(parts)


def _delete_own_values(parts: Parts) -> None:
    """Delete in the project's own checkpointer, if it has one, what has been deleted in Postgres.
    If that fails, it is done with the next deletion, or after the next end of a run."""
    checkpointer = parts.states.here.checkpointer
    if checkpointer is None:
        return
    with parts.database.connection() as conn:
        garbage = find_garbage(conn)
    try:
        checkpointer.delete(garbage)
    except Unavailable:
        return  # it is logged
    with parts.database.connection() as conn:
        forget_garbage(conn, garbage)


def _copy_own_values(parts: Parts, conn: Connection, thread_id: UUID, copy_id: UUID) -> None:
    """Copy the values of a thread's checkpoints in the project's own checkpointer, if it has one.
    Raises Unavailable."""
    checkpointer = parts.states.here.checkpointer
    if checkpointer is None:
        return
    saver = RowSaver(conn, aes_key=parts.settings.aes_key)
    for found in saver.list({"configurable": {"thread_id": str(thread_id)}}):
        if lacks_values(found):
            checkpointer.copy(checkpointer.fill(found), str(copy_id))


def copy_thread(parts: Parts, thread_id: UUID, metadata: dict[str, Any]) -> Thread:
    """Copy a thread with its state and history; merge `metadata` into the copy's metadata.

    Raises Conflict for an unknown thread, as the API documents it; TooLarge, OutOfReach.
    """
    copy_id = new_id()

    def copy(conn: Connection) -> Thread:
        # Read the row and the checkpoints from one snapshot, while runs may write to the thread.
        thread_rows.repeatable_read(conn)
        if not thread_rows.copy_thread(conn, thread_id, copy_id, metadata):
            raise Conflict(f"Thread with ID {thread_id} not found")
        _copy_own_values(parts, conn, thread_id, copy_id)
        copied = thread_rows.get_thread(conn, copy_id, with_values=True)
        if copied is None:
            raise OutOfReach("thread")
        return _refuse_large(parts.settings, copied)

    return _settled(parts, parts.database.transaction(copy), with_values=True)


def prune_threads(parts: Parts, thread_ids: list[UUID], strategy: TtlStrategy) -> int:
    """Delete threads, or everything but their latest states; return how many. Unknown threads are
    not counted, nor are busy threads with the strategy `keep_latest`, which are left unchanged.

    Raises BadRequest for a thread whose latest state depends on its history.
    """
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


def get_storage(database: Database, thread_id: UUID) -> ThreadStorage:
    """Return how much of the database the thread uses. Raises NotFound."""
    with database.connection() as conn:
        _found(conn, thread_id)
        return thread_rows.thread_storage(conn, thread_id)


def _notify_followers(event_log: EventLog, thread_id: UUID, name: str, data: Any) -> None:
    """Append an event to the thread's log. The change is committed, so a Redis error is only
    logged."""
    try:
        event_log.append_to_thread(thread_id, name, to_json(data))
    except RedisError as error:
        log.warning("cannot send an event to followers of thread %s: %s", thread_id, error)


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a search, and the total number of matches."""

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
    """Return a page of threads. Before a search by values, values in rows that are out of date are
    read from the checkpoints."""
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
    """Return the values at `paths` in the thread, by name. Raises TooMany, StateTooLarge."""
    encoded = {name: getattr(thread, name) or "null" for name in ("values", "interrupts")}
    documents = {"config": thread.config, "metadata": thread.metadata}
    large = sum(map(len, encoded.values())) > parts.settings.large_state_bytes
    run = parts.states.run_aside if large else parts.states.run
    return cast(
        "dict[str, Any]",
        with_fragments(run(state_jobs.extracts, documents, encoded, paths)),
    )


def count_threads(parts: Parts, filter_: ThreadFilter) -> int:
    """Return how many threads match, after reading out-of-date values as `search_threads` does."""
    if filter_.values is not None:
        _read_unknown_values(parts, filter_)
    with parts.database.connection() as conn:
        return thread_rows.count_threads(conn, filter_)


def _read_unknown_values(parts: Parts, filter_: ThreadFilter) -> None:
    """Read the values of the threads whose rows are out of date, before a search by values."""
    unfiltered = dataclasses.replace(filter_, values=None, status=None)
    with parts.database.connection() as conn:
        threads = thread_rows.threads_with_unknown_values(conn, unfiltered)
    for thread in threads:
        _settled(parts, thread, with_values=False)


def _settled(parts: Parts, thread: Thread, *, with_values: bool) -> Thread:
    """Return the thread with up-to-date values. After a run was killed, the row has not been
    updated: read the values from the newest checkpoint now, and store them."""
    if thread.values_known or thread.status == ThreadStatus.BUSY:
        return thread
    try:
        with parts.database.connection() as conn:
            graph = _graph_of(parts, conn, thread)
        _rest(parts.states, graph, keep_error=True)
    except (BadRequest, NotFound, ProjectError) as error:
        log.warning("cannot read the values of thread %s: %s", thread.thread_id, error)
        return thread
    with parts.database.connection() as conn:
        return _found(conn, thread.thread_id, with_values=with_values)


def _rest(states: StateProcess, thread: ThreadGraph, *, keep_error: bool) -> None:
    """Update the thread's row from its newest checkpoint. When the state cannot be read, the row
    has no values."""
    try:
        states.run(state_jobs.rest, thread, keep_error=keep_error)
    except (StateTooLarge, StateUnreadable) as error:
        log.warning("cannot read the values of thread %s: %s", thread.thread_id, error)
        state_jobs.rest_unread(states.here, thread.thread_id, keep_error=keep_error)


def _graph_of(parts: Parts, conn: Connection, thread: Thread) -> ThreadGraph:
    """Return the graph in the thread's metadata, which is that of its last run; otherwise the graph
    of an active or the oldest run. Raises NotFound when the thread has states of a graph that is
    not in the project, BadRequest when it has neither a graph nor states."""
    graphs = parts.graphs
    graph_id = thread.metadata.get("graph_id")
    if not isinstance(graph_id, str):
        graph_id = run_rows.oldest_active_graph_id(conn, thread.thread_id)
    if graph_id is None or graph_id not in graphs:
        if graph_id is not None and thread_rows.has_checkpoints(conn, thread.thread_id):
            raise NotFound(
                f"Graph '{graph_id}' of thread {thread.thread_id} is not in this project. Expected "
                f"one of: {sorted(graphs.graph_ids)}"
            )
        raise BadRequest(
            f"Thread '{thread.thread_id}' has no assigned graph ID. This usually occurs when no "
            "runs have been made on this particular thread. This operation requires a graph ID. "
            "Please ensure a run has been made for the thread or manually update the thread "
            "metadata (by setting the 'graph_id' field) before running this operation."
        )
    return ThreadGraph(thread.thread_id, graph_id, thread.config, parts.user)


def get_state(
    parts: Parts,
    thread_id: UUID,
    checkpoint: dict[str, Any] | None,
    fields: list[str] | None,
    *,
    subgraphs: bool,
) -> bytes:
    """Return the JSON of the newest state, or of the state at `checkpoint`, with these `fields`
    (None: all).

    Raises NotFound for an unknown thread, checkpoint or graph, TooMuch, StateTooLarge.
    """
    with parts.database.connection() as conn:
        thread = _found(conn, thread_id)
        try:
            graph = _graph_of(parts, conn, thread)
        except BadRequest:
            return to_json(thread_state.selected(thread_state.EMPTY_STATE, fields))
    return parts.states.run(state_jobs.read_state, graph, checkpoint, fields, subgraphs=subgraphs)


def get_history(parts: Parts, thread_id: UUID, page: HistoryPage) -> bytes:
    """Return a JSON list of states, newest first.

    Raises NotFound for an unknown thread or graph, TooMuch, StateTooLarge.
    """
    with parts.database.connection() as conn:
        thread = _found(conn, thread_id)
        try:
            graph = _graph_of(parts, conn, thread)
        except BadRequest:
            return b"[]"
    return parts.states.run(state_jobs.read_history, graph, page)


def update_state(parts: Parts, thread_id: UUID, body: dict[str, Any]) -> dict[str, Any]:
    """Write a state as a node would, and return the address of its checkpoint.

    Raises NotFound, Conflict while runs are active, and BadRequest for an update that the graph
    rejects. Nothing is written in these cases.
    """
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
        _notify_followers(
            parts.event_log, thread_id, STATE_UPDATE, {"state": orjson.Fragment(written.state)}
        )
    address = {key: saved.get(key) for key in ("thread_id", "checkpoint_ns", "checkpoint_id")}
    if saved.get("checkpoint_map"):
        # A run can resume from a subgraph's checkpoint only with its checkpoint_map.
        address["checkpoint_map"] = saved["checkpoint_map"]
    return {
        "checkpoint": address,
        "configurable": address,
        "checkpoint_id": address["checkpoint_id"],
    }

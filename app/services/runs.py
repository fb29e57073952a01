"""Creating, reading and deleting runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import uuid_utils

from app.db import runs as run_rows
from app.db import threads as thread_rows
from app.db.connection import Connection
from app.db.runs import CancelFilter, NewRun
from app.domain.assistants import Assistant
from app.domain.errors import Conflict, InvalidRequest, NotFound
from app.domain.runs import CancelAction, MultitaskStrategy, Run, superseded_reason
from app.services.assistants import resolve_assistant
from app.services.cancellation import (
    Cancelled,
    announce_cancelled,
    cancel_locked_runs,
    stop_runs,
)
from app.services.parts import Parts
from app.services.run_kwargs import build_run_kwargs

THREAD_BUSY = (
    "Thread is already running a task. Wait for it to finish or choose a different multitask "
    "strategy."
)


def new_id() -> UUID:
    """A UUIDv7: ids sort by the time they were made."""
    return UUID(str(uuid_utils.uuid7()))


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A validated create-run body and where it came in. No thread_id: a stateless run."""

    body: dict[str, Any]
    thread_id: UUID | None
    request_id: str

    @property
    def temporary(self) -> bool:
        return self.thread_id is None and self.body.get("on_completion") != "keep"


def create_run(parts: Parts, request: RunRequest) -> Run:
    """Accept a run: after the commit it will end exactly once, whatever dies.

    Raises NotFound (thread, assistant, or a rolled-back run's id), Conflict (busy and `reject`).
    """
    run_id = request.body.get("run_id") or new_id()
    try:
        return _create_run(parts, request, run_id)
    except _IdTaken:
        # The same create, sent twice at once: the other one was first.
        with parts.database.connection() as conn:
            existing = _accepted_before(conn, run_id, request.thread_id)
        assert existing is not None
        return existing


class _IdTaken(Exception):
    """A run with this id was accepted while this create was at work; it undoes itself."""


def _create_run(parts: Parts, request: RunRequest, run_id: UUID) -> Run:
    action = _action_of(request.body["multitask_strategy"])
    with parts.database.transaction() as conn:
        assistant = resolve_assistant(conn, parts.graphs, request.body["assistant_id"])
        _refuse_unknown_nodes(parts, assistant, request.body)
        if (existing := _accepted_before(conn, run_id, request.thread_id)) is not None:
            return existing
        thread_id = _thread_of(conn, request)
        new = _new_run(parts, request, assistant, thread_id, run_id)
        _refuse_unknown_checkpoint(conn, new)
        cancelled = _make_room(conn, request, thread_id, run_id, action)
        run = run_rows.insert_run(conn, new, rering_seconds=parts.settings.rering_seconds)
        if run is None:
            raise _IdTaken
        head = run_rows.next_runs_of_threads(conn, [thread_id])
    if cancelled is not None and action is not None:
        announce_cancelled(parts, cancelled, action)
    for ringable in head:
        if ringable.run_id == run.run_id:
            parts.doorbell.ring(ringable.run_id, ringable.queue)
    return run


def _action_of(strategy: str) -> CancelAction | None:
    if strategy == MultitaskStrategy.INTERRUPT:
        return CancelAction.INTERRUPT
    if strategy == MultitaskStrategy.ROLLBACK:
        return CancelAction.ROLLBACK
    return None


def _thread_of(conn: Connection, request: RunRequest) -> UUID:
    """The run's thread, locked; made here for a stateless run or `if_not_exists: create`."""
    if request.thread_id is None:
        thread_id = new_id()
        thread_rows.insert_thread(conn, thread_id, {})
    else:
        thread_id = request.thread_id
        if request.body.get("if_not_exists") == "create":
            thread_rows.insert_thread(conn, thread_id, {})
    if not thread_rows.lock_thread(conn, thread_id):
        raise NotFound("Thread or assistant not found.")
    return thread_id


def _accepted_before(conn: Connection, run_id: UUID, thread_id: UUID | None) -> Run | None:
    """A retried create gets the run it made the first time; NotFound if that was rolled back."""
    if run_rows.run_is_rolled_back(conn, run_id):
        raise NotFound("Run not found")
    run = run_rows.get_run(conn, run_id)
    if run is not None and thread_id not in (None, run.thread_id):
        raise Conflict(f"Run {run_id} already exists")
    return run


def _refuse_unknown_nodes(parts: Parts, assistant: Assistant, body: dict[str, Any]) -> None:
    """A node that the graph does not have would be ignored in silence."""
    nodes = parts.graphs.nodes_of(assistant.graph_id)
    if nodes is None:
        return
    goto = (body.get("command") or {}).get("goto") or []
    named = [
        *(body.get("interrupt_before") or []),
        *(body.get("interrupt_after") or []),
        *(goto if isinstance(goto, list) else [goto]),
    ]
    for target in named:
        node = target["node"] if isinstance(target, dict) else target
        if node not in nodes and node not in ("*", "__end__"):
            raise InvalidRequest(f"Node '{node}' is not in graph '{assistant.graph_id}'")


def _refuse_unknown_checkpoint(conn: Connection, new: NewRun) -> None:
    """From a checkpoint that is not there a graph would start from an empty state."""
    configurable = new.kwargs["config"]["configurable"]
    checkpoint_id = configurable.get("checkpoint_id")
    namespace = configurable.get("checkpoint_ns", "")
    if not checkpoint_id and not namespace:
        return
    if not run_rows.checkpoint_exists(conn, new.thread_id, namespace, checkpoint_id):
        raise NotFound(f"Checkpoint {checkpoint_id or namespace} not found")


def _make_room(
    conn: Connection,
    request: RunRequest,
    thread_id: UUID,
    run_id: UUID,
    action: CancelAction | None,
) -> Cancelled | None:
    """What the multitask strategy does to the runs the thread has already."""
    active = run_rows.active_runs_of_thread(conn, thread_id)
    if active and request.body["multitask_strategy"] == MultitaskStrategy.REJECT:
        raise Conflict(THREAD_BUSY)
    if not active or action is None:
        return None
    return cancel_locked_runs(conn, active, action, superseded_reason(action, run_id))


def _new_run(
    parts: Parts, request: RunRequest, assistant: Assistant, thread_id: UUID, run_id: UUID
) -> NewRun:
    body = request.body
    built = build_run_kwargs(
        body,
        assistant=assistant,
        thread_id=thread_id,
        run_id=run_id,
        request_id=request.request_id,
        temporary=request.temporary,
        defaults=parts.graphs.project.defaults.get(assistant.graph_id, {}),
    )
    return NewRun(
        run_id=run_id,
        thread_id=thread_id,
        assistant_id=assistant.assistant_id,
        graph_id=assistant.graph_id,
        queue=parts.graphs.queue_of(assistant.graph_id),
        metadata=built.metadata,
        kwargs=built.kwargs,
        thread_config=built.thread_config,
        multitask_strategy=body["multitask_strategy"],
        temporary=request.temporary,
        timeout_seconds=body.get("timeout_seconds"),
        after_seconds=max(0.0, float(body.get("after_seconds") or 0)),
    )


def get_run(conn: Connection, thread_id: UUID, run_id: UUID) -> Run:
    """Raises NotFound, saying whether it is the thread or the run that is unknown."""
    run = run_rows.get_thread_run(conn, thread_id, run_id)
    if run is None:
        if thread_rows.get_thread(conn, thread_id) is None:
            raise NotFound(f"Thread with ID {thread_id} not found")
        raise NotFound()
    return run


def list_runs(
    parts: Parts, thread_id: UUID, *, status: str | None, limit: int, offset: int
) -> list[Run]:
    with parts.database.connection() as conn:
        if thread_rows.get_thread(conn, thread_id) is None:
            raise NotFound(f"Thread with ID {thread_id} not found")
        return run_rows.list_runs(conn, thread_id, status=status, limit=limit, offset=offset)


def delete_run(parts: Parts, thread_id: UUID, run_id: UUID) -> None:
    """Delete a run's record. One in flight is stopped first. Raises NotFound."""
    with parts.database.connection() as conn:
        run = run_rows.get_thread_run(conn, thread_id, run_id)
    if run is None:
        raise NotFound("Run not found")
    if run.is_active:
        reason = {
            "error": "UserInterrupt",
            "message": "interrupt requested via DELETE /threads/{thread_id}/runs/{run_id}",
        }
        stop_runs(parts, CancelFilter(thread_id=thread_id, run_ids=[run_id]), reason)
    with parts.database.connection() as conn:
        if not run_rows.delete_finished_run(conn, thread_id, run_id):
            raise NotFound("Run not found")

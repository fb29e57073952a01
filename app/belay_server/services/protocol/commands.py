"""Implement the commands of version 2 of the streaming protocol: start a run, resume interrupts,
return the run tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.pool import Database
from belay_server.domain.errors import InvalidRequest, NotFound
from belay_server.domain.run_options import MultitaskStrategy, RunOptions
from belay_server.domain.runs import Run, RunStatus
from belay_server.domain.threads import Thread
from belay_server.graphs.protocol.events import STREAM_MODES
from belay_server.services.parts import Parts
from belay_server.services.protocol.run_tree import Tree, run_tree
from belay_server.services.threads.records import get_thread

_TREE_STATUS = {
    RunStatus.PENDING: "started",
    RunStatus.RUNNING: "running",
    RunStatus.ERROR: "failed",
    RunStatus.TIMEOUT: "failed",
    RunStatus.INTERRUPTED: "interrupted",
}


class NoSuchInterrupt(Exception):
    """The interrupt is not pending on the thread, or no longer."""


class NoSuchRun(Exception):
    """The thread has had no run."""


def options_of_start(parts: Parts, thread_id: UUID, params: Mapping[str, Any]) -> RunOptions:
    """Return the options of the run that `run.start` creates. On a thread with one pending
    interrupt, `input` resumes it.

    Raises InvalidRequest when several interrupts are pending.
    """
    strategy = params.get("multitaskStrategy") or params.get("multitask_strategy")
    options = _streaming_everything(
        RunOptions(
            assistant_id=params["assistant_id"],
            input=params.get("input"),
            config=params.get("config"),
            metadata=params.get("metadata"),
            if_not_exists="create",
            multitask_strategy=strategy or MultitaskStrategy.ENQUEUE,
        )
    )
    pending = _pending_interrupts(parts, thread_id)
    if not pending or options.input is None:
        return options
    if len(pending) > 1:
        raise InvalidRequest(
            f"The thread has {len(pending)} pending interrupts: resume them by id, with "
            "input.respond."
        )
    return dataclasses.replace(options, input=None, command={"resume": {pending[0]: options.input}})


def options_of_answers(parts: Parts, thread_id: UUID, params: Mapping[str, Any]) -> RunOptions:
    """Return the options of the run that `input.respond` creates. Raises NoSuchInterrupt."""
    pending = _pending_interrupts(parts, thread_id)
    for interrupt_id in params["answers"]:
        if interrupt_id not in pending:
            raise NoSuchInterrupt(f"Unknown or already-consumed interrupt: {interrupt_id}")
    command = {"resume": params["answers"]}
    command |= {name: params[name] for name in ("update", "goto") if params.get(name) is not None}
    return _streaming_everything(
        RunOptions(
            assistant_id=_assistant_of(parts, thread_id),
            command=command,
            config=params.get("config"),
            metadata=params.get("metadata"),
            # When two clients resume one interrupt at the same time, the later run fails.
            strict_resume=True,
        )
    )


def _streaming_everything(options: RunOptions) -> RunOptions:
    return dataclasses.replace(
        options, stream_mode=list(STREAM_MODES), stream_subgraphs=True, stream_resumable=True
    )


def _pending_interrupts(parts: Parts, thread_id: UUID) -> list[str]:
    try:
        get_thread(parts, thread_id)
    except NotFound:
        return []
    with parts.database.connection() as conn:
        return thread_rows.interrupt_ids_of_thread(conn, thread_id)


def _assistant_of(parts: Parts, thread_id: UUID) -> str:
    """Return the assistant of the thread's newest run, which raised the interrupt. When no run is
    left, return the assistant or graph in the thread's metadata."""
    newest = _newest_run(parts.database, thread_id)
    if newest is not None:
        return str(newest.assistant_id)
    metadata = get_thread(parts, thread_id).metadata
    return str(metadata.get("assistant_id") or metadata.get("graph_id") or "")


def _newest_run(database: Database, thread_id: UUID) -> Run | None:
    with database.connection() as conn:
        newest = run_rows.list_runs(conn, thread_id, status=None, metadata={}, limit=1, offset=0)
    return newest[0] if newest else None


def tree_of(parts: Parts, thread_id: UUID) -> Tree:
    """Return the tree of the thread's newest run. Raises NoSuchRun, Unavailable."""
    try:
        thread: Thread | None = get_thread(parts, thread_id)
    except NotFound:
        thread = None
    run = None if thread is None else _newest_run(parts.database, thread_id)
    if thread is None or run is None:
        raise NoSuchRun("The thread has no run.")
    status = _TREE_STATUS.get(RunStatus(run.status))
    if status is None:
        status = "interrupted" if thread.asks else "completed"
    return run_tree(parts.event_log, run.run_id, graph_name=run.graph_id, status=status)

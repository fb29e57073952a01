"""What a client of the streaming protocol's version 2 can have done: run, answer, look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.domain.errors import InvalidRequest, NotFound
from belay_server.domain.runs import Run, RunStatus
from belay_server.domain.threads import Thread
from belay_server.graphs.protocol_events import STREAM_MODES
from belay_server.services.parts import Parts
from belay_server.services.threads import get_thread

_ALL_ARE_STREAMED: Mapping[str, Any] = {
    "stream_mode": list(STREAM_MODES),
    "stream_subgraphs": True,
    "stream_resumable": True,
}
_TREE_STATUS = {
    RunStatus.PENDING: "started",
    RunStatus.RUNNING: "running",
    RunStatus.ERROR: "failed",
    RunStatus.TIMEOUT: "failed",
    RunStatus.INTERRUPTED: "interrupted",
}


class NoSuchInterrupt(Exception):
    """The thread does not ask this, or not any more."""


class NoSuchRun(Exception):
    """The thread has had no run."""


def body_of_start(parts: Parts, thread_id: UUID, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A create-run body. On a thread that waits for an answer, the input is the answer.

    Raises InvalidRequest where it waits for several.
    """
    body: dict[str, Any] = {
        "assistant_id": asked["assistant_id"],
        "config": asked.get("config"),
        "metadata": asked.get("metadata"),
        "if_not_exists": "create",
        **_ALL_ARE_STREAMED,
    }
    strategy = asked.get("multitaskStrategy") or asked.get("multitask_strategy")
    if strategy is not None:
        body["multitask_strategy"] = strategy
    given = asked.get("input")
    questions = _questions(parts, thread_id)
    if not questions or given is None:
        return {**body, "input": given}
    if len(questions) > 1:
        raise InvalidRequest(
            f"The thread waits for {len(questions)} answers: give them by id, with input.respond."
        )
    return {**body, "command": {"resume": {questions[0]: given}}}


def body_of_answers(parts: Parts, thread_id: UUID, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A create-run body that resumes the thread. Raises NoSuchInterrupt."""
    waiting = _questions(parts, thread_id)
    for interrupt_id in asked["answers"]:
        if interrupt_id not in waiting:
            raise NoSuchInterrupt(f"Unknown or already-consumed interrupt: {interrupt_id}")
    command = {"resume": asked["answers"]}
    command |= {name: asked[name] for name in ("update", "goto") if asked.get(name) is not None}
    return {
        "assistant_id": _assistant_of(parts, thread_id),
        "command": command,
        "config": asked.get("config"),
        "metadata": asked.get("metadata"),
        # Of two answers to one question that come at once, one run fails and says so.
        "strict_resume": True,
        **_ALL_ARE_STREAMED,
    }


def _questions(parts: Parts, thread_id: UUID) -> list[str]:
    try:
        get_thread(parts, thread_id)
    except NotFound:
        return []
    with parts.database.connection() as conn:
        return thread_rows.questions_of_thread(conn, thread_id)


def _assistant_of(parts: Parts, thread_id: UUID) -> str:
    """Of the run that asked: the thread's newest, or, where that is gone, whose thread it was."""
    newest = _newest_run(parts, thread_id)
    if newest is not None:
        return str(newest.assistant_id)
    metadata = get_thread(parts, thread_id).metadata
    return str(metadata.get("assistant_id") or metadata.get("graph_id") or "")


def _newest_run(parts: Parts, thread_id: UUID) -> Run | None:
    with parts.database.connection() as conn:
        newest = run_rows.list_runs(conn, thread_id, status=None, metadata={}, limit=1, offset=0)
    return newest[0] if newest else None


@dataclass(frozen=True, slots=True)
class Tree:
    """What runs on the thread, or has run last."""

    status: str
    graph_name: str

    def as_json(self) -> dict[str, Any]:
        return {"namespace": [], "status": self.status, "graph_name": self.graph_name}


def tree_of(parts: Parts, thread_id: UUID) -> Tree:
    """Raises NoSuchRun."""
    try:
        thread: Thread | None = get_thread(parts, thread_id)
    except NotFound:
        thread = None
    run = None if thread is None else _newest_run(parts, thread_id)
    if thread is None or run is None:
        raise NoSuchRun("The thread has no run.")
    status = _TREE_STATUS.get(RunStatus(run.status))
    if status is None:
        status = "interrupted" if thread.asks else "completed"
    return Tree(status, run.graph_id)

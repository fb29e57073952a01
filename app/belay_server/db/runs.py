"""Runs in Postgres. Each function runs the query of its own name in `sql/runs.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.connection import (
    Connection,
    execute,
    fetch_dicts,
    fetch_one,
    fetch_page,
    fetch_value,
)
from belay_server.db.queries import load_queries
from belay_server.db.threads import ttl_params
from belay_server.domain.run_options import RunKwargs
from belay_server.domain.runs import Run, RunStatus
from belay_server.domain.threads import ThreadTtl

SQL = load_queries("runs")
#: Outcomes of so many bytes, as Postgres stores them, are read with the run's status.
SMALL_OUTCOME = 16 * 1024


@dataclass(frozen=True, slots=True)
class NewRun:
    """A row to insert. `after_seconds` delays the first claim."""

    run_id: UUID
    thread_id: UUID
    assistant_id: UUID
    graph_id: str
    queue: str
    metadata: dict[str, Any]
    kwargs: RunKwargs
    thread_config: dict[str, Any]
    multitask_strategy: str
    temporary: bool
    timeout_seconds: float | None
    after_seconds: float
    #: The client may send this create again with the same id.
    id_chosen: bool = False
    #: Whose it is, for limits.
    caller: str | None = None


@dataclass(frozen=True, slots=True)
class Ringable:
    """A run that may be claimable now, and the queue its doorbell goes to."""

    run_id: UUID
    queue: str


@dataclass(frozen=True, slots=True)
class NextRun:
    """The head of a thread's queue, when the thread is idle and has one."""

    next_run_id: UUID | None
    next_queue: str | None

    @property
    def ringable(self) -> tuple[Ringable, ...]:
        if self.next_run_id is None or self.next_queue is None:
            return ()
        return (Ringable(self.next_run_id, self.next_queue),)


@dataclass(frozen=True, slots=True)
class AcceptedRun(NextRun):
    """What the database adds to a new run, and what its thread has to run next."""

    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run stands, and what it asks. `interrupts` is None when nobody has read it yet."""

    status: str
    error: dict[str, str] | None
    interrupts: list[Any] | None


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run stands, and what its waiters are answered.

    `stored_bytes` is None when nobody has read its outcome yet. `answer` is JSON, or None for one
    that is not small; `run_answer` reads it.
    """

    status: str
    error: dict[str, str] | None
    stored_bytes: int | None
    answer: str | None


def insert_run(conn: Connection, new: NewRun, *, rering_seconds: float) -> Run | None:
    """Insert as pending. None when the id is taken."""
    params = {**_new_run_params(new), "id_chosen": new.id_chosen, "rering_seconds": rering_seconds}
    return fetch_one(conn, SQL.insert_run, params, Run)


def _new_run_params(new: NewRun) -> dict[str, Any]:
    return {
        "run_id": new.run_id,
        "thread_id": new.thread_id,
        "assistant_id": new.assistant_id,
        "graph_id": new.graph_id,
        "queue": new.queue,
        "metadata": Jsonb(new.metadata),
        "kwargs": Jsonb(new.kwargs.to_document()),
        "thread_config": Jsonb(new.thread_config),
        "multitask_strategy": new.multitask_strategy,
        "temporary": new.temporary,
        "timeout_seconds": new.timeout_seconds,
        "caller": new.caller,
        "after_seconds": new.after_seconds,
    }


def accept_run(
    conn: Connection,
    new: NewRun,
    *,
    assistant_updated_at: datetime,
    new_thread: bool,
    thread_metadata: dict[str, Any],
    ttl: ThreadTtl | None,
    rering_seconds: float,
) -> AcceptedRun | None:
    """Insert as pending, in one statement. None, and nothing is done, when there is no such thread
    or when the assistant has changed since."""
    params = {
        **_new_run_params(new),
        "assistant_updated_at": assistant_updated_at,
        "new_thread": new_thread,
        "thread_metadata": Jsonb(thread_metadata),
        **ttl_params(ttl),
        "rering_seconds": rering_seconds,
    }
    return fetch_one(conn, SQL.accept_run, params, AcceptedRun)


def as_accepted(new: NewRun, accepted: AcceptedRun) -> Run:
    """The row of a run that `accept_run` has just inserted."""
    return Run(
        run_id=new.run_id,
        thread_id=new.thread_id,
        assistant_id=new.assistant_id,
        graph_id=new.graph_id,
        queue=new.queue,
        status=RunStatus.PENDING,
        metadata=new.metadata,
        kwargs=new.kwargs.to_document(),
        multitask_strategy=new.multitask_strategy,
        created_at=accepted.created_at,
        updated_at=accepted.updated_at,
        scheduled_at=accepted.scheduled_at,
        temporary=new.temporary,
        claim_no=0,
        attempts=0,
        lease_owner=None,
        cancel_action=None,
        cancel_reason=None,
        error=None,
    )


def get_run(conn: Connection, run_id: UUID) -> Run | None:
    return fetch_one(conn, SQL.get_run, {"run_id": run_id}, Run)


def get_thread_run(
    conn: Connection, thread_id: UUID, run_id: UUID, *, ended_stateless: bool = False
) -> Run | None:
    """A run of this thread. `ended_stateless` also finds what only a waiter may still read."""
    params = {"thread_id": thread_id, "run_id": run_id, "ended_stateless": ended_stateless}
    return fetch_one(conn, SQL.get_thread_run, params, Run)


def run_end(conn: Connection, thread_id: UUID, run_id: UUID) -> RunEnd | None:
    """Return how a run stands. Also of an ended stateless run."""
    params = {"thread_id": thread_id, "run_id": run_id}
    return fetch_one(conn, SQL.run_end, params, RunEnd)


def run_outcome(conn: Connection, thread_id: UUID, run_id: UUID) -> RunOutcome | None:
    """Return how a run stands, and its waiters' answer. Also of an ended stateless run."""
    params = {"thread_id": thread_id, "run_id": run_id, "small": SMALL_OUTCOME}
    return fetch_one(conn, SQL.run_outcome, params, RunOutcome)


def run_answer(conn: Connection, run_id: UUID) -> str | None:
    """Return the answer to a run's waiters, as JSON. None: nobody has read its outcome yet."""
    answer: str | None = fetch_value(conn, SQL.run_answer, {"run_id": run_id})
    return answer


def list_runs(
    conn: Connection,
    thread_id: UUID,
    *,
    status: str | None,
    metadata: dict[str, Any],
    limit: int,
    offset: int,
) -> list[Run]:
    """Newest first."""
    params = {
        "thread_id": thread_id,
        "status": status,
        "metadata": Jsonb(metadata),
        "limit": limit,
        "offset": offset,
    }
    return fetch_page(conn, SQL.list_runs, params, Run)


def run_is_buried(conn: Connection, run_id: UUID) -> bool:
    """Rolled back, or ended and swept: never to be executed again."""
    return bool(fetch_value(conn, SQL.run_is_buried, {"run_id": run_id}))


def thread_of_buried_run(conn: Connection, run_id: UUID) -> UUID | None:
    value: UUID | None = fetch_value(conn, SQL.thread_of_buried_run, {"run_id": run_id})
    return value


def pending_runs_of(conn: Connection, caller: str) -> int:
    """How many a caller has. Whoever asks next waits until this transaction is over."""
    execute(conn, SQL.lock_caller, {"caller": caller})
    return int(fetch_value(conn, SQL.count_pending_runs_of, {"caller": caller}))


def thread_is_busy(conn: Connection, thread_id: UUID) -> bool:
    return bool(fetch_value(conn, SQL.thread_is_busy, {"thread_id": thread_id}))


def oldest_active_graph_id(conn: Connection, thread_id: UUID) -> str | None:
    value: str | None = fetch_value(conn, SQL.oldest_active_graph_id, {"thread_id": thread_id})
    return value


def delete_finished_run(conn: Connection, thread_id: UUID, run_id: UUID) -> bool:
    params = {"thread_id": thread_id, "run_id": run_id}
    return fetch_value(conn, SQL.delete_finished_run, params) is not None


def ended_runs(conn: Connection, run_ids: Sequence[UUID]) -> dict[UUID, str | None]:
    """Those that have ended, with their status; None for a row that is gone."""
    rows = fetch_dicts(conn, SQL.ended_runs, {"run_ids": list(run_ids)})
    return {row["run_id"]: row["status"] for row in rows}


def set_outcome(conn: Connection, run_id: UUID, outcome: dict[str, Any]) -> None:
    execute(conn, SQL.set_outcome, {"run_id": run_id, "outcome": Jsonb(outcome)})


def last_checkpoint_of_run(conn: Connection, thread_id: UUID, run_id: UUID) -> str | None:
    params = {"thread_id": str(thread_id), "run_id": str(run_id)}
    value: str | None = fetch_value(conn, SQL.last_checkpoint_of_run, params)
    return value


def checkpoint_exists(
    conn: Connection, thread_id: UUID, checkpoint_ns: str, checkpoint_id: str | None
) -> bool:
    """Whether the thread has this checkpoint, or any of the namespace when no id is given."""
    params = {
        "thread_id": str(thread_id),
        "checkpoint_ns": checkpoint_ns,
        "checkpoint_id": checkpoint_id,
    }
    return bool(fetch_value(conn, SQL.checkpoint_exists, params))

"""Read and write runs. Each function runs the query of its name in `sql/runs.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import (
    execute,
    fetch_dicts,
    fetch_one,
    fetch_page,
    fetch_value,
)
from belay_server.db.threads import ttl_params
from belay_server.domain.run_options import RunKwargs
from belay_server.domain.runs import Run, RunStatus
from belay_server.domain.threads import ThreadTtl

SQL = load_queries("runs")
#: Outcomes of up to so many bytes, as Postgres stores them, are read with the run's status.
SMALL_OUTCOME = 16 * 1024


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to insert. `after_seconds` delays its first claim."""

    run_id: UUID
    thread_id: UUID
    assistant_id: UUID
    graph_id: str
    queue: str
    metadata: dict[str, Any]
    kwargs: RunKwargs
    thread_config: dict[str, Any]
    #: The `configurable` that the thread gives to later runs, if this is its first.
    thread_configurable: dict[str, Any]
    multitask_strategy: str
    temporary: bool
    timeout_seconds: float | None
    after_seconds: float
    #: Whether the client chose the id. It may then retry the create with the same id.
    id_chosen: bool = False
    #: The name of the caller, for limits.
    caller: str | None = None
    #: What `Caller.as_creator` returns; None without authentication.
    creator: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Ringable:
    """A run that may be claimable now. Its queue and its graph decide where its doorbell goes."""

    run_id: UUID
    queue: str
    graph_id: str


@dataclass(frozen=True, slots=True)
class NextRun:
    """The first due run in a thread's queue, if the thread is idle and has one."""

    next_run_id: UUID | None
    next_queue: str | None
    next_graph_id: str | None

    @property
    def ringable(self) -> tuple[Ringable, ...]:
        if self.next_run_id is None or self.next_queue is None or self.next_graph_id is None:
            return ()
        return (Ringable(self.next_run_id, self.next_queue, self.next_graph_id),)


@dataclass(frozen=True, slots=True)
class AcceptedRun(NextRun):
    """The times that the database gave a new run, and the next run of its thread."""

    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime


@dataclass(frozen=True, slots=True)
class StoredEnd:
    """A run's status, error and interrupts. `interrupts` is None until the outcome is stored."""

    status: str
    error: dict[str, str] | None
    interrupts: list[Any] | None


@dataclass(frozen=True, slots=True)
class RunCreator:
    """A running run's creator, as `Caller.as_creator` returns it, and the authenticated user."""

    creator: dict[str, Any] | None
    auth_user: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """A run's status and the response for clients that wait for it.

    `stored_bytes` is None until the outcome is stored. `answer` is JSON. It is None if the outcome
    is not small: then `run_answer` reads it.
    """

    status: str
    error: dict[str, str] | None
    stored_bytes: int | None
    answer: str | None


def insert_run(conn: Connection, new: NewRun, *, rering_seconds: float) -> Run | None:
    """Insert a pending run. Return None if the id is taken."""
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
        "thread_configurable": Jsonb(new.thread_configurable),
        "multitask_strategy": new.multitask_strategy,
        "temporary": new.temporary,
        "timeout_seconds": new.timeout_seconds,
        "caller": new.caller,
        "creator": None if new.creator is None else Jsonb(new.creator),
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
    """Insert a pending run, and its thread if it is new, in one statement.

    Return None and do nothing if the thread does not exist or the assistant has changed since.
    """
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
    """Return the row of a run that `accept_run` has just inserted."""
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
    """Return a run by its id alone; None if there is none that the caller may access."""
    return fetch_one(conn, SQL.get_run, {"run_id": run_id}, Run)


def get_thread_run(
    conn: Connection, thread_id: UUID, run_id: UUID, *, ended_stateless: bool = False
) -> Run | None:
    """Return a run of a thread. `ended_stateless` includes runs whose thread is already hidden."""
    params = {"thread_id": thread_id, "run_id": run_id, "ended_stateless": ended_stateless}
    return fetch_one(conn, SQL.get_thread_run, params, Run)


def run_end(conn: Connection, thread_id: UUID, run_id: UUID) -> StoredEnd | None:
    """Return a run's status and interrupts. Ended stateless runs are included."""
    params = {"thread_id": thread_id, "run_id": run_id}
    return fetch_one(conn, SQL.run_end, params, StoredEnd)


def creator_of_run(conn: Connection, run_id: UUID, token_hash: str) -> RunCreator | None:
    """Return the creator of the running run whose current claim has this token. Return None if
    there is none."""
    params = {"run_id": run_id, "token_hash": token_hash}
    return fetch_one(conn, SQL.creator_of_run, params, RunCreator)


def run_outcome(conn: Connection, thread_id: UUID, run_id: UUID) -> RunOutcome | None:
    """Return a run's status and response. Ended stateless runs are included."""
    params = {"thread_id": thread_id, "run_id": run_id, "small": SMALL_OUTCOME}
    return fetch_one(conn, SQL.run_outcome, params, RunOutcome)


def run_answer(conn: Connection, run_id: UUID) -> str | None:
    """Return the response for clients that wait for a run, as JSON.

    Return None if the outcome is not stored yet.
    """
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
    """Return a page of a thread's runs, newest first."""
    params = {
        "thread_id": thread_id,
        "status": status,
        "metadata": Jsonb(metadata),
        "limit": limit,
        "offset": offset,
    }
    return fetch_page(conn, SQL.list_runs, params, Run)


def has_tombstone(conn: Connection, run_id: UUID) -> bool:
    """Return whether a run was rolled back, or ended and was deleted by the sweeper."""
    return bool(fetch_value(conn, SQL.has_tombstone, {"run_id": run_id}))


def thread_of_tombstone(conn: Connection, run_id: UUID) -> UUID | None:
    """Return the thread of a run that has a tombstone; None if it has none."""
    value: UUID | None = fetch_value(conn, SQL.thread_of_tombstone, {"run_id": run_id})
    return value


def pending_runs_of(conn: Connection, caller: str) -> int:
    """Return how many pending runs a caller has. Lock that count until the transaction ends."""
    execute(conn, SQL.lock_caller, {"caller": caller})
    return int(fetch_value(conn, SQL.count_pending_runs_of, {"caller": caller}))


def thread_is_busy(conn: Connection, thread_id: UUID) -> bool:
    """Return whether a thread has pending or running runs."""
    return bool(fetch_value(conn, SQL.thread_is_busy, {"thread_id": thread_id}))


def oldest_active_graph_id(conn: Connection, thread_id: UUID) -> str | None:
    """Return the graph of a thread's oldest active run, or else of its oldest run."""
    value: str | None = fetch_value(conn, SQL.oldest_active_graph_id, {"thread_id": thread_id})
    return value


def delete_finished_run(conn: Connection, thread_id: UUID, run_id: UUID) -> bool:
    """Delete an ended run. Return False if it is active, or there is none."""
    params = {"thread_id": thread_id, "run_id": run_id}
    return fetch_value(conn, SQL.delete_finished_run, params) is not None


def ended_runs(conn: Connection, run_ids: Sequence[UUID]) -> dict[UUID, str | None]:
    """Return the runs that have ended, with their status. It is None if the row is gone."""
    rows = fetch_dicts(conn, SQL.ended_runs, {"run_ids": list(run_ids)})
    return {row["run_id"]: row["status"] for row in rows}


def set_outcome(conn: Connection, run_id: UUID, outcome: dict[str, Any]) -> None:
    """Store the outcome of an ended run that has none yet."""
    execute(conn, SQL.set_outcome, {"run_id": run_id, "outcome": Jsonb(outcome)})


def last_checkpoint_of_run(conn: Connection, thread_id: UUID, run_id: UUID) -> str | None:
    """Return the id of a run's newest checkpoint of the root graph; None if it has none."""
    params = {"thread_id": str(thread_id), "run_id": str(run_id)}
    value: str | None = fetch_value(conn, SQL.last_checkpoint_of_run, params)
    return value


def disown_checkpoints(conn: Connection, thread_id: UUID, run_id: UUID) -> None:
    """Remove a run's id from the thread's checkpoints. LangGraph would take a new run with the same
    id for a later attempt, and go on from them without its input; a rollback would delete them."""
    params = {"thread_id": str(thread_id), "run_id": str(run_id)}
    execute(conn, SQL.disown_checkpoints, params)


def checkpoint_exists(
    conn: Connection, thread_id: UUID, checkpoint_ns: str, checkpoint_id: str | None
) -> bool:
    """Return whether the thread has this checkpoint. Without an id: any of the namespace."""
    params = {
        "thread_id": str(thread_id),
        "checkpoint_ns": checkpoint_ns,
        "checkpoint_id": checkpoint_id,
    }
    return bool(fetch_value(conn, SQL.checkpoint_exists, params))

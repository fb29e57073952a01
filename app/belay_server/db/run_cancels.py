"""Carry out cancels and rollbacks in the database.

Each function runs the query of its name in `sql/run_cancels.sql`. `undo_run` and `lock_runs` run
several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import execute, fetch_all, fetch_value
from belay_server.domain.runs import CancelAction
from belay_server.runtime import fault_points
from belay_server.runtime.fault_points import FaultPoint

SQL = load_queries("run_cancels")


@dataclass(frozen=True, slots=True)
class CancelFilter:
    """The conditions for the active runs that a cancel applies to. None means any."""

    thread_id: UUID | None = None
    run_ids: Sequence[UUID] | None = None
    status: str | None = None
    assistant_id: UUID | None = None

    def params(self) -> dict[str, Any]:
        return {
            "thread_id": self.thread_id,
            "run_ids": None if self.run_ids is None else list(self.run_ids),
            "status": self.status,
            "assistant_id": self.assistant_id,
        }


@dataclass(frozen=True, slots=True)
class ActiveRun:
    """The fields of a pending or running run that a cancel needs."""

    run_id: UUID
    thread_id: UUID
    seq: int
    status: str
    claim_no: int
    temporary: bool


def rollback_reason(conn: Connection, run_id: UUID) -> dict[str, str] | None:
    """Return the reason for the rollback of a run whose row is gone. Return None if unknown."""
    value: dict[str, str] | None = fetch_value(conn, SQL.rollback_reason, {"run_id": run_id})
    return value


def active_runs_of_thread(conn: Connection, thread_id: UUID) -> list[ActiveRun]:
    """Lock and return a thread's active runs. The caller has locked the thread's row."""
    return fetch_all(conn, SQL.active_runs_of_thread, {"thread_id": thread_id}, ActiveRun)


def cancellable_runs(
    conn: Connection, filter_: CancelFilter, *, after: ActiveRun | None, limit: int
) -> list[ActiveRun]:
    """Return a page of the runs that a cancel applies to, by thread, newest run first."""
    params = filter_.params() | {
        "after_thread_id": None if after is None else after.thread_id,
        "after_seq": None if after is None else after.seq,
        "limit": limit,
    }
    return fetch_all(conn, SQL.cancellable_runs, params, ActiveRun)


def lock_runs(
    conn: Connection, runs: Sequence[ActiveRun], *, status: str | None = None
) -> list[ActiveRun]:
    """Lock the runs' threads, then the runs in run_id order, which is every writer's lock order.

    Return those that are still active and, if a status is given, still have it.
    """
    if not runs:
        return []
    execute(conn, SQL.lock_threads, {"thread_ids": list({run.thread_id for run in runs})})
    params = {"run_ids": [run.run_id for run in runs], "status": status}
    return fetch_all(conn, SQL.lock_runs, params, ActiveRun)


def count_known_runs(conn: Connection, thread_id: UUID | None, run_ids: Sequence[UUID]) -> int:
    """Return how many of the runs exist, of one thread or (with None) of any."""
    params = {"thread_id": thread_id, "run_ids": list(run_ids)}
    return int(fetch_value(conn, SQL.count_known_runs, params))


def flag_running_runs(
    conn: Connection, run_ids: Sequence[UUID], action: CancelAction, reason: dict[str, str]
) -> None:
    """Record a cancel of running runs. A rollback replaces an interrupt, never the reverse."""
    params = {"run_ids": list(run_ids), "action": action, "reason": Jsonb(reason)}
    execute(conn, SQL.flag_running_runs, params)


def interrupt_unstarted_runs(
    conn: Connection, run_ids: Sequence[UUID], reason: dict[str, str]
) -> None:
    """End pending runs as `interrupted`, with `reason` as their error."""
    params = {"run_ids": list(run_ids), "reason": Jsonb(reason)}
    execute(conn, SQL.interrupt_unstarted_runs, params)


def roll_back_unstarted_runs(
    conn: Connection, run_ids: Sequence[UUID], reason: dict[str, str]
) -> None:
    """Replace pending runs by tombstones, and restore the fields that they set on their threads.
    Needs a transaction."""
    params = {"run_ids": list(run_ids), "reason": Jsonb(reason)}
    execute(conn, SQL.restore_thread_marks, params)
    execute(conn, SQL.roll_back_unstarted_runs, params)


def end_put_back_run(conn: Connection, run_id: UUID, reason: dict[str, str]) -> None:
    """End a put-back run as `interrupted`, and mark its thread's values as unknown."""
    execute(conn, SQL.end_put_back_run, {"run_id": run_id, "reason": Jsonb(reason)})


def set_cancel_reason(conn: Connection, run_id: UUID, reason: dict[str, str]) -> None:
    """Set the reason of a cancel, which `undo_run` copies into the run's tombstone."""
    execute(conn, SQL.set_cancel_reason, {"run_id": run_id, "reason": Jsonb(reason)})


def hide_temporary_threads(conn: Connection, thread_ids: Sequence[UUID]) -> None:
    """Hide the threads of ended stateless runs. The sweeper deletes them later."""
    execute(conn, SQL.hide_temporary_threads, {"thread_ids": list(thread_ids)})


def undo_run(conn: Connection, thread_id: UUID, run_id: UUID) -> None:
    """Delete everything that a run wrote, and restore what it overwrote. Needs a transaction."""
    params = {"run_id": run_id}
    text = {"run_id": str(run_id), "thread_id": str(thread_id)}
    execute(conn, SQL.restore_before_images, params)
    execute(conn, SQL.delete_checkpoints_of_run, text)
    fault_points.reached(FaultPoint.ROLLING_BACK, run_id)
    execute(conn, SQL.reinsert_before_images, params)
    execute(conn, SQL.restore_thread_marks, {"run_ids": [run_id]})
    execute(conn, SQL.replace_by_tombstone, params)

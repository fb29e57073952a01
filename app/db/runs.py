"""Runs in Postgres. Each function runs the query of its own name in `sql/runs.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from app import fault_points
from app.db.connection import (
    Connection,
    execute,
    fetch_all,
    fetch_dicts,
    fetch_one,
    fetch_value,
)
from app.db.queries import load_queries
from app.db.threads import ttl_params
from app.domain.runs import CancelAction, Claim, ClaimedRun, Ending, Run, RunStatus
from app.domain.threads import ThreadTtl
from app.fault_points import FaultPoint

SQL = load_queries("runs")


@dataclass(frozen=True, slots=True)
class NewRun:
    """What a create asks for. `after_seconds` delays the first claim."""

    run_id: UUID
    thread_id: UUID
    assistant_id: UUID
    graph_id: str
    queue: str
    metadata: dict[str, Any]
    kwargs: dict[str, Any]
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
class LockedRun(Run):
    """A run about to be ended, and how long ago its cancel was asked for."""

    cancel_seconds: float | None


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
class CancelFilter:
    """Which active runs a cancel may hit; None means any."""

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
    """A pending or running run, as a cancel sees it."""

    run_id: UUID
    thread_id: UUID
    seq: int
    status: str
    claim_no: int
    temporary: bool


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What a run's waiters are told; `outcome` is None when nobody has read it yet."""

    status: str
    error: dict[str, str] | None
    outcome: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class ClaimState:
    """A running run as the supervisor sees it."""

    run_id: UUID
    claim_no: int
    cancel_action: str | None


def _json(value: Any) -> Jsonb | None:
    return None if value is None else Jsonb(value)


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
        "kwargs": Jsonb(new.kwargs),
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
        kwargs=new.kwargs,
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
        outcome=None,
    )


def get_run(conn: Connection, run_id: UUID) -> Run | None:
    return fetch_one(conn, SQL.get_run, {"run_id": run_id}, Run)


def get_thread_run(
    conn: Connection, thread_id: UUID, run_id: UUID, *, ended_stateless: bool = False
) -> Run | None:
    """A run of this thread. `ended_stateless` also finds what only a waiter may still read."""
    params = {"thread_id": thread_id, "run_id": run_id, "ended_stateless": ended_stateless}
    return fetch_one(conn, SQL.get_thread_run, params, Run)


def run_outcome(conn: Connection, thread_id: UUID, run_id: UUID) -> RunOutcome | None:
    """How a run stands, with what its waiters are told. Also of an ended stateless run."""
    params = {"thread_id": thread_id, "run_id": run_id}
    return fetch_one(conn, SQL.run_outcome, params, RunOutcome)


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
    return fetch_all(conn, SQL.list_runs, params, Run)


def run_is_buried(conn: Connection, run_id: UUID) -> bool:
    """Rolled back, or ended and swept: never to be executed again."""
    return bool(fetch_value(conn, SQL.run_is_buried, {"run_id": run_id}))


def thread_of_buried_run(conn: Connection, run_id: UUID) -> UUID | None:
    value: UUID | None = fetch_value(conn, SQL.thread_of_buried_run, {"run_id": run_id})
    return value


def rollback_reason(conn: Connection, run_id: UUID) -> dict[str, str] | None:
    """Who asked for the rollback of a run that is gone."""
    value: dict[str, str] | None = fetch_value(conn, SQL.rollback_reason, {"run_id": run_id})
    return value


def active_runs_of_thread(conn: Connection, thread_id: UUID) -> list[ActiveRun]:
    """Locked; the thread's row is locked before."""
    return fetch_all(conn, SQL.active_runs_of_thread, {"thread_id": thread_id}, ActiveRun)


def pending_runs_of(conn: Connection, caller: str) -> int:
    """How many a caller has. Whoever asks next waits until this transaction is over."""
    execute(conn, SQL.lock_caller, {"caller": caller})
    return int(fetch_value(conn, SQL.count_pending_runs_of, {"caller": caller}))


def thread_is_busy(conn: Connection, thread_id: UUID) -> bool:
    return bool(fetch_value(conn, SQL.thread_is_busy, {"thread_id": thread_id}))


def oldest_active_graph_id(conn: Connection, thread_id: UUID) -> str | None:
    value: str | None = fetch_value(conn, SQL.oldest_active_graph_id, {"thread_id": thread_id})
    return value


def claim_run(
    conn: Connection, run_id: UUID, *, owner: str, lease_seconds: float
) -> ClaimedRun | None:
    """Take the lease. None: not claimable now, and another doorbell will ring if it ever is."""
    params = {"run_id": run_id, "owner": owner, "lease_seconds": lease_seconds}
    try:
        return fetch_one(conn, SQL.claim_run, params, ClaimedRun)
    except psycopg.errors.UniqueViolation:
        # run_one_running_per_thread: another claim of this thread committed first.
        return None


def held_run(conn: Connection, run_id: UUID, *, owner: str) -> ClaimedRun | None:
    """The run if this very owner has claimed it: asked when the answer to a claim was lost."""
    return fetch_one(conn, SQL.held_run, {"run_id": run_id, "owner": owner}, ClaimedRun)


def renew_leases(
    conn: Connection, claims: Sequence[Claim], *, lease_seconds: float
) -> list[ClaimState]:
    """Those of the claims that still stand."""
    params = {
        "run_ids": [c.run_id for c in claims],
        "claim_nos": [c.claim_no for c in claims],
        "lease_seconds": lease_seconds,
    }
    return fetch_all(conn, SQL.renew_leases, params, ClaimState)


def cancel_actions(conn: Connection, run_ids: Sequence[UUID]) -> list[ClaimState]:
    return fetch_all(conn, SQL.cancel_actions, {"run_ids": list(run_ids)}, ClaimState)


def _ending_params(thread_id: UUID, claim: Claim, ending: Ending) -> dict[str, Any]:
    # A list keeps the order of the questions; keys of an object would be sorted.
    raised = [i for of_task in (ending.interrupts or {}).values() for i in of_task]
    outcome = {"values": ending.values, "interrupts": raised}
    return {
        "run_id": claim.run_id,
        "claim_no": claim.claim_no,
        "thread_id": thread_id,
        "status": ending.status,
        "values": _json(ending.values),
        "values_known": ending.values_known,
        "interrupts": Jsonb(ending.interrupts or {}),
        "error": _json(ending.error),
        "outcome": Jsonb(outcome) if ending.values_known else None,
        "resting_status": ending.resting_status,
    }


def finish_run(conn: Connection, thread_id: UUID, claim: Claim, ending: Ending) -> NextRun | None:
    """Write the end. None: the claim is over, or a cancel was accepted first."""
    params = _ending_params(thread_id, claim, ending)
    return fetch_one(conn, SQL.finish_run, params, NextRun)


def finish_interrupted_run(
    conn: Connection, thread_id: UUID, claim: Claim, ending: Ending
) -> NextRun | None:
    """Write the end of a run whose accepted cancel says `interrupt`."""
    params = _ending_params(thread_id, claim, ending)
    return fetch_one(conn, SQL.finish_interrupted_run, params, NextRun)


def put_run_back(
    conn: Connection, claim: Claim, *, uncharge: bool, rering_seconds: float
) -> Ringable | None:
    """Back to pending. None: the claim is over, or a cancel was accepted."""
    params = {
        "run_id": claim.run_id,
        "claim_no": claim.claim_no,
        "uncharge": int(uncharge),
        "rering_seconds": rering_seconds,
    }
    return fetch_one(conn, SQL.put_run_back, params, Ringable)


def lock_claimed_run(conn: Connection, claim: Claim) -> LockedRun | None:
    params = {"run_id": claim.run_id, "claim_no": claim.claim_no}
    return fetch_one(conn, SQL.lock_claimed_run, params, LockedRun)


def expired_leases(conn: Connection, *, sweeper: str, limit: int) -> list[Claim]:
    """Claims to be judged lost: none while this sweeper may not judge."""
    return fetch_all(conn, SQL.expired_leases, {"sweeper": sweeper, "limit": limit}, Claim)


def lease_is_expired(conn: Connection, claim: Claim) -> bool:
    params = {"run_id": claim.run_id, "claim_no": claim.claim_no}
    return bool(fetch_value(conn, SQL.lease_is_expired, params))


def ring_due_runs(conn: Connection, *, limit: int, rering_seconds: float) -> list[Ringable]:
    params = {"limit": limit, "rering_seconds": rering_seconds}
    return fetch_all(conn, SQL.ring_due_runs, params, Ringable)


def next_runs_of_threads(conn: Connection, thread_ids: Sequence[UUID]) -> list[Ringable]:
    """The head of each idle thread's queue."""
    return fetch_all(conn, SQL.next_runs_of_threads, {"thread_ids": list(thread_ids)}, Ringable)


def cancellable_runs(
    conn: Connection, filter_: CancelFilter, *, after: ActiveRun | None, limit: int
) -> list[ActiveRun]:
    """A page of what a cancel may hit, thread by thread, newest run first."""
    params = filter_.params() | {
        "after_thread_id": None if after is None else after.thread_id,
        "after_seq": None if after is None else after.seq,
        "limit": limit,
    }
    return fetch_all(conn, SQL.cancellable_runs, params, ActiveRun)


def lock_runs(
    conn: Connection, runs: Sequence[ActiveRun], *, status: str | None = None
) -> list[ActiveRun]:
    """Threads first, then their runs in run_id order: the lock order of every writer. Returns
    those that are still active, or still of this status."""
    if not runs:
        return []
    execute(conn, SQL.lock_threads, {"thread_ids": list({run.thread_id for run in runs})})
    params = {"run_ids": [run.run_id for run in runs], "status": status}
    return fetch_all(conn, SQL.lock_runs, params, ActiveRun)


def count_known_runs(conn: Connection, thread_id: UUID | None, run_ids: Sequence[UUID]) -> int:
    params = {"thread_id": thread_id, "run_ids": list(run_ids)}
    return int(fetch_value(conn, SQL.count_known_runs, params))


def flag_running_runs(
    conn: Connection, run_ids: Sequence[UUID], action: CancelAction, reason: dict[str, str]
) -> None:
    params = {"run_ids": list(run_ids), "action": action, "reason": Jsonb(reason)}
    execute(conn, SQL.flag_running_runs, params)


def interrupt_unstarted_runs(
    conn: Connection, run_ids: Sequence[UUID], reason: dict[str, str]
) -> None:
    params = {"run_ids": list(run_ids), "reason": Jsonb(reason)}
    execute(conn, SQL.interrupt_unstarted_runs, params)


def roll_back_unstarted_runs(
    conn: Connection, run_ids: Sequence[UUID], reason: dict[str, str]
) -> None:
    params = {"run_ids": list(run_ids), "reason": Jsonb(reason)}
    execute(conn, SQL.roll_back_unstarted_runs, params)


def end_put_back_run(conn: Connection, run_id: UUID, reason: dict[str, str]) -> None:
    execute(conn, SQL.end_put_back_run, {"run_id": run_id, "reason": Jsonb(reason)})


def set_cancel_reason(conn: Connection, run_id: UUID, reason: dict[str, str]) -> None:
    execute(conn, SQL.set_cancel_reason, {"run_id": run_id, "reason": Jsonb(reason)})


def hide_temporary_threads(conn: Connection, thread_ids: Sequence[UUID]) -> None:
    execute(conn, SQL.hide_temporary_threads, {"thread_ids": list(thread_ids)})


def undo_run(conn: Connection, thread_id: UUID, run_id: UUID) -> None:
    """Everything a run wrote goes, and what it wrote over comes back. In one transaction."""
    params = {"run_id": run_id}
    text = {"run_id": str(run_id), "thread_id": str(thread_id)}
    execute(conn, SQL.restore_before_images, params)
    execute(conn, SQL.delete_checkpoints_of_run, text)
    fault_points.reached(FaultPoint.ROLLING_BACK, run_id)
    execute(conn, SQL.reinsert_before_images, params)
    execute(conn, SQL.restore_thread_marks, params)
    execute(conn, SQL.bury_run, params)


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


def take_sweeper_lease(
    conn: Connection,
    owner: str,
    *,
    seconds: float,
    tolerance_seconds: float,
    patience_seconds: float,
) -> bool:
    """True while this owner is the one that sweeps.

    When nobody swept for longer than the lease and the tolerance, nobody could renew a run's lease
    either: then nobody judges for as long as the patience.
    """
    params = {
        "owner": owner,
        "seconds": seconds,
        "tolerance_seconds": tolerance_seconds,
        "patience_seconds": patience_seconds,
    }
    return fetch_value(conn, SQL.take_sweeper_lease, params) is not None


def drop_sweeper_lease(conn: Connection, owner: str) -> None:
    execute(conn, SQL.drop_sweeper_lease, {"owner": owner})

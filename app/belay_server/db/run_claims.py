"""Claim runs, renew their leases, end them and put them back.

Each function runs the query of its name in `sql/run_claims.sql`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import (
    execute,
    fetch_all,
    fetch_dicts,
    fetch_dicts_once,
    fetch_one,
    fetch_value,
)
from belay_server.db.runs import NextRun, Ringable
from belay_server.domain.run_options import RunKwargs
from belay_server.domain.runs import CancelAction, Claim, ClaimedRun, Ending, Run

SQL = load_queries("run_claims")


@dataclass(frozen=True, slots=True)
class LockedRun(Run):
    """A locked run that is to be ended, and how many seconds ago its cancel was requested."""

    cancel_seconds: float | None


@dataclass(frozen=True, slots=True)
class ClaimState:
    """The fields of a running run that the supervisor needs."""

    run_id: UUID
    claim_no: int
    cancel_action: str | None


def _json(value: Any) -> Jsonb | None:
    return None if value is None else Jsonb(value)


def claim_run(
    conn: Connection,
    run_id: UUID,
    *,
    owner: str,
    lease_seconds: float,
    graph_ids: Sequence[str],
    token_hash: str | None = None,
) -> ClaimedRun | None:
    """Claim a run of one of these graphs: take its lease. Return None if the run cannot be claimed
    now.

    If that changes later, another doorbell is sent. `token_hash` is of the token that authenticates
    the run's code while the claim lasts.
    """
    params = {
        "run_id": run_id,
        "owner": owner,
        "lease_seconds": lease_seconds,
        "graph_ids": list(graph_ids),
        "token_hash": token_hash,
    }
    try:
        return _claimed(fetch_dicts(conn, SQL.claim_run, params))
    except psycopg.errors.UniqueViolation:
        # run_one_running_per_thread: another claim of this thread committed first.
        return None


@dataclass(slots=True)
class ClaimRequest:
    """A run to be claimed, and the hash of the token that authenticates its code while the claim
    lasts."""

    run_id: UUID
    token_hash: str
    #: Whether a claim may have been committed whose response was lost.
    may_be_held: bool = False


def claim_runs(
    conn: Connection,
    requests: Sequence[ClaimRequest],
    *,
    owner: str,
    lease_seconds: float,
    graph_ids: Sequence[str],
) -> dict[str, ClaimedRun]:
    """Claim several runs in one statement, which waits for no lock. Return those that were claimed,
    by token hash: of two requests for the same run, one gets it. Others may be claimable one by
    one.

    Raises psycopg's error of a conflict, without retrying: then none was claimed.
    """
    params = {
        "run_ids": [request.run_id for request in requests],
        "token_hashes": [request.token_hash for request in requests],
        "owner": owner,
        "lease_seconds": lease_seconds,
        "graph_ids": list(graph_ids),
    }
    rows = fetch_dicts_once(conn, SQL.claim_runs, params)
    return {row.pop("token_hash"): _claimed_run(row) for row in rows}


def put_off_unknown_graph(conn: Connection, run_id: UUID, graph_ids: Sequence[str]) -> str | None:
    """Postpone the next doorbell of a pending run whose graph is not among these. Return its graph;
    None if there is no such run."""
    params = {"run_id": run_id, "graph_ids": list(graph_ids)}
    return cast("str | None", fetch_value(conn, SQL.put_off_unknown_graph, params))


def ring_runs_of_graphs(
    conn: Connection, graph_ids: Sequence[str], *, rering_seconds: float
) -> None:
    """Make the pending runs of these graphs due for a ring, if workers without them have postponed
    it."""
    params = {"graph_ids": list(graph_ids), "rering_seconds": rering_seconds}
    execute(conn, SQL.ring_runs_of_graphs, params)


def held_run(
    conn: Connection, run_id: UUID, *, owner: str, token_hash: str | None = None
) -> ClaimedRun | None:
    """Return the run if it was claimed by `owner` with this token, else None.

    This finds a claim that was committed although the connection was lost.
    """
    params = {"run_id": run_id, "owner": owner, "token_hash": token_hash}
    return _claimed(fetch_dicts(conn, SQL.held_run, params))


def _claimed(rows: list[dict[str, Any]]) -> ClaimedRun | None:
    return _claimed_run(rows[0]) if rows else None


def _claimed_run(row: dict[str, Any]) -> ClaimedRun:
    return ClaimedRun(**{**row, "kwargs": RunKwargs.from_document(row["kwargs"])})


def renew_leases(
    conn: Connection, claims: Sequence[Claim], *, lease_seconds: float
) -> list[ClaimState]:
    """Renew the leases. Return the claims that are still valid."""
    params = {
        "run_ids": [c.run_id for c in claims],
        "claim_nos": [c.claim_no for c in claims],
        "lease_seconds": lease_seconds,
    }
    return fetch_all(conn, SQL.renew_leases, params, ClaimState)


def cancel_actions(conn: Connection, run_ids: Sequence[UUID]) -> list[ClaimState]:
    """Return the running ones of these runs, with the action of their cancel."""
    return fetch_all(conn, SQL.cancel_actions, {"run_ids": list(run_ids)}, ClaimState)


def _ending_params(thread_id: UUID, claim: Claim, ending: Ending) -> dict[str, Any]:
    # A list keeps the order of the interrupts. JSONB would sort the keys of an object.
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


def finish_run(
    conn: Connection, thread_id: UUID, claim: Claim, ending: Ending, *, interrupted: bool = False
) -> NextRun | None:
    """Write a run's end. `interrupted`: the run has an accepted `interrupt`, whose status and error
    replace those of `ending`.

    Return None if the lease is lost or another cancel was accepted first.
    """
    cancel_action = CancelAction.INTERRUPT if interrupted else None
    params = {**_ending_params(thread_id, claim, ending), "cancel_action": cancel_action}
    return fetch_one(conn, SQL.finish_run, params, NextRun)


@dataclass(frozen=True, slots=True)
class RunEnding:
    """A run and the end that its graph reached. `is_interrupted`: the run was stopped because of an
    accepted `interrupt`, whose status and error replace those of `ending`."""

    thread_id: UUID
    claim: Claim
    ending: Ending
    is_interrupted: bool = False


@dataclass(frozen=True, slots=True)
class FinishedRun(NextRun):
    """What is next on the thread of a run that has ended, and the time since its cancel."""

    cancel_seconds: float | None


def finish_runs(conn: Connection, ends: Sequence[RunEnding]) -> dict[UUID, FinishedRun]:
    """Write the ends of several runs in one statement, which waits for no lock. Return what it has
    ended, by run. Runs that are left out may be ended one by one.

    Raises psycopg's error of a conflict, without retrying: then no end was written.
    """
    rows = [_ending_params(end.thread_id, end.claim, end.ending) for end in ends]
    params = {name: [row[name] for row in rows] for name in rows[0]}
    params["cancel_action"] = [CancelAction.INTERRUPT if e.is_interrupted else None for e in ends]
    found = fetch_dicts_once(conn, SQL.finish_runs, params)
    return {row.pop("run_id"): FinishedRun(**row) for row in found}


def put_run_back(
    conn: Connection, claim: Claim, *, uncharge: bool, rering_seconds: float
) -> Ringable | None:
    """Set a run back to pending. Return None if the lease is lost or a cancel was accepted.

    `uncharge`: do not count the attempt.
    """
    params = {
        "run_id": claim.run_id,
        "claim_no": claim.claim_no,
        "uncharge": int(uncharge),
        "rering_seconds": rering_seconds,
    }
    return fetch_one(conn, SQL.put_run_back, params, Ringable)


def lock_claimed_run(conn: Connection, claim: Claim) -> LockedRun | None:
    """Lock a run. Return None if it has ended or was claimed again."""
    params = {"run_id": claim.run_id, "claim_no": claim.claim_no}
    return fetch_one(conn, SQL.lock_claimed_run, params, LockedRun)


def expired_leases(
    conn: Connection, *, sweeper: str, limit: int, but: Sequence[UUID] = ()
) -> list[Claim]:
    """Return claims with an expired lease, except those of the runs in `but`.

    There are none while this sweeper may not take runs from their workers.
    """
    params = {"sweeper": sweeper, "limit": limit, "but": list(but)}
    return fetch_all(conn, SQL.expired_leases, params, Claim)


def lease_is_expired(conn: Connection, claim: Claim) -> bool:
    """Return whether a run is running under this claim, with a lease that has expired."""
    params = {"run_id": claim.run_id, "claim_no": claim.claim_no}
    return bool(fetch_value(conn, SQL.lease_is_expired, params))


def uncount_rings(conn: Connection, run_ids: Sequence[UUID]) -> None:
    """Undo the count of `ring_due_runs` for runs whose doorbell could not be sent."""
    execute(conn, SQL.uncount_rings, {"run_ids": list(run_ids)})


@dataclass(frozen=True, slots=True)
class GraphInQueue:
    """A queue and one of the graphs whose runs it has."""

    queue: str
    graph_id: str


def queues_put_off(conn: Connection) -> list[GraphInQueue]:
    """Return the queues and graphs of runs that wait for a claim after their doorbell was sent."""
    return fetch_all(conn, SQL.queues_put_off, {}, GraphInQueue)


def ring_again_at_once(conn: Connection, of: Sequence[GraphInQueue], *, limit: int) -> int:
    """Make postponed doorbells of these graphs due at once. Return how many."""
    params = {
        "queues": [one.queue for one in of],
        "graph_ids": [one.graph_id for one in of],
        "limit": limit,
    }
    return execute(conn, SQL.ring_again_at_once, params)


def ring_due_runs(
    conn: Connection, graph_ids: Sequence[str], *, limit: int, rering_seconds: float
) -> list[Ringable]:
    """Return the runs whose doorbell is due, and postpone their next one: at most `limit` of these
    graphs, and a tenth of that of other graphs."""
    params = {
        "graph_ids": list(graph_ids),
        "limit": limit,
        "unknown_limit": limit // 10,
        "rering_seconds": rering_seconds,
    }
    return fetch_all(conn, SQL.ring_due_runs, params, Ringable)


def next_runs_of_threads(conn: Connection, thread_ids: Sequence[UUID]) -> list[Ringable]:
    """Return the first due run in the queue of each thread that has no running run."""
    return fetch_all(conn, SQL.next_runs_of_threads, {"thread_ids": list(thread_ids)}, Ringable)


def take_sweeper_lease(
    conn: Connection,
    owner: str,
    *,
    seconds: float,
    tolerance_seconds: float,
    grace_seconds: float,
) -> bool:
    """Take or renew the sweeper's lease. Return whether this owner holds it.

    If no sweeper held it for longer than the lease and the tolerance, no worker could renew a run's
    lease either. Then no run is taken from its worker for `grace_seconds`.
    """
    params = {
        "owner": owner,
        "seconds": seconds,
        "tolerance_seconds": tolerance_seconds,
        "grace_seconds": grace_seconds,
    }
    return fetch_value(conn, SQL.take_sweeper_lease, params) is not None


def drop_sweeper_lease(conn: Connection, owner: str) -> None:
    """End the sweeper's lease, so that another worker may take it at once."""
    execute(conn, SQL.drop_sweeper_lease, {"owner": owner})

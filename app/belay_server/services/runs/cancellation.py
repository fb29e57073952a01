"""Cancel runs. Every cancel in the server uses this code.

A transaction records the cancel in the runs' rows, which guarantees it. Then flags are set and
published in Redis, which makes it fast. A run that has not started, or is pending again, ends in
the transaction. A running one is stopped by its worker, and has ended when its row has a terminal
status. A cancel of very many runs is done in batches, each in its own transaction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from belay_server.db import run_cancels as cancel_rows
from belay_server.db import run_claims as claim_rows
from belay_server.db import runs as run_rows
from belay_server.db.postgres.connection import Connection
from belay_server.db.run_cancels import ActiveRun, CancelFilter
from belay_server.db.runs import Ringable
from belay_server.domain.runs import CancelAction, RunStatus
from belay_server.services.parts import Parts, RunParts
from belay_server.services.runs.endings import Announcer, RunEnd

#: Runs per transaction of a bulk cancel. The rows of their threads are locked together.
_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The result of a cancel: running runs, which will stop; and runs that it has ended."""

    running: tuple[ActiveRun, ...]
    ended: tuple[RunEnd, ...]
    next_runs: tuple[Ringable, ...]


def announcer(parts: RunParts) -> Announcer:
    """Return an Announcer that uses the event log, the cancel flags and the doorbell of `parts`."""
    return Announcer(parts.event_log, parts.cancel_flags, parts.doorbell)


def cancel_runs(
    parts: Parts, filter_: CancelFilter, action: CancelAction, reason: dict[str, str]
) -> list[ActiveRun]:
    """Cancel every active run that matches the filter, without waiting for running ones to stop.
    Return the runs as they were before.

    When Postgres fails during a bulk cancel, the runs cancelled so far stay cancelled; the client
    may repeat the request.
    """
    hit: list[ActiveRun] = []
    page: list[ActiveRun] = []

    def cancel_page(conn: Connection) -> tuple[list[ActiveRun], list[ActiveRun], Cancelled]:
        """Return a page of runs, those of it that still match once locked, and their cancel."""
        seen = page[-1] if page else None
        found = cancel_rows.cancellable_runs(conn, filter_, after=seen, limit=_BATCH)
        runs = cancel_rows.lock_runs(conn, found, status=filter_.status)
        return found, runs, cancel_locked_runs(conn, runs, action, reason)

    while True:
        page, runs, cancelled = parts.database.transaction(cancel_page)
        announce_cancelled(parts, cancelled, action)
        hit += runs
        if len(page) < _BATCH:
            return hit


def cancel_locked_runs(
    conn: Connection, runs: Sequence[ActiveRun], action: CancelAction, reason: dict[str, str]
) -> Cancelled:
    """Cancel runs within a transaction. The rows of `runs` and their threads must be locked."""
    running = [run for run in runs if run.status == RunStatus.RUNNING]
    unstarted = [run for run in runs if run.status == RunStatus.PENDING and run.claim_no == 0]
    put_back = [run for run in runs if run.status == RunStatus.PENDING and run.claim_no > 0]
    if running:
        cancel_rows.flag_running_runs(conn, [run.run_id for run in running], action, reason)
    if unstarted:
        _end_unstarted(conn, unstarted, action, reason)
    for run in put_back:
        if action is CancelAction.ROLLBACK:
            cancel_rows.set_cancel_reason(conn, run.run_id, reason)
            cancel_rows.undo_run(conn, run.thread_id, run.run_id)
        else:
            cancel_rows.end_put_back_run(conn, run.run_id, reason)
    ended = [*unstarted, *put_back]
    status = RunStatus.INTERRUPTED if action is CancelAction.INTERRUPT else None
    threads = {run.thread_id for run in ended}
    return Cancelled(
        running=tuple(running),
        ended=tuple(RunEnd(run.run_id, run.claim_no, status) for run in ended),
        next_runs=tuple(claim_rows.next_runs_of_threads(conn, list(threads))) if threads else (),
    )


def _end_unstarted(
    conn: Connection, runs: Sequence[ActiveRun], action: CancelAction, reason: dict[str, str]
) -> None:
    run_ids = [run.run_id for run in runs]
    if action is CancelAction.ROLLBACK:
        cancel_rows.roll_back_unstarted_runs(conn, run_ids, reason)
    else:
        cancel_rows.interrupt_unstarted_runs(conn, run_ids, reason)
    temporary = [run.thread_id for run in runs if run.temporary]
    if temporary:
        cancel_rows.hide_temporary_threads(conn, temporary)


def announce_cancelled(parts: RunParts, cancelled: Cancelled, action: CancelAction) -> None:
    """Set the cancel flags, and announce the ended runs. Call it after the commit. If it is lost,
    the cancel only takes longer."""
    parts.cancel_flags.raise_flags([run.run_id for run in cancelled.running], action)
    tell = announcer(parts)
    tell.announce(cancelled.ended)
    for end in cancelled.ended:
        parts.count_unstarted(end.status)
    tell.ring(cancelled.next_runs)


def wait_until_ended(
    parts: Parts, run_ids: Sequence[UUID], *, seconds: float | None = None
) -> bool:
    """Wait until none of the runs is active. Return False when `seconds` have passed before."""
    deadline = None if seconds is None else time.monotonic() + seconds
    left = list(run_ids)
    subscriptions = {run_id: parts.feed.subscribe(run_id, events=False) for run_id in left}
    try:
        while left:
            # Before the rows are read: an end that is announced after that ends the wait.
            subscriptions[left[0]].rearm()
            with parts.database.connection() as conn:
                ended = run_rows.ended_runs(conn, left)
            left = [run_id for run_id in left if run_id not in ended]
            if left:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                subscriptions[left[0]].wait_for_end(time.monotonic() + 1.0)
        return True
    finally:
        for subscription in subscriptions.values():
            parts.feed.unsubscribe(subscription)


def stop_runs(parts: Parts, filter_: CancelFilter, reason: dict[str, str]) -> None:
    """Cancel the matching runs with `interrupt`, and wait until their work has stopped."""
    hit = cancel_runs(parts, filter_, CancelAction.INTERRUPT, reason)
    wait_until_ended(parts, [run.run_id for run in hit if run.status == RunStatus.RUNNING])

"""Write the end of a run's attempt. The child process, the supervisor, the sweeper and the API use
these functions.

Every statement checks the claim number, the fencing token. What was committed first wins: a cancel
that was accepted before the graph ended replaces the graph's end, and a run that has ended stays
unchanged.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.client import RedisError
from belay_server.bus.event_log import THREAD_DELETED, EventLog, LogEnd
from belay_server.db import run_cancels as cancel_rows
from belay_server.db import run_claims as claim_rows
from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.statements import in_transaction
from belay_server.db.run_claims import FinishedRun, LockedRun, RunEnding
from belay_server.db.runs import Ringable
from belay_server.db.threads import DeletedThread
from belay_server.domain.runs import CancelAction, Claim, Ending, Run, RunStatus
from belay_server.doorbell import Doorbell
from belay_server.graphs.serde import to_json

log = logging.getLogger(__name__)

#: Bytes of an outcome that is sent with the announcement of a run's end, to all web processes.
SMALL_ANSWER = 4096
_EXPONENT = re.compile(rb"[0-9][eE]")


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The end of a run, to be announced. `status` is None for a run that was rolled back.

    `error` is set when no child process could write it to the run's event log.
    """

    run_id: UUID
    claim_no: int
    status: str | None
    next_runs: tuple[Ringable, ...] = ()
    error: dict[str, str] | None = None
    #: The time from the accepted cancel to this end; None when the run was not cancelled.
    cancel_seconds: float | None = None
    #: A small outcome as JSON, for the clients that wait for it. Empty: they read it from the row.
    answer: bytes = b""
    #: The number of the attempt's last event; None if it is not known.
    emitted: int | None = None


@dataclass(frozen=True, slots=True)
class Announcer:
    """Announces committed changes through Redis and the broker. Announcements may be lost, and the
    methods never raise."""

    event_log: EventLog
    cancel_flags: CancelFlags
    doorbell: Doorbell

    def announce(self, ends: Sequence[RunEnd]) -> None:
        """Ring the doorbell for the next runs, and end the waits and streams of the ended runs."""
        for end in ends:
            self.ring(end.next_runs)
        if not ends:
            return
        try:
            self.event_log.append_ends(
                [
                    LogEnd(end.run_id, end.claim_no, end.status, end.error, end.answer, end.emitted)
                    for end in ends
                ]
            )
        except RedisError as error:
            log.warning(
                "cannot publish the ends of %d runs, clients fall back to polling: %s",
                len(ends),
                error,
            )
        # Only a cancelled run has a flag. The flag of a cancel that came too late expires.
        cancelled = [end.run_id for end in ends if end.status in (None, RunStatus.INTERRUPTED)]
        if cancelled:
            self.cancel_flags.lower_flags(cancelled)

    def announce_deleted_threads(self, deleted: Iterable[DeletedThread]) -> None:
        """End the streams of deleted threads, and let their event logs expire."""
        try:
            for thread in deleted:
                self.event_log.append_to_thread(thread.thread_id, THREAD_DELETED, b"{}")
                self.event_log.forget([thread.thread_id, *thread.run_ids])
        except RedisError as error:
            log.warning("cannot end the streams of deleted threads: %s", error)

    def forget_logs(self, run_ids: Sequence[UUID]) -> None:
        """Let the event logs of deleted runs expire soon."""
        try:
            self.event_log.forget(run_ids)
        except RedisError as error:
            log.warning("cannot shorten the expiry of deleted runs' event logs: %s", error)

    def ring(self, runs: Iterable[Ringable]) -> list[UUID]:
        """Ring the doorbell for these runs. Return the ids whose message the broker did not
        accept."""
        return [run.run_id for run in runs if not self.doorbell.ring(run)]


def end_run(conn: Connection, thread_id: UUID, claim: Claim, ending: Ending) -> RunEnd | None:
    """Write the end that the graph reached, or the end of an accepted cancel.

    The call is idempotent: after a lost connection, a second call returns the end that this claim
    has written. Return None when the claim is no longer valid; the current holder of the run then
    writes its end.
    """
    end = end_uncancelled_run(conn, thread_id, claim, ending)
    return end or end_cancelled_run(conn, thread_id, claim, ending)


def end_uncancelled_run(
    conn: Connection, thread_id: UUID, claim: Claim, ending: Ending
) -> RunEnd | None:
    """Write the end that the graph reached. Return None when a cancel was accepted, when this claim
    has written an end, or when it is no longer valid."""
    after = claim_rows.finish_run(conn, thread_id, claim, ending)
    if after is None:
        return None
    end = RunEnd(claim.run_id, claim.claim_no, ending.status, after.ringable)
    return dataclasses.replace(end, answer=ending.answer)


def end_runs(conn: Connection, endings: Sequence[RunEnding]) -> dict[UUID, RunEnd | None]:
    """Write the ends that several graphs reached, or that interrupts were accepted for. Return
    those that were written; the others, such as those of other cancels, are written one by one."""
    after = claim_rows.finish_runs(conn, endings)
    return {
        end.claim.run_id: _end_after(end, after[end.claim.run_id])
        for end in endings
        if end.claim.run_id in after
    }


def _end_after(end: RunEnding, after: FinishedRun) -> RunEnd:
    claim, ending = end.claim, end.ending
    found = RunEnd(claim.run_id, claim.claim_no, ending.status, after.ringable)
    if not end.is_interrupted:
        return dataclasses.replace(found, answer=ending.answer)
    interrupted = RunStatus.INTERRUPTED
    return dataclasses.replace(found, status=interrupted, cancel_seconds=after.cancel_seconds)


def with_small_answer(ending: Ending) -> Ending:
    """Return the end of a successful run with its outcome as JSON, to be announced.

    Without it are outcomes that are large, those with interrupts, which Postgres adds, and those
    with exponents: Postgres writes 1e16 as an integer, and every reader is to get the same.
    """
    if ending.status is not RunStatus.SUCCESS or not ending.values_known or ending.interrupts:
        return ending
    answer = to_json(ending.values if ending.values is not None else {})
    if len(answer) > SMALL_ANSWER or _EXPONENT.search(answer):
        return ending
    return dataclasses.replace(ending, answer=answer)


def end_cancelled_run(
    conn: Connection, thread_id: UUID, claim: Claim, ending: Ending
) -> RunEnd | None:
    """Write the end of an accepted cancel. `ending` has the values reached so far.

    Return None when the claim is no longer valid, or no cancel was accepted.
    """

    def end() -> RunEnd | None:
        thread_rows.lock_thread(conn, thread_id, ended_stateless=True)
        run = claim_rows.lock_claimed_run(conn, claim)
        if run is None or run.status != RunStatus.RUNNING or run.cancel_action is None:
            return None
        return _end_cancelled(conn, run, ending)

    return in_transaction(conn, end) or ended_before(conn, claim)


def ended_before(conn: Connection, claim: Claim) -> RunEnd | None:
    """Return the end that this claim has already written, so that it is announced again in case the
    announcement was lost. Return None when the claim has written no end."""
    run = run_rows.get_run(conn, claim.run_id)
    if run is None:
        thread_id = run_rows.thread_of_tombstone(conn, claim.run_id)
        if thread_id is None:
            return None
        status = None
    elif run.claim_no != claim.claim_no or run.is_active:
        return None
    else:
        thread_id, status = run.thread_id, run.status
    next_runs = claim_rows.next_runs_of_threads(conn, [thread_id])
    return RunEnd(claim.run_id, claim.claim_no, status, tuple(next_runs))


def _end_cancelled(conn: Connection, run: LockedRun, ending: Ending) -> RunEnd | None:
    """Write the end of an accepted cancel. The rows of the thread and the run must be locked."""
    claim = Claim(run.run_id, run.claim_no)
    if run.cancel_action == CancelAction.ROLLBACK:
        cancel_rows.undo_run(conn, run.thread_id, run.run_id)
        next_runs = claim_rows.next_runs_of_threads(conn, [run.thread_id])
        return _cancelled(run, None, tuple(next_runs))
    after = claim_rows.finish_run(conn, run.thread_id, claim, ending, interrupted=True)
    if after is None:
        return None
    return _cancelled(run, RunStatus.INTERRUPTED, after.ringable)


def _cancelled(run: LockedRun, status: str | None, next_runs: tuple[Ringable, ...]) -> RunEnd:
    seconds = run.cancel_seconds
    return RunEnd(run.run_id, run.claim_no, status, next_runs, cancel_seconds=seconds)


def end_for_dead(conn: Connection, thread_id: UUID, claim: Claim, ending: Ending) -> RunEnd | None:
    """Write an end for a dead child process, which could not write the error to the event log."""
    end = end_run(conn, thread_id, claim, ending)
    if end is None or end.status != ending.status:
        return end
    return dataclasses.replace(end, error=ending.error)


#: The end of a run whose child process was killed, so that the values it had reached are unknown.
STOPPED = Ending(RunStatus.INTERRUPTED, values_known=False, has_next=True)


def timed_out(ending: Ending = STOPPED) -> Ending:
    """Return the end of a run that exceeded its time limit, with the values it had reached."""
    return Ending(
        RunStatus.TIMEOUT,
        values=ending.values,
        values_known=ending.values_known,
        has_next=True,
        error={"error": "TimeoutError", "message": "The run exceeded its time limit."},
    )


@dataclass(frozen=True, slots=True)
class Recovery:
    """The outcome of recovering a lost run: it has ended, or it is pending and to be rung for."""

    end: RunEnd | None = None
    ring: Ringable | None = None


def recover_run(
    conn: Connection,
    claim: Claim,
    *,
    max_attempts: int,
    rering_seconds: float,
    only_if_expired: bool,
) -> Recovery:
    """Recover a run whose worker or child process has died.

    A run with an accepted cancel ends; it is never retried. A run without attempts left ends as
    `error`. Any other run becomes pending again and resumes from its last checkpoint. The end of a
    run that has ended is announced again, as the worker may have died before it announced it.
    Nothing is changed when the run has been claimed again, or, for the sweeper
    (`only_if_expired`), when the lease has been renewed.
    """
    run = run_rows.get_run(conn, claim.run_id)
    if run is None or not run.is_active:
        return Recovery(end=ended_before(conn, claim))
    thread_id = run.thread_id

    def recover() -> Recovery:
        thread_rows.lock_thread(conn, thread_id, ended_stateless=True)
        locked = claim_rows.lock_claimed_run(conn, claim)
        if locked is None:
            return Recovery()
        if locked.status == RunStatus.PENDING:
            return Recovery(ring=Ringable(locked.run_id, locked.queue, locked.graph_id))
        if only_if_expired and not claim_rows.lease_is_expired(conn, claim):
            return Recovery()
        if locked.cancel_action is not None:
            return Recovery(end=_end_cancelled(conn, locked, STOPPED))
        if locked.attempts >= max_attempts:
            return Recovery(end=end_for_dead(conn, locked.thread_id, claim, _exhausted(locked)))
        ring = claim_rows.put_run_back(conn, claim, uncharge=False, rering_seconds=rering_seconds)
        return Recovery(ring=ring)

    return in_transaction(conn, recover)


def _exhausted(run: Run) -> Ending:
    times = "once" if run.attempts == 1 else f"{run.attempts} times"
    message = f"The worker died {times} while executing this run; it will not be retried."
    return Ending(
        RunStatus.ERROR,
        values_known=False,
        has_next=True,
        error={"error": "MaxAttemptsExceeded", "message": message},
    )

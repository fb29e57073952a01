"""The sweeper: periodic work that one worker at a time does for all of them.

    due and unrung runs   their doorbell is rung (again)
    lost doorbells        are found after the broker was flushed or unavailable
                          (`lost_doorbells.py`)
    due crons             create their runs
    expired leases        their runs are recovered from a lost worker
    hidden threads        of stateless runs are deleted, after a time to read the outcome
    expired threads       are pruned or deleted, according to their ttl
    expired store items   are deleted

A lease row, like a run's lease, decides which worker sweeps: a holder that dies or hangs loses it.
Every statement checks its own preconditions, so two sweepers at one moment do no harm. A holder
that cannot reach the broker drops the lease after each tick, for a worker that can reach it. None
of this is a Celery task: with all slots busy on long runs such a task would never start.

Failures are isolated: each part of a tick is tried separately, and within a part each cron, run and
thread (`app/belay_server/services/quarantine.py`). Only an outage of Postgres ends a tick.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from belay_server.db import run_claims as claim_rows
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.connection import Connection, connect
from belay_server.db.postgres.outages import is_outage
from belay_server.db.postgres.statements import in_transaction
from belay_server.db.store import delete_expired_items
from belay_server.domain.metrics import EXPIRED_THREADS, HIDDEN_THREADS, LOST_RUNS, RECOVERED
from belay_server.domain.runs import Claim
from belay_server.services.cron_firing import fire_due_crons
from belay_server.services.parts import RunParts
from belay_server.services.quarantine import Quarantine
from belay_server.services.runs.cancellation import announcer
from belay_server.services.runs.endings import Recovery, recover_run
from belay_server.services.threads.pruning import expire_threads
from belay_server.services.time_slice import TimeSlice
from belay_workers.background.lost_doorbells import LostDoorbells
from belay_workers.background_thread import BackgroundThread
from belay_workers.counters import Counters

log = logging.getLogger(__name__)

#: The sweeper's lease as a fraction of a run's. It is shorter, so an outage in which runs' leases
#: expire also makes the sweeper's expire.
_LEASE_PART = 0.6
_BATCH = 200
_BATCH_OF_ITEMS = 5_000
#: Each cron creates a run in its own transaction; a batch takes about half a second.
_BATCH_OF_CRONS = 50
#: The parts of a tick whose items clients make leave the rest for the next tick after this time. An
#: item may be large: a cron with an input of megabytes, a thread with gigabytes of history.
_SLICE_SECONDS = 0.5
#: A queue with this many messages has not lost its doorbells: its workers are busy, and ringing
#: again would only lengthen it.
_DEEP = 1_000
#: Seconds after its end during which clients can still read the outcome of a stateless run.
_HIDDEN_SECONDS = 60.0
_TIDY_EVERY_SECONDS = 10.0


class Sweeper:
    """A thread in each worker's parent process; only the holder of the lease sweeps."""

    def __init__(self, parts: RunParts, owner: str, counters: Counters | None = None) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._owner = owner
        self._announcer = announcer(parts)
        self._counters = counters
        self._lost_doorbells = LostDoorbells(parts.doorbell, seconds=parts.settings.rering_seconds)
        self._lost_runs = self._quarantine("the lost run", LOST_RUNS)
        self._hidden = self._quarantine("the hidden thread", HIDDEN_THREADS)
        self._expired = self._quarantine("the expired thread", EXPIRED_THREADS)
        self._broker_is_away = False
        self._tidy_at = 0.0
        self._stopping = threading.Event()
        self._thread = BackgroundThread("sweeper", self._sweep_while_connected, self._stopping)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(3.0)

    def _quarantine(self, what: str, counted: str) -> Quarantine:
        def count() -> None:
            if self._counters is not None:
                self._counters.set_aside(counted)

        return Quarantine(what, on_set_aside=count)

    def _sweep_while_connected(self) -> None:
        with connect(
            self._settings.database_url, pgbouncer=self._settings.pgbouncer, name="belay sweeper"
        ) as conn:
            while not self._stopping.is_set():
                if self._holds_lease(conn):
                    self._sweep(conn)
                self._stopping.wait(self._settings.sweep_seconds)
            claim_rows.drop_sweeper_lease(conn, self._owner)

    def _sweep(self, conn: Connection) -> None:
        """Do one tick. Raises only the error of an outage."""
        self._broker_is_away = False
        self._try("crons", lambda: self._fire_crons(conn))
        self._try("lost doorbells", lambda: self._find_lost_doorbells(conn))
        self._try("due runs", lambda: self._ring_due(conn))
        self._try("lost runs", lambda: self._take_from_the_gone(conn))
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + _TIDY_EVERY_SECONDS
            self._try("runs of known graphs", lambda: self._ring_put_off(conn))
            self._try("hidden threads", lambda: self._delete_hidden(conn))
            self._try("expired threads", lambda: self._expire_threads(conn))
            self._try("expired items", lambda: delete_expired_items(conn, limit=_BATCH_OF_ITEMS))
        if self._broker_is_away:
            # Every other worker tries to take the lease before this one does again.
            claim_rows.drop_sweeper_lease(conn, self._owner)

    def _try(self, what: str, part: Callable[[], object]) -> None:
        try:
            part()
        except Exception as error:
            if is_outage(error):
                raise
            log.exception("sweeper: %s failed; continuing with the rest", what)

    def _holds_lease(self, conn: Connection) -> bool:
        lease = self._settings.lease_seconds
        return claim_rows.take_sweeper_lease(
            conn,
            self._owner,
            seconds=lease * _LEASE_PART,
            tolerance_seconds=max(lease * 0.1, self._settings.sweep_seconds * 2),
            grace_seconds=lease,
        )

    def _ring_due(self, conn: Connection) -> None:
        rering = self._settings.rering_seconds
        due = claim_rows.ring_due_runs(
            conn, self._parts.graphs.graph_ids, limit=_BATCH, rering_seconds=rering
        )
        doorbell = self._parts.doorbell
        queues = {run: doorbell.queue_of(run.queue, run.graph_id) for run in due}
        deep = {one for one in set(queues.values()) if (doorbell.waiting(one) or 0) >= _DEEP}
        not_rung = self._announcer.ring([run for run, queue in queues.items() if queue not in deep])
        if not_rung:
            # A ring that was not sent is not counted; the run stays due for the next sweep.
            self._broker_is_away = True
            claim_rows.uncount_rings(conn, not_rung)

    def _ring_put_off(self, conn: Connection) -> None:
        claim_rows.ring_runs_of_graphs(
            conn,
            self._parts.graphs.graph_ids,
            rering_seconds=self._settings.rering_seconds,
        )

    def _find_lost_doorbells(self, conn: Connection) -> None:
        if not self._lost_doorbells.find(conn):
            self._broker_is_away = True

    def _fire_crons(self, conn: Connection) -> None:
        time_slice = TimeSlice(_SLICE_SECONDS)
        fire_due_crons(self._parts, conn, limit=_BATCH_OF_CRONS, time_slice=time_slice)

    def _take_from_the_gone(self, conn: Connection) -> None:
        for claim in claim_rows.expired_leases(
            conn, sweeper=self._owner, limit=_BATCH, but=self._lost_runs.put_off()
        ):
            self._lost_runs.handle(claim.run_id, partial(self._recover, conn, claim))

    def _recover(self, conn: Connection, claim: Claim) -> None:
        recovery = recover_run(
            conn,
            claim,
            max_attempts=self._settings.max_attempts,
            rering_seconds=self._settings.rering_seconds,
            only_if_expired=True,
        )
        run_id = str(claim.run_id)
        if recovery.end is not None:
            log.warning(
                "the lease of run %s expired, as its worker died or could not renew it; "
                "the run has ended: %s",
                run_id,
                recovery.end.status or "rolled back",
                extra={"run_id": run_id},
            )
            self._announcer.announce([recovery.end])
        elif recovery.ring is not None:
            log.warning(
                "the lease of run %s expired, as its worker died or could not renew it; "
                "the run is pending again",
                run_id,
                extra={"run_id": run_id},
            )
            self._announcer.ring([recovery.ring])
        self._count(recovery)

    def _count(self, recovery: Recovery) -> None:
        if self._counters is None or (recovery.end is None and recovery.ring is None):
            return
        self._counters.lease_lost("sweeper")
        if recovery.end is not None:
            self._counters.ended(recovery.end, RECOVERED, None)

    def _delete_hidden(self, conn: Connection) -> None:
        delete = thread_rows.delete_hidden_thread
        hidden = thread_rows.hidden_threads(
            conn, seconds=_HIDDEN_SECONDS, limit=_BATCH, but=self._hidden.put_off()
        )
        for thread_id in TimeSlice(_SLICE_SECONDS).take(hidden):
            work = partial(in_transaction, conn, partial(delete, conn, thread_id))
            gone = self._hidden.handle(thread_id, work)
            if gone is not None:
                self._announcer.forget_logs(gone.run_ids)

    def _expire_threads(self, conn: Connection) -> None:
        time_slice = TimeSlice(_SLICE_SECONDS)
        deleted = expire_threads(conn, self._expired, limit=_BATCH, time_slice=time_slice)
        self._announcer.announce_deleted_threads(deleted)

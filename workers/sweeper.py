"""The sweeper: what must happen even if nobody is there to do it. One worker at a time.

    due and unrung runs   their doorbell is rung (again)
    due crons             create their runs
    expired leases        their runs are taken from a worker that is gone
    hidden threads        of stateless runs are deleted, once waiters had time to read the outcome
    expired threads       are pruned or deleted, as their ttl says
    expired store items   are deleted

Which worker sweeps is decided by a lease row, like a run's: a holder that dies or hangs loses it.
Every statement is guarded by itself, so two sweepers for a moment do no harm. None of this runs as
a Celery task: with every slot busy on long runs it would starve.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from app.db import run_claims as claim_rows
from app.db import threads as thread_rows
from app.db.connection import OUTAGE, Connection, connect, in_transaction
from app.db.store import delete_expired_items
from app.domain.metrics import RECOVERED
from app.services.cancellation import announcer
from app.services.cron_firing import fire_due_crons
from app.services.parts import RunParts
from app.services.run_attempts import Recovery, recover_run
from app.services.thread_pruning import expire_threads
from workers.tallies import Tally

log = logging.getLogger(__name__)

#: The sweeper's own lease, as a part of a run's: it ends before a run's does, so an outage that was
#: long enough for runs to look lost was long enough for the sweeper too.
_LEASE_PART = 0.6
_RETRY_SECONDS = 1.0
_BATCH = 200
_BATCH_OF_ITEMS = 5_000
#: A queue with this many messages has not lost its doorbells; its workers are busy. Ringing again
#: would only pile up more of them.
_DEEP = 1_000
#: How long the outcome of a stateless run can still be read by those who wait for it.
_HIDDEN_SECONDS = 60.0
_TIDY_EVERY_SECONDS = 10.0


class Sweeper:
    """One thread in each worker's parent; only the one with the lease sweeps."""

    def __init__(self, parts: RunParts, owner: str, tally: Tally | None = None) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._owner = owner
        self._announcer = announcer(parts)
        self._tally = tally
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="belay-sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(3.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._sweep_while_connected()
            except OUTAGE as error:
                log.warning("sweeper lost Postgres: %s", error)
            except Exception:
                log.exception("sweeper failed, going on")
            self._stopping.wait(_RETRY_SECONDS)

    def _sweep_while_connected(self) -> None:
        with connect(
            self._settings.database_url, pgbouncer=self._settings.pgbouncer, name="belay sweeper"
        ) as conn:
            tidy_at = 0.0
            while not self._stopping.is_set():
                if self._holds_lease(conn):
                    fire_due_crons(self._parts, conn, limit=_BATCH)
                    self._ring_due(conn)
                    self._take_from_the_gone(conn)
                    if time.monotonic() >= tidy_at:
                        tidy_at = time.monotonic() + _TIDY_EVERY_SECONDS
                        self._delete_hidden(conn)
                        self._expire_threads(conn)
                        delete_expired_items(conn, limit=_BATCH_OF_ITEMS)
                self._stopping.wait(self._settings.sweep_seconds)
            claim_rows.drop_sweeper_lease(conn, self._owner)

    def _holds_lease(self, conn: Connection) -> bool:
        lease = self._settings.lease_seconds
        return claim_rows.take_sweeper_lease(
            conn,
            self._owner,
            seconds=lease * _LEASE_PART,
            tolerance_seconds=max(lease * 0.1, self._settings.sweep_seconds * 2),
            patience_seconds=lease,
        )

    def _ring_due(self, conn: Connection) -> None:
        rering = self._settings.rering_seconds
        due = claim_rows.ring_due_runs(conn, limit=_BATCH, rering_seconds=rering)
        queues = {run.queue for run in due}
        deep = {queue for queue in queues if self._announcer.doorbell.waiting(queue) >= _DEEP}
        self._announcer.ring([run for run in due if run.queue not in deep])

    def _take_from_the_gone(self, conn: Connection) -> None:
        for claim in claim_rows.expired_leases(conn, sweeper=self._owner, limit=_BATCH):
            recovery = recover_run(
                conn,
                claim,
                max_attempts=self._settings.max_attempts,
                rering_seconds=self._settings.rering_seconds,
                only_if_expired=True,
            )
            if recovery.end is not None:
                self._announcer.announce([recovery.end])
            elif recovery.ring is not None:
                run_id = str(claim.run_id)
                log.warning(
                    "lease of run %s expired; it will be tried again",
                    run_id,
                    extra={"run_id": run_id},
                )
                self._announcer.ring([recovery.ring])
            self._count(recovery)

    def _count(self, recovery: Recovery) -> None:
        if self._tally is None or (recovery.end is None and recovery.ring is None):
            return
        self._tally.lease_lost("sweeper")
        if recovery.end is not None:
            self._tally.ended(recovery.end, RECOVERED, None)

    def _delete_hidden(self, conn: Connection) -> None:
        for thread_id in thread_rows.hidden_threads(conn, seconds=_HIDDEN_SECONDS, limit=_BATCH):
            in_transaction(conn, partial(thread_rows.delete_hidden_thread, conn, thread_id))

    def _expire_threads(self, conn: Connection) -> None:
        deleted = expire_threads(conn, limit=_BATCH)
        self._announcer.announce_deleted_threads(deleted)

"""The sweeper: what must happen even if nobody is there to do it. One worker at a time.

    due and unrung runs   their doorbell is rung (again)
    expired leases        their runs are taken from a worker that is gone
    hidden threads        of stateless runs are deleted, once waiters had time to read the outcome

Which worker sweeps is decided by a lease row, like a run's: a holder that dies or hangs loses it.
Every statement is guarded by itself, so two sweepers for a moment do no harm. None of this runs as
a Celery task: with every slot busy on long runs it would starve.
"""

from __future__ import annotations

import logging
import threading
import time

import psycopg

from app.db import runs as run_rows
from app.db import threads as thread_rows
from app.db.connection import Connection, connect
from app.services.run_attempts import Announcer, recover_run
from app.settings import Settings

log = logging.getLogger(__name__)

_LEASE = "sweeper"
_LEASE_SECONDS = 6.0
_RETRY_SECONDS = 1.0
_BATCH = 200
#: How long the outcome of a stateless run can still be read by those who wait for it.
_HIDDEN_SECONDS = 60.0
_HIDDEN_EVERY_SECONDS = 10.0


class Sweeper:
    """One thread in each worker's parent; only the one with the lease sweeps."""

    def __init__(self, settings: Settings, owner: str, announcer: Announcer) -> None:
        self._settings = settings
        self._owner = owner
        self._announcer = announcer
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="belay-sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(3.0)

    def _run(self) -> None:
        # Right after an outage every lease looks expired; their owners get one lease to renew.
        patience = 0.0
        while not self._stopping.is_set():
            try:
                self._sweep_until_lost(judge_after=time.monotonic() + patience)
            except psycopg.OperationalError as error:
                log.warning("sweeper lost Postgres: %s", error)
            except Exception:
                log.exception("sweeper failed, going on")
            patience = self._settings.lease_seconds
            self._stopping.wait(_RETRY_SECONDS)

    def _sweep_until_lost(self, *, judge_after: float) -> None:
        with connect(
            self._settings.database_url, pgbouncer=self._settings.pgbouncer, name="belay sweeper"
        ) as conn:
            hidden_at = 0.0
            while not self._stopping.is_set():
                if self._holds_lease(conn):
                    self._ring_due(conn)
                    now = time.monotonic()
                    if now >= judge_after:
                        self._take_from_the_gone(conn)
                    if now >= hidden_at:
                        hidden_at = now + _HIDDEN_EVERY_SECONDS
                        self._delete_hidden(conn)
                self._stopping.wait(self._settings.sweep_seconds)
            run_rows.drop_scheduler_lease(conn, _LEASE, self._owner)

    def _holds_lease(self, conn: Connection) -> bool:
        return run_rows.take_scheduler_lease(conn, _LEASE, self._owner, seconds=_LEASE_SECONDS)

    def _ring_due(self, conn: Connection) -> None:
        rering = self._settings.rering_seconds
        due = run_rows.ring_due_runs(conn, limit=_BATCH, rering_seconds=rering)
        self._announcer.ring(due)

    def _take_from_the_gone(self, conn: Connection) -> None:
        for claim in run_rows.expired_leases(conn, limit=_BATCH):
            recovery = recover_run(
                conn,
                claim,
                max_attempts=self._settings.max_attempts,
                rering_seconds=self._settings.rering_seconds,
                only_if_expired=True,
            )
            if recovery.end is not None:
                self._announcer.announce(recovery.end)
            elif recovery.ring is not None:
                log.warning("lease of run %s expired; it will be tried again", claim.run_id)
                self._announcer.ring([recovery.ring])

    def _delete_hidden(self, conn: Connection) -> None:
        for thread_id in thread_rows.hidden_threads(conn, seconds=_HIDDEN_SECONDS, limit=_BATCH):
            with conn.transaction():
                thread_rows.delete_thread(conn, thread_id)

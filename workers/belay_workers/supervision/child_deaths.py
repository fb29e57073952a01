"""Recover the runs of dead children: write their end, or make them pending again."""

from __future__ import annotations

import logging
import queue
import threading
import time

import psycopg

from belay_server.configuration.settings import Settings
from belay_server.db import run_claims as claim_rows
from belay_server.db import runs as run_rows
from belay_server.db.postgres.connection import Connection, connect
from belay_server.db.postgres.outages import is_worth_waiting
from belay_server.db.runs import Ringable
from belay_server.domain.metrics import KILLED, RECOVERED
from belay_server.domain.runs import Claim, RunStatus
from belay_server.services.runs.endings import (
    STOPPED,
    Announcer,
    RunEnd,
    end_cancelled_run,
    end_for_dead,
    recover_run,
    timed_out,
)
from belay_workers.slots import Phase, Reading, SlotTable, StopReason
from belay_workers.supervision.stopper import Death, about

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5


class ChildDeaths:
    """A queue of dead children. `write_ends` is the body of a thread."""

    def __init__(
        self, settings: Settings, slots: SlotTable, owner: str, announcer: Announcer
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._owner = owner
        self._announcer = announcer
        self._deaths: queue.Queue[Death | None] = queue.Queue()

    def add(self, death: Death) -> None:
        self._deaths.put(death)

    @property
    def any_left(self) -> bool:
        return self._deaths.unfinished_tasks > 0

    def stop(self) -> None:
        """End `write_ends` once it has handled what was added before."""
        self._deaths.put(None)

    def write_ends(self, stopping: threading.Event) -> None:
        try:
            with connect(
                self._settings.database_url,
                pgbouncer=self._settings.pgbouncer,
                name="belay supervisor end",
            ) as conn:
                while not stopping.is_set():
                    death = self._deaths.get()
                    try:
                        if death is None:
                            return
                        self._write(conn, death)
                    finally:
                        self._deaths.task_done()
        except psycopg.Error as error:
            if not is_worth_waiting(error):
                raise
            log.warning("cannot write the ends of runs whose child died; retrying: %s", error)
            stopping.wait(_RETRY_SECONDS)

    def _write(self, conn: Connection, death: Death) -> None:
        """Write the end of one run, or make it pending again.

        Raises only errors after which a retry may succeed; the death is then queued again.
        """
        try:
            self._end_for_dead(conn, death)
        except Exception as error:
            if is_worth_waiting(error):
                self._deaths.put(death)
                raise
            # Its lease lapses; then the sweeper retries with a growing delay and logs it.
            log.exception(
                "cannot write the end of run %s; leaving it to the sweeper", death.reading.run_id
            )

    def _end_for_dead(self, conn: Connection, death: Death) -> None:
        reading = death.reading
        claim = self._claim_of(conn, reading)
        if claim is None or death.reason is StopReason.LEASE_LOST:
            return
        thread_id = reading.thread_id
        if death.reason is StopReason.CANCEL:
            end = end_cancelled_run(conn, thread_id, claim, STOPPED)
        elif death.reason is StopReason.TIMEOUT:
            end = end_for_dead(conn, thread_id, claim, timed_out())
        elif death.reason is StopReason.DRAIN or not death.is_fault:
            self._put_back(conn, death, claim)
            return
        else:
            self._recover(conn, death, claim)
            return
        if end is not None:
            self._announce(end, death)

    def _announce(self, end: RunEnd, death: Death) -> None:
        self._announcer.announce([end])
        started = death.reading.claimed_at if death.reading.is_busy else 0.0
        how = RECOVERED if death.reason is StopReason.NONE else KILLED
        self._slots.counters.ended(end, how, time.monotonic() - started if started else None)

    def _claim_of(self, conn: Connection, reading: Reading) -> Claim | None:
        """Return the claim that a dead child held; None if it held none.

        For a child that died while claiming, the run's row decides.
        """
        if reading.phase is not Phase.CLAIMING:
            return reading.claim
        run = run_rows.get_run(conn, reading.run_id)
        if run is None:
            return None
        if run.status == RunStatus.PENDING:  # its doorbell was lost with the child
            self._announcer.ring([Ringable(run.run_id, run.queue, run.graph_id)])
        if run.lease_owner != f"{self._owner}/{reading.pid}":
            return None
        return Claim(run.run_id, run.claim_no)

    def _put_back(self, conn: Connection, death: Death, claim: Claim) -> None:
        rering = self._settings.rering_seconds
        ring = claim_rows.put_run_back(conn, claim, uncharge=True, rering_seconds=rering)
        if ring is not None:
            self._announcer.ring([ring])
            return
        end = end_cancelled_run(conn, death.reading.thread_id, claim, STOPPED)
        if end is not None:
            self._announce(end, death)

    def _recover(self, conn: Connection, death: Death, claim: Claim) -> None:
        recovery = recover_run(
            conn,
            claim,
            max_attempts=self._settings.max_attempts,
            rering_seconds=self._settings.rering_seconds,
            only_if_expired=False,
        )
        if recovery.end is not None:
            log.warning(
                "the child process of run %s died; the run has ended: %s",
                claim.run_id,
                recovery.end.status or "rolled back",
                extra=about(death.reading),
            )
            self._announce(recovery.end, death)
        elif recovery.ring is not None:
            log.warning(
                "the child process of run %s died; the run is pending again",
                claim.run_id,
                extra=about(death.reading),
            )
            self._announcer.ring([recovery.ring])

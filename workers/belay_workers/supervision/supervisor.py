"""The supervisor: renews the leases of a worker's runs, detects cancels, and stops runs.

It runs in the worker's parent process and never executes graph code, so a graph cannot stall it.
Four threads keep a failure of one part from affecting the others:

    watch    Redis: reads flags and nudges, hints that a run may have been cancelled
    keep     Postgres: renews leases, and checks each hint against the run's row (the guarantee)
    stop     no network I/O: ask, then kill; time limits; deaths of children (`stopper.py`)
    end      Postgres: writes the end of runs whose child is dead (`child_deaths.py`)
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import psycopg

from belay_server.bus.cancel_flag import CancelFlags, CancelNudges
from belay_server.bus.client import Keys, RedisError, connect_redis
from belay_server.configuration.settings import Settings
from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.connection import Connection, connect
from belay_server.db.postgres.outages import is_worth_waiting
from belay_server.domain.runs import Claim
from belay_server.services.runs.endings import Announcer
from belay_workers.background_thread import BackgroundThread
from belay_workers.slots import Phase, Reading, SlotTable, StopReason
from belay_workers.supervision import processes
from belay_workers.supervision.child_deaths import ChildDeaths
from belay_workers.supervision.orphans import Orphans
from belay_workers.supervision.stop_requests import StopRequests
from belay_workers.supervision.stopper import Stopper, about

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.02
_RETRY_SECONDS = 0.5
#: Seconds that a drain may take, after its grace period, to stop the remaining runs.
_DRAIN_END_SECONDS = 5.0


class Supervisor:
    """The supervisor of one worker.

    Call `start` after the pool, and `drain` when the worker shuts down.
    """

    def __init__(
        self,
        settings: Settings,
        slots: SlotTable,
        owner: str,
        announcer: Announcer,
        *,
        orphans: Orphans,
        on_death: Callable[[], None],
        isolate: Callable[[int, str], None],
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._stopping = threading.Event()
        self._hints: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        self._flags_lost = False
        #: Claims that were over at the last renewal while their child was writing the end.
        self._ending: set[Claim] = set()
        self._requests = StopRequests()
        self._dead = ChildDeaths(settings, slots, owner, announcer)
        stopper = Stopper(
            slots,
            self._requests,
            grace_seconds=settings.cancel_grace_ms / 1000,
            orphans=orphans,
            on_death=self._dead.add,
            on_free=on_death,
            isolate=isolate,
            share_again=slots.share_again,
        )
        self._threads = [
            BackgroundThread(name, body, self._stopping)
            for name, body in (
                ("supervisor-flags", self._watch),
                ("supervisor-leases", self._keep),
                ("supervisor-stops", partial(stopper.run, self._stopping)),
                ("supervisor-ends", partial(self._dead.write_ends, self._stopping)),
            )
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def drain(self) -> None:
        """Claim no more runs, wait for the running ones, put the rest back, end the children.

        The wait takes up to the drain grace period. Putting back takes up to 5 s more.
        """
        self._slots.start_draining()
        self._wait_until_idle(self._settings.drain_grace_seconds)
        deadline = time.monotonic() + _DRAIN_END_SECONDS
        while self._working() and time.monotonic() < deadline:
            for claim in self._slots.busy_claims():
                if claim not in self._requests:
                    self._requests.add(claim, StopReason.DRAIN)
            time.sleep(_TICK_SECONDS)
        self._stopping.set()
        self._hints.put(None)
        self._dead.stop()
        self._requests.wake()
        for thread in self._threads:
            thread.join(2.0)
        self._end_children()

    def _end_children(self) -> None:
        """Kill all children.

        A run that could not be put back (for example while Postgres is unavailable) is left to
        another worker's sweeper; its child must not outlive the supervisor.
        """
        for reading in self._slots.read_all():
            if reading.is_busy:
                log.warning(
                    "drain: run %s could not be put back; leaving it to another worker's sweeper",
                    reading.run_id,
                    extra=about(reading),
                )
        for pid in self._slots.pids():
            processes.stop(pid)
            processes.kill_tree(pid)

    def _wait_until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._working() and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)

    def _working(self) -> bool:
        claiming = any(r.phase is not Phase.IDLE for r in self._slots.read_all())
        return claiming or self._dead.any_left

    def _busy(self) -> list[Reading]:
        return [reading for reading in self._slots.read_all() if reading.is_busy]

    # -- watch: Redis ---------------------------------------------------------------------------

    def _watch(self) -> None:
        """Collect hints from Redis: one MGET for all runs at each poll, and after each nudge."""
        keys = Keys(self._settings.redis_prefix)
        client = connect_redis(self._settings, timeout=1.0)
        flags = CancelFlags(client, keys)
        try:
            nudges = CancelNudges(client, keys)
            if self._flags_lost:
                log.warning("cancel flags can be read again")
                self._flags_lost = False
            while not self._stopping.is_set():
                nudged = nudges.wait(self._settings.cancel_poll_ms / 1000)
                running = {claim.run_id: claim for claim in self._slots.busy_claims()}
                raised = flags.raised_flags(list(running))
                for run_id in raised | (nudged & running.keys()):
                    if running[run_id] not in self._requests:
                        self._hints.put(running[run_id])
        except RedisError as error:
            if not self._flags_lost:
                log.warning(
                    "cannot read cancel flags; reading cancels with the lease renewal: %s", error
                )
                self._flags_lost = True
            self._stopping.wait(_RETRY_SECONDS)
        finally:
            client.close()

    # -- keep: Postgres -------------------------------------------------------------------------

    def _keep(self) -> None:
        """Renew leases in time; between renewals, check the rows of hinted runs."""
        try:
            with connect(
                self._settings.database_url,
                pgbouncer=self._settings.pgbouncer,
                name="belay supervisor keep",
            ) as conn:
                renew_at = 0.0
                while not self._stopping.is_set():
                    if time.monotonic() >= renew_at:
                        self._renew(conn)
                        renew_at = time.monotonic() + self._settings.lease_renewal_seconds
                    with suppress(queue.Empty):
                        left = max(0.0, renew_at - time.monotonic())
                        self._look_at(conn, self._hints.get(timeout=left))
        except psycopg.Error as error:
            if not is_worth_waiting(error):
                raise
            # A lease may be renewed late while no process has taken it over. The sweeper judges no
            # lease right after an outage.
            log.warning("cannot renew leases; retrying: %s", error)
            self._stopping.wait(_RETRY_SECONDS)

    def _renew(self, conn: Connection) -> None:
        claims = self._slots.busy_claims()
        if not claims:
            return
        states = claim_rows.renew_leases(conn, claims, lease_seconds=self._settings.lease_seconds)
        standing = {Claim(state.run_id, state.claim_no) for state in states}
        for state in states:
            if state.cancel_action is not None:
                self._stop_later(Claim(state.run_id, state.claim_no), StopReason.CANCEL)
        for claim in self._lost(set(claims) - standing):
            self._stop_later(claim, StopReason.LEASE_LOST)

    def _lost(self, missing: set[Claim]) -> set[Claim]:
        """Return those of the `missing` claims whose lease is lost.

        A child that is writing the end may have ended its claim itself. It has until the next
        renewal to finish.
        """
        phases = {reading.claim: reading.phase for reading in self._busy()}
        ending = {claim for claim in missing if phases.get(claim) is Phase.FINISHING}
        lost = {claim for claim in missing if claim in phases} - (ending - self._ending)
        self._ending = ending
        return lost

    def _look_at(self, conn: Connection, first: Claim | None) -> None:
        """Check hinted claims against their rows, and ignore hints that a row does not confirm."""
        hinted = [first]
        with suppress(queue.Empty):
            while True:
                hinted.append(self._hints.get_nowait())
        run_ids = list({claim.run_id for claim in hinted if claim is not None})
        for state in claim_rows.cancel_actions(conn, run_ids) if run_ids else []:
            if state.cancel_action is not None:
                self._stop_later(Claim(state.run_id, state.claim_no), StopReason.CANCEL)

    def _stop_later(self, claim: Claim, reason: StopReason) -> None:
        if self._requests.add(claim, reason) and reason is StopReason.LEASE_LOST:
            self._slots.counters.lease_lost("owner")

"""The supervisor: keeps the leases of a worker's runs, sees their cancels, and stops them.

It lives in the worker's parent process and never executes graph code, so nothing a graph does can
stall it. Four threads, so that no trouble of one part reaches another:

    watch    flags and nudges in Redis: which runs may have been cancelled (a hint)
    keep     Postgres: renews leases, and asks the rows whether a hint is true (the guarantee)
    stop     no I/O at all: ask, then kill; timeouts; deaths of children (`stopper.py`)
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
from belay_server.db import run_claims as claim_rows
from belay_server.db.connection import Connection, connect
from belay_server.db.outages import is_worth_waiting
from belay_server.domain.runs import Claim
from belay_server.services.runs.endings import Announcer
from belay_server.settings import Settings
from belay_workers.slots import Phase, Reading, SlotTable, StopReason
from belay_workers.supervision import processes
from belay_workers.supervision.child_deaths import ChildDeaths
from belay_workers.supervision.orphans import Orphans
from belay_workers.supervision.stopper import Stopper, StopRequests, about

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.02
_RETRY_SECONDS = 0.5
#: After the drain's grace, how long its own asks, kills and endings may take.
_DRAIN_END_SECONDS = 5.0


class Supervisor:
    """Start after the pool has forked; `drain` when the worker is told to stop."""

    def __init__(
        self,
        settings: Settings,
        slots: SlotTable,
        owner: str,
        announcer: Announcer,
        *,
        orphans: Orphans,
        on_death: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._stopping = threading.Event()
        self._hints: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        self._flags_lost = False
        #: Claims that did not stand at the last renewal, with their end being written.
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
        )
        self._threads = [
            threading.Thread(
                target=partial(self._keep_going, name, loop), name=f"belay-{name}", daemon=True
            )
            for name, loop in (
                ("watch", self._watch),
                ("keep", self._keep),
                ("stop", partial(stopper.run, self._stopping)),
                ("end", partial(self._dead.write_ends, self._stopping)),
            )
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def drain(self) -> None:
        """Take no new runs, give the running ones the grace, put the rest back."""
        self._slots.start_draining()
        self._wait_until_idle(self._settings.drain_grace_seconds)
        deadline = time.monotonic() + _DRAIN_END_SECONDS
        while self._working() and time.monotonic() < deadline:
            for reading in self._busy():
                if reading.claim not in self._requests:
                    self._requests.add(reading.claim, StopReason.DRAIN)
            time.sleep(_TICK_SECONDS)
        self._stopping.set()
        self._hints.put(None)
        self._dead.stop()
        self._requests.wake()
        for thread in self._threads:
            thread.join(2.0)
        self._end_children()

    def _end_children(self) -> None:
        """They have nothing left to do, and left to themselves they may take half a minute to end:
        billiard's have their last results read, which no parent does any more.

        What could not be put back (Postgres is away, say) is left to the sweeper of a worker that
        goes on; its child must not go on without us.
        """
        for reading in self._slots.read_all():
            if reading.is_busy:
                log.warning(
                    "drain: run %s is left to another worker's sweeper",
                    reading.run_id,
                    extra=about(reading),
                )
            processes.stop(reading.pid)
            processes.kill_tree(reading.pid)

    def _wait_until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._working() and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)

    def _working(self) -> bool:
        claiming = any(r.phase is not Phase.IDLE for r in self._slots.read_all())
        return claiming or self._dead.any_left

    def _busy(self) -> list[Reading]:
        return [reading for reading in self._slots.read_all() if reading.is_busy]

    def _keep_going(self, name: str, loop: Callable[[], None]) -> None:
        """A thread of the supervisor never ends because of an error; it says so and goes on."""
        while not self._stopping.is_set():
            try:
                loop()
            except Exception:
                log.exception("supervisor: %s failed, going on", name)
                self._stopping.wait(_RETRY_SECONDS)

    # -- watch: Redis ---------------------------------------------------------------------------

    def _watch(self) -> None:
        """Hints from Redis: one MGET for all runs every poll, and at once for a nudge."""
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
                running = {r.run_id: r.claim for r in self._busy()}
                raised = flags.raised_flags(list(running))
                for run_id in raised | (nudged & running.keys()):
                    if running[run_id] not in self._requests:
                        self._hints.put(running[run_id])
        except RedisError as error:
            if not self._flags_lost:
                log.warning("cancel flags cannot be read, the rows still can: %s", error)
                self._flags_lost = True
            self._stopping.wait(_RETRY_SECONDS)
        finally:
            client.close()

    # -- keep: Postgres -------------------------------------------------------------------------

    def _keep(self) -> None:
        """Renew leases in time, and in between look at the rows that hints point to."""
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
            # A lease that is still ours may be renewed late; nobody judges right after an outage.
            log.warning("leases cannot be renewed now: %s", error)
            self._stopping.wait(_RETRY_SECONDS)

    def _renew(self, conn: Connection) -> None:
        claims = [reading.claim for reading in self._busy()]
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
        """Of claims that do not stand any more, those that are lost. A child that was just writing
        its end has ended its claim itself: it gets until the next renewal to be done with it."""
        phases = {reading.claim: reading.phase for reading in self._busy()}
        ending = {claim for claim in missing if phases.get(claim) is Phase.FINISHING}
        lost = {claim for claim in missing if claim in phases} - (ending - self._ending)
        self._ending = ending
        return lost

    def _look_at(self, conn: Connection, first: Claim | None) -> None:
        """The row decides: a flag or nudge that it does not bear out is ignored."""
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

"""The supervisor: keeps the leases of a worker's runs, sees their cancels, and stops them.

It lives in the worker's parent process and never executes graph code, so nothing a graph does can
stall it. Four threads, so that no trouble of one part reaches another:

    watch    flags and nudges in Redis: which runs may have been cancelled (a hint)
    keep     Postgres: renews leases, and asks the rows whether a hint is true (the guarantee)
    climb    no I/O at all: the ladder (ask, then kill), timeouts, and deaths of children
    end      Postgres: writes the end of runs whose child is dead

The ladder: *ask* is a signal that names the run; the child cancels its task and raises in a sync
node. After the grace, *kill*: the child is stopped, its slot is read once more, and if it is still
that run, it dies with everything it started. Celery's pool replaces it from the warm parent.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app.bus.cancel_flag import CancelFlags, CancelNudges
from app.bus.client import Keys, RedisError, connect_redis
from app.db import runs as run_rows
from app.db.connection import OUTAGE, Connection, connect
from app.db.runs import Ringable
from app.domain.metrics import KILLED, RECOVERED
from app.domain.runs import Claim, RunStatus
from app.services.run_attempts import (
    STOPPED,
    Announcer,
    RunEnd,
    end_cancelled_run,
    end_for_dead,
    recover_run,
    timed_out,
)
from app.settings import Settings
from workers import processes
from workers.child import ASK_SIGNAL
from workers.slots import Phase, Reading, SlotTable, StopReason

log = logging.getLogger(__name__)

#: How much longer than the grace a child that has stopped its graph may take to write the end.
_FINISHING_SECONDS = 5.0
_TICK_SECONDS = 0.02
_RETRY_SECONDS = 0.5
#: After the drain's grace, how long its own asks, kills and endings may take.
_DRAIN_END_SECONDS = 5.0


@dataclass(slots=True)
class _Watched:
    """A child process and what has been asked of it."""

    pid: int
    pidfd: int | None
    asked: Claim | None = None
    reason: StopReason = StopReason.NONE
    kill_at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Death:
    """A dead child's slot as it was, and why we killed it if we did."""

    reading: Reading
    reason: StopReason


class Supervisor:
    """Start after the pool has forked; `drain` when the worker is told to stop."""

    def __init__(
        self,
        settings: Settings,
        slots: SlotTable,
        owner: str,
        announcer: Announcer,
        on_death: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._on_death = on_death
        self._slots = slots
        self._owner = owner
        self._announcer = announcer
        self._stopping = threading.Event()
        self._hints: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        self._deaths: queue.Queue[_Death | None] = queue.Queue()
        self._to_stop: dict[Claim, StopReason] = {}
        self._flags_lost = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._guarded(loop), name=f"belay-{name}", daemon=True)
            for name, loop in (
                ("watch", self._watch),
                ("keep", self._keep),
                ("climb", self._climb),
                ("end", self._end),
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
                self._to_stop.setdefault(reading.claim, StopReason.DRAIN)
            self._wake()
            time.sleep(_TICK_SECONDS)
        self._stopping.set()
        self._hints.put(None)
        self._deaths.put(None)
        self._wake()
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
                    extra=_about(reading),
                )
            processes.stop(reading.pid)
            processes.kill_tree(reading.pid)

    def _wait_until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._working() and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)

    def _working(self) -> bool:
        claiming = any(r.phase is not Phase.IDLE for r in self._slots.read_all())
        return claiming or self._deaths.unfinished_tasks > 0

    def _busy(self) -> list[Reading]:
        return [reading for reading in self._slots.read_all() if reading.is_busy]

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    def _guarded(self, loop: Callable[[], None]) -> Callable[[], None]:
        """A thread of the supervisor never ends because of an error; it says so and goes on."""

        def run() -> None:
            while not self._stopping.is_set():
                try:
                    loop()
                except Exception:
                    log.exception("supervisor: %s failed, going on", loop.__name__)
                    self._stopping.wait(_RETRY_SECONDS)

        return run

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
                    if running[run_id] not in self._to_stop:
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
        except OUTAGE as error:
            # A lease that is still ours may be renewed late; nobody judges right after an outage.
            log.warning("leases cannot be renewed now: %s", error)
            self._stopping.wait(_RETRY_SECONDS)

    def _renew(self, conn: Connection) -> None:
        claims = [reading.claim for reading in self._busy()]
        if not claims:
            return
        states = run_rows.renew_leases(conn, claims, lease_seconds=self._settings.lease_seconds)
        standing = {Claim(state.run_id, state.claim_no) for state in states}
        for state in states:
            if state.cancel_action is not None:
                self._stop_later(Claim(state.run_id, state.claim_no), StopReason.CANCEL)
        for claim in claims:
            if claim not in standing:
                self._stop_later(claim, StopReason.LEASE_LOST)

    def _look_at(self, conn: Connection, first: Claim | None) -> None:
        """The row decides: a flag or nudge that it does not bear out is ignored."""
        hinted = [first]
        with suppress(queue.Empty):
            while True:
                hinted.append(self._hints.get_nowait())
        run_ids = list({claim.run_id for claim in hinted if claim is not None})
        for state in run_rows.cancel_actions(conn, run_ids) if run_ids else []:
            if state.cancel_action is not None:
                self._stop_later(Claim(state.run_id, state.claim_no), StopReason.CANCEL)

    def _stop_later(self, claim: Claim, reason: StopReason) -> None:
        if self._to_stop.get(claim) in (None, StopReason.DRAIN):
            self._to_stop[claim] = reason
            if reason is StopReason.LEASE_LOST:
                self._slots.tally.lease_lost("owner")
            self._wake()

    # -- climb: the ladder ----------------------------------------------------------------------

    def _climb(self) -> None:
        watched: dict[int, _Watched] = {}
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        try:
            while not self._stopping.is_set():
                poller.poll(_TICK_SECONDS * 1000)
                with suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._climb_once(watched, poller)
        finally:
            for child in watched.values():
                if child.pidfd is not None:
                    os.close(child.pidfd)

    def _climb_once(self, watched: dict[int, _Watched], poller: select.poll) -> None:
        readings = {reading.index: reading for reading in self._slots.read_all()}
        for index, reading in readings.items():
            child = watched.get(index)
            if child is None or child.pid != reading.pid:
                child = watched[index] = _Watched(reading.pid, processes.open_pidfd(reading.pid))
                if child.pidfd is not None:
                    poller.register(child.pidfd, select.POLLIN)
            if _is_dead(child):
                self._bury(watched, poller, index)
            elif reading.is_busy:
                self._climb_for(child, reading)
            elif child.asked is not None:
                child.asked = None
        self._forget_the_stopped()

    def _forget_the_stopped(self) -> None:
        """Drop requests whose run is no longer here. A claim is in its slot before anybody asks
        for its stop, so the requests are listed first and the slots read after."""
        requested = list(self._to_stop)
        current = {reading.claim for reading in self._busy()} if requested else set()
        for claim in requested:
            if claim not in current:
                self._to_stop.pop(claim, None)

    def _climb_for(self, child: _Watched, reading: Reading) -> None:
        """One rung for one busy child."""
        now = time.monotonic()
        reason = self._to_stop.get(reading.claim, StopReason.NONE)
        if reason is StopReason.NONE and reading.deadline and now >= reading.deadline:
            reason = self._to_stop[reading.claim] = StopReason.TIMEOUT
        if reason is StopReason.NONE:
            return
        if child.asked != reading.claim or child.reason is not reason:
            first = child.asked != reading.claim
            child.asked, child.reason = reading.claim, reason
            if first:
                child.kill_at = now + self._settings.cancel_grace_ms / 1000
            self._slots.ask(reading.index, reading.claim, reason)
            with suppress(ProcessLookupError):
                os.kill(child.pid, ASK_SIGNAL)
            return
        late = _FINISHING_SECONDS if reading.phase is Phase.FINISHING else 0.0
        if now >= child.kill_at + late:
            self._kill(child, reading)

    def _kill(self, child: _Watched, reading: Reading) -> None:
        """Kill the child, unless it has moved on to another run since we read its slot."""
        if not processes.stop(child.pid):
            return
        again = self._slots.read(reading.index)
        if again.pid == child.pid and again.is_busy and again.claim == reading.claim:
            log.warning(
                "run %s did not stop when asked (%s), killing its child %d",
                reading.run_id,
                child.reason.name.lower(),
                child.pid,
                extra=_about(reading),
            )
            processes.kill_tree(child.pid)
        else:
            processes.resume(child.pid)

    def _bury(self, watched: dict[int, _Watched], poller: select.poll, index: int) -> None:
        """A child has died: read what it was doing, free its slot, have the run's end written."""
        child = watched.pop(index)
        reading = self._slots.read(index)
        if child.pidfd is not None:
            poller.unregister(child.pidfd)
            os.close(child.pidfd)
        reason = child.reason if child.asked == reading.claim else StopReason.NONE
        if reading.phase is not Phase.IDLE:
            self._slots.tally.child_died("died" if reason is StopReason.NONE else "killed")
            self._deaths.put(_Death(reading, reason))
        self._slots.free(index)
        self._on_death()

    # -- end: Postgres --------------------------------------------------------------------------

    def _end(self) -> None:
        """Write the ends of runs whose child is dead; wait for Postgres as long as it takes."""
        try:
            with connect(
                self._settings.database_url,
                pgbouncer=self._settings.pgbouncer,
                name="belay supervisor end",
            ) as conn:
                while not self._stopping.is_set():
                    death = self._deaths.get()
                    try:
                        if death is None:
                            return
                        self._end_for_dead(conn, death)
                    except OUTAGE:
                        self._deaths.put(death)
                        raise
                    finally:
                        self._deaths.task_done()
        except OUTAGE as error:
            log.warning("ends of runs whose child died cannot be written now: %s", error)
            self._stopping.wait(_RETRY_SECONDS)

    def _end_for_dead(self, conn: Connection, death: _Death) -> None:
        reading = death.reading
        claim = self._claim_of(conn, reading)
        if claim is None or death.reason is StopReason.LEASE_LOST:
            return
        thread_id = reading.thread_id
        if death.reason is StopReason.CANCEL:
            end = end_cancelled_run(conn, thread_id, claim, STOPPED)
        elif death.reason is StopReason.TIMEOUT:
            end = end_for_dead(conn, thread_id, claim, timed_out())
        elif death.reason is StopReason.DRAIN:
            self._put_back(conn, death, claim)
            return
        else:
            self._recover(conn, death, claim)
            return
        if end is not None:
            self._announce(end, death)

    def _announce(self, end: RunEnd, death: _Death) -> None:
        self._announcer.announce([end])
        started = death.reading.claimed_at if death.reading.is_busy else 0.0
        how = RECOVERED if death.reason is StopReason.NONE else KILLED
        self._slots.tally.ended(end, how, time.monotonic() - started if started else None)

    def _claim_of(self, conn: Connection, reading: Reading) -> Claim | None:
        """The claim a dead child held; one that died while claiming may or may not have one."""
        if reading.phase is not Phase.CLAIMING:
            return reading.claim
        run = run_rows.get_run(conn, reading.run_id)
        if run is None:
            return None
        if run.status == RunStatus.PENDING:  # its doorbell died with the child
            self._announcer.ring([Ringable(run.run_id, run.queue)])
        if run.lease_owner != f"{self._owner}/{reading.pid}":
            return None
        return Claim(run.run_id, run.claim_no)

    def _put_back(self, conn: Connection, death: _Death, claim: Claim) -> None:
        rering = self._settings.rering_seconds
        ring = run_rows.put_run_back(conn, claim, uncharge=True, rering_seconds=rering)
        if ring is not None:
            self._announcer.ring([ring])
            return
        end = end_cancelled_run(conn, death.reading.thread_id, claim, STOPPED)
        if end is not None:
            self._announce(end, death)

    def _recover(self, conn: Connection, death: _Death, claim: Claim) -> None:
        recovery = recover_run(
            conn,
            claim,
            max_attempts=self._settings.max_attempts,
            rering_seconds=self._settings.rering_seconds,
            only_if_expired=False,
        )
        if recovery.end is not None:
            self._announce(recovery.end, death)
        elif recovery.ring is not None:
            about = _about(death.reading)
            log.warning(
                "the child of run %s died; it will be tried again", claim.run_id, extra=about
            )
            self._announcer.ring([recovery.ring])


def _about(reading: Reading) -> dict[str, Any]:
    """What a record of the supervisor says of the run it is about."""
    return {
        "run_id": str(reading.run_id),
        "thread_id": str(reading.thread_id),
        "attempt": reading.attempt,
    }


def _is_dead(child: _Watched) -> bool:
    if child.pidfd is None:
        return True
    return bool(select.select([child.pidfd], [], [], 0)[0])

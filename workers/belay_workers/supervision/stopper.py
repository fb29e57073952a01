"""Stop runs in two steps, *ask* and *kill*, and notice children that have died.

*Ask* is a signal that names the run; the child cancels its task and raises in a sync node. When the
grace period is over, *kill*: the child is stopped (SIGSTOP), its slot is read once more, and if it
still executes that run, the child is killed with every process it has started. Celery's pool
replaces it by a fork of the warm parent. Nothing here does I/O, so an unavailable server cannot
delay a stop.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from belay_server.domain.runs import Claim
from belay_workers.child.process import ASK_SIGNAL
from belay_workers.slots import Phase, Reading, SlotTable, StopReason
from belay_workers.supervision import processes
from belay_workers.supervision.orphans import Orphans

log = logging.getLogger(__name__)

#: How much longer than the grace a child that has stopped its graph may take to write the end.
_FINISHING_SECONDS = 5.0
_TICK_SECONDS = 0.02
#: How often a busy child is looked at for whether it can still reach anything.
_CANARY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """A dead child's slot as it was, and why we killed it if we did."""

    reading: Reading
    reason: StopReason


class StopRequests:
    """The claims to be stopped, and why. Adding one wakes the stopper."""

    def __init__(self) -> None:
        self._reasons: dict[Claim, StopReason] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, claim: Claim, reason: StopReason) -> bool:
        """False where it is to be stopped already; a drain gives way to every other reason."""
        is_new = self._reasons.get(claim) in (None, StopReason.DRAIN)
        if is_new:
            self._reasons[claim] = reason
            self.wake()
        return is_new

    def reason_for(self, claim: Claim) -> StopReason:
        return self._reasons.get(claim, StopReason.NONE)

    def __contains__(self, claim: Claim) -> bool:
        return claim in self._reasons

    def forget_all_but(self, current: Callable[[], set[Claim]]) -> None:
        """Drop requests whose run is no longer here. A claim is in its slot before anybody asks
        for its stop, so the requests are listed first and the slots read after."""
        requested = list(self._reasons)
        still_here = current() if requested else set()
        for claim in requested:
            if claim not in still_here:
                self._reasons.pop(claim, None)

    def wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    def fileno(self) -> int:
        """Readable when somebody has called `wake`."""
        return self._wake_read

    def have_woken(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)


@dataclass(slots=True)
class _Watched:
    """A child process and what has been asked of it."""

    pid: int
    pidfd: int | None
    asked: Claim | None = None
    reason: StopReason = StopReason.NONE
    kill_at: float = 0.0


class Stopper:
    """Stops claims of `requests`; `run` is the body of a thread.

    `on_death` is called with a child that died while it executed a run, before its slot is free;
    `on_free` is called for every slot that becomes free.
    """

    def __init__(
        self,
        slots: SlotTable,
        requests: StopRequests,
        *,
        grace_seconds: float,
        orphans: Orphans,
        on_death: Callable[[Death], None],
        on_free: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._requests = requests
        self._grace_seconds = grace_seconds
        self._orphans = orphans
        self._look_at_canaries_at = 0.0
        self._on_death = on_death
        self._on_free = on_free

    def run(self, stopping: threading.Event) -> None:
        watched: dict[int, _Watched] = {}
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        try:
            while not stopping.is_set():
                poller.poll(_TICK_SECONDS * 1000)
                self._requests.have_woken()
                self._run_once(watched, poller)
        finally:
            for child in watched.values():
                if child.pidfd is not None:
                    os.close(child.pidfd)

    def _run_once(self, watched: dict[int, _Watched], poller: select.poll) -> None:
        readings = {reading.index: reading for reading in self._slots.read_all()}
        looks = time.monotonic() >= self._look_at_canaries_at
        if looks:
            self._look_at_canaries_at = time.monotonic() + _CANARY_SECONDS
        for index, reading in readings.items():
            child = watched.get(index)
            if child is None or child.pid != reading.pid:
                child = watched[index] = _Watched(reading.pid, processes.open_pidfd(reading.pid))
                if child.pidfd is not None:
                    poller.register(child.pidfd, select.POLLIN)
            if _is_dead(child):
                self._bury(watched, poller, index)
            elif reading.is_busy:
                if looks and _has_lost_its_canary(reading):
                    self._kill(child, reading, "has closed the descriptors of its process")
                self._stop_if_requested(child, reading)
            elif child.asked is not None:
                child.asked = None
        self._requests.forget_all_but(self._claims_in_hand)

    def _claims_in_hand(self) -> set[Claim]:
        return {reading.claim for reading in self._slots.read_all() if reading.is_busy}

    def _stop_if_requested(self, child: _Watched, reading: Reading) -> None:
        """One rung for one busy child."""
        now = time.monotonic()
        reason = self._requests.reason_for(reading.claim)
        if reason is StopReason.NONE and reading.deadline and now >= reading.deadline:
            reason = StopReason.TIMEOUT
            self._requests.add(reading.claim, reason)
        if reason is StopReason.NONE:
            return
        if child.asked != reading.claim or child.reason is not reason:
            first = child.asked != reading.claim
            child.asked, child.reason = reading.claim, reason
            if first:
                child.kill_at = now + self._grace_seconds
            self._slots.ask(reading.index, reading.claim, reason)
            with suppress(ProcessLookupError):
                os.kill(child.pid, ASK_SIGNAL)
            return
        late = _FINISHING_SECONDS if reading.phase is Phase.FINISHING else 0.0
        if now >= child.kill_at + late:
            why = f"did not stop when asked ({child.reason.name.lower()})"
            self._kill(child, reading, why)

    def _kill(self, child: _Watched, reading: Reading, why: str) -> None:
        """Kill the child, unless it has moved on to another run since we read its slot."""
        if not processes.stop(child.pid):
            return
        again = self._slots.read(reading.index)
        if again.pid == child.pid and again.is_busy and again.claim == reading.claim:
            log.warning(
                "run %s %s, killing its child %d",
                reading.run_id,
                why,
                child.pid,
                extra=about(reading),
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
        # Before anybody hears of it: what its node started must not work on beside what comes next.
        self._orphans.kill(child.pid)
        reason = child.reason if child.asked == reading.claim else StopReason.NONE
        if reading.phase is not Phase.IDLE:
            self._slots.counters.child_died("died" if reason is StopReason.NONE else "killed")
            self._on_death(Death(reading, reason))
        self._slots.free(index)
        self._on_free()


def about(reading: Reading) -> dict[str, Any]:
    """What a record of the supervisor says of the run it is about."""
    return {
        "run_id": str(reading.run_id),
        "thread_id": str(reading.thread_id),
        "attempt": reading.attempt,
    }


def _has_lost_its_canary(reading: Reading) -> bool:
    """A node that closes every descriptor takes the child's connections with it: nobody would ever
    hear of its end."""
    if reading.canary < 0 or sys.platform != "linux":
        return False
    try:
        found = Path(f"/proc/{reading.pid}/fd/{reading.canary}").stat().st_ino
    except FileNotFoundError:
        # The child itself may be what is not there any more.
        return Path(f"/proc/{reading.pid}/fd").exists()
    except OSError:
        return False
    return found != reading.canary_inode


def _is_dead(child: _Watched) -> bool:
    if child.pidfd is None:
        return True
    # A poll of its own: `select` knows no descriptor beyond 1,023, and many children have many.
    poller = select.poll()
    poller.register(child.pidfd, select.POLLIN)
    return bool(poller.poll(0))

"""Stop runs in two steps, *ask* and *kill*, and detect children that have died.

*Ask*: write the claim and the reason into the child's slot and send a signal. The child cancels its
task and raises in a sync node. *Kill*, when the grace period is over: stop the child (SIGSTOP) and
read its slot again; if it still executes that claim, kill it with every process it has started.
The pool replaces it by a fork of the zygote, which has the graphs loaded. Nothing here does network
I/O, so an unavailable server cannot delay a stop.
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
from functools import partial
from pathlib import Path
from typing import Any

from belay_server.domain.runs import Claim
from belay_workers.child.process import ASK_SIGNAL
from belay_workers.slots import Phase, Reading, SlotTable, StopReason
from belay_workers.supervision import processes
from belay_workers.supervision.orphans import Orphans

log = logging.getLogger(__name__)

#: Seconds beyond the grace period that a child may take to write the end of a stopped graph.
_FINISHING_SECONDS = 5.0
#: Seconds between two looks at the children while a stop is under way, and while none is. Requests
#: and deaths wake the thread, so this is the precision of time limits.
_TICK_SECONDS = 0.02
_IDLE_TICK_SECONDS = 0.1
#: Seconds between two checks that a busy child's descriptors, and so its connections, are open.
_CANARY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """The last content of a dead child's slot, and why it was stopped (NONE if it died itself)."""

    reading: Reading
    reason: StopReason


class StopRequests:
    """The claims to be stopped, with the reasons. Adding one wakes the stopper."""

    def __init__(self) -> None:
        self._reasons: dict[Claim, StopReason] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, claim: Claim, reason: StopReason) -> bool:
        """Request a stop. Return False if one is already requested.

        Any reason replaces DRAIN.
        """
        is_new = self._reasons.get(claim) in (None, StopReason.DRAIN)
        if is_new:
            self._reasons[claim] = reason
            self.wake()
        return is_new

    def reason_for(self, claim: Claim) -> StopReason:
        return self._reasons.get(claim, StopReason.NONE)

    def __contains__(self, claim: Claim) -> bool:
        return claim in self._reasons

    @property
    def any_left(self) -> bool:
        return bool(self._reasons)

    def forget_all_but(self, current: Callable[[], set[Claim]]) -> None:
        """Drop the requests for claims that are not in `current()`.

        A claim is in its slot before its stop is requested. So the requests are listed before the
        slots are read.
        """
        requested = list(self._reasons)
        still_here = current() if requested else set()
        for claim in requested:
            if claim not in still_here:
                self._reasons.pop(claim, None)

    def wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    def fileno(self) -> int:
        """Return a descriptor that is readable after a call of `wake`."""
        return self._wake_read

    def have_woken(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)


@dataclass(slots=True)
class _Watched:
    """A child process, and the stop that it was asked for. `kill_at` is in monotonic seconds."""

    pid: int
    pidfd: int | None
    asked: Claim | None = None
    reason: StopReason = StopReason.NONE
    kill_at: float = 0.0
    has_lost_its_canary: bool = False
    #: SIGKILL has been sent: the process is dead soon.
    is_killed: bool = False


class Stopper:
    """Stops the claims in `requests`; `run` is the body of a thread.

    `on_death` is called, before the slot is freed, for a child that died while it claimed or
    executed a run.
    `on_free` is called for every slot that is freed.
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
        self._had_their_turn: set[int] = set()
        self._on_death = on_death
        self._on_free = on_free

    def run(self, stopping: threading.Event) -> None:
        watched: dict[int, _Watched] = {}
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        try:
            while not stopping.is_set():
                seconds = _TICK_SECONDS if self._requests.any_left else _IDLE_TICK_SECONDS
                poller.poll(seconds * 1000)
                self._requests.have_woken()
                self._run_once(watched, poller)
        finally:
            for child in watched.values():
                if child.pidfd is not None:
                    os.close(child.pidfd)

    def _run_once(self, watched: dict[int, _Watched], poller: select.poll) -> None:
        """Ask every child whose run is to be stopped; then kill or bury one, which may take long.

        So a run with many processes does not delay the requests for others.
        """
        looks = time.monotonic() >= self._look_at_canaries_at
        if looks:
            self._look_at_canaries_at = time.monotonic() + _CANARY_SECONDS
        slow: dict[int, Callable[[], None]] = {}
        dead: dict[int, Callable[[], None]] = {}
        for reading in self._slots.read_all():
            child = watched.get(reading.index)
            if child is None or child.pid != reading.pid:
                child = _Watched(reading.pid, processes.open_pidfd(reading.pid))
                watched[reading.index] = child
                if child.pidfd is not None:
                    poller.register(child.pidfd, select.POLLIN)
            if _is_dead(child):
                dead[reading.index] = partial(self._bury, watched, poller, reading.index)
            elif not child.is_killed:
                why = self._why_to_kill(child, reading, looks=looks)
                if why is not None:
                    slow[reading.index] = partial(self._kill, child, reading, why)
        slow |= dead
        if slow:
            self._take_turn(slow)
        if len(slow) > 1:
            self._requests.wake()
        self._requests.forget_all_but(self._claims_in_hand)

    def _take_turn(self, slow: dict[int, Callable[[], None]]) -> None:
        """Do one of the slow steps, which are by slot: every slot in turn, as a step may fail again
        and again."""
        if self._had_their_turn.issuperset(slow):
            self._had_their_turn.clear()
        index = next(index for index in slow if index not in self._had_their_turn)
        self._had_their_turn.add(index)
        slow[index]()

    def _why_to_kill(self, child: _Watched, reading: Reading, *, looks: bool) -> str | None:
        """Ask a busy child to stop, where that is requested. Return why it is to be killed."""
        if not reading.is_busy:
            child.asked = None
            return None
        why = self._stop_if_requested(child, reading)
        if looks:
            child.has_lost_its_canary = _has_lost_its_canary(reading)
        return "has closed the descriptors of its process" if child.has_lost_its_canary else why

    def _claims_in_hand(self) -> set[Claim]:
        return {reading.claim for reading in self._slots.read_all() if reading.is_busy}

    def _stop_if_requested(self, child: _Watched, reading: Reading) -> str | None:
        """Ask a busy child to stop, on a stop request or after its time limit. Return why it is to
        be killed, once it has had the grace period."""
        now = time.monotonic()
        reason = self._requests.reason_for(reading.claim)
        if reason is StopReason.NONE and reading.deadline and now >= reading.deadline:
            reason = StopReason.TIMEOUT
            self._requests.add(reading.claim, reason)
        if reason is StopReason.NONE:
            return None
        if child.asked != reading.claim or child.reason is not reason:
            first = child.asked != reading.claim
            child.asked, child.reason = reading.claim, reason
            if first:
                child.kill_at = now + self._grace_seconds
            self._slots.ask(reading.index, reading.claim, reason)
            with suppress(ProcessLookupError):
                os.kill(child.pid, ASK_SIGNAL)
            return None
        late = _FINISHING_SECONDS if reading.phase is Phase.FINISHING else 0.0
        if now < child.kill_at + late:
            return None
        return f"did not stop when asked ({child.reason.name.lower()})"

    def _kill(self, child: _Watched, reading: Reading, why: str) -> None:
        """Kill the child, unless it has started another run since `reading` was read."""
        if not processes.stop(child.pid):
            return
        again = self._slots.read(reading.index)
        if again.pid == child.pid and again.is_busy and again.claim == reading.claim:
            log.warning(
                "run %s %s; killing its child process %d",
                reading.run_id,
                why,
                child.pid,
                extra=about(reading),
            )
            processes.kill_tree(child.pid)
            child.is_killed = True
        else:
            processes.resume(child.pid)

    def _bury(self, watched: dict[int, _Watched], poller: select.poll, index: int) -> None:
        """Handle a child's death: read its slot, hand over its run for recovery, free the slot."""
        child = watched.pop(index)
        reading = self._slots.read(index)
        if child.pidfd is not None:
            poller.unregister(child.pidfd)
            os.close(child.pidfd)
        # Before the run goes on: processes that its node started must not run beside the next
        # attempt, or after the end.
        self._orphans.kill(child.pid)
        reason = child.reason if child.asked == reading.claim else StopReason.NONE
        if reading.phase is not Phase.IDLE:
            self._slots.counters.child_died("died" if reason is StopReason.NONE else "killed")
            self._on_death(Death(reading, reason))
        self._slots.free(index)
        self._on_free()


def about(reading: Reading) -> dict[str, Any]:
    """Return the fields that identify a run in the supervisor's log records."""
    return {
        "run_id": str(reading.run_id),
        "thread_id": str(reading.thread_id),
        "attempt": reading.attempt,
    }


def _has_lost_its_canary(reading: Reading) -> bool:
    """Return True if the child's canary descriptor is closed or was opened again as another file.

    A node that closes every descriptor also closes the child's connections. The child could then
    never write the run's end. Always False where there is no `/proc`.
    """
    if reading.canary < 0 or sys.platform != "linux":
        return False
    try:
        found = Path(f"/proc/{reading.pid}/fd/{reading.canary}").stat().st_ino
    except FileNotFoundError:
        # Either the descriptor or the whole process does not exist any more.
        return Path(f"/proc/{reading.pid}/fd").exists()
    except OSError:
        return False
    return found != reading.canary_inode


def _is_dead(child: _Watched) -> bool:
    if child.pidfd is None:
        return True
    # Not `select.select`: it takes no descriptor above 1,023, which a large pool exceeds.
    poller = select.poll()
    poller.register(child.pidfd, select.POLLIN)
    return bool(poller.poll(0))

"""Stop runs in steps, *ask* and *kill*, and detect processes that have died.

*Ask*: write the claim and the reason into the run's slot and send a signal. The process cancels the
run's task and raises in a sync node. *Kill*, when the grace period is over: stop the process
(SIGSTOP) and read the slot again; if it still executes that claim, kill it with every process it
has started. The pool replaces it by a fork of the zygote, which has the graphs loaded. Nothing here
does network I/O, so an unavailable server cannot delay a stop.

A host has many runs, so there is a step in between. The host freezes a run whose code goes on
although it was asked (`host/gates.py`). If its event loop cannot do that, because code of a run
blocks it, that code is *interrupted*: the handler of a second signal raises in it. A host that is
killed all the same had the fault of one run; its other runs are put back.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from belay_server.domain.runs import Claim
from belay_workers.execution.stops import ASK_SIGNAL
from belay_workers.slots import Kind, Phase, Reading, SlotTable, StopReason
from belay_workers.supervision import processes
from belay_workers.supervision.orphans import Orphans
from belay_workers.supervision.step_times import Step, StepTimes
from belay_workers.supervision.stop_requests import StopRequests
from belay_workers.supervision.stopped_hosts import StoppedHosts
from belay_workers.supervision.suspicions import Suspicions

log = logging.getLogger(__name__)

#: Seconds beyond the grace period that a child may take to write the end of a stopped graph.
_FINISHING_SECONDS = 5.0
#: Seconds between two looks at the children while a stop is under way, and while none is. Requests
#: and deaths wake the thread, so this is the precision of time limits.
_TICK_SECONDS = 0.02
_IDLE_TICK_SECONDS = 0.1
#: Seconds for which a step of a run may block its host's event loop before its graph is isolated,
#: and before the host is killed, so that its other runs go on.
_BLOCKING_SECONDS = 1.0
_LONGEST_BLOCKING_SECONDS = 5.0
_BLOCKS = "has blocked the event loop of its host"
_IS_STOPPED = "is in a host that a signal has stopped for a minute"
#: Seconds for which the other runs of a host go on after it has frozen or interrupted one, which
#: may hold a lock that they wait for. Then they are put back, and go on in another host.
_WORN_SECONDS = 10.0
#: Seconds after which a host is killed because a frozen run has threads left or an interrupted one
#: goes on, and after which it is killed because it has not frozen the run.
_HOST_SECONDS = 0.25
_FREEZE_SECONDS = 10.0
#: How many of a run's attempts are not counted before one is that ended with the death of its host
#: without a known cause.
_MOST_EXCUSED = 10
#: Seconds between two checks that a busy child's descriptors, and so its connections, are open.
_CANARY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """The last content of a slot of a dead process, and why its run was stopped: NONE if the
    process died by itself, or because of another run. `is_fault` is False in the latter case."""

    reading: Reading
    reason: StopReason
    is_fault: bool = True


@dataclass(slots=True)
class _Process:
    """A process that executes runs."""

    pid: int
    pidfd: int | None
    has_lost_its_canary: bool = False
    #: SIGKILL has been sent: the process is dead soon.
    is_killed: bool = False
    #: The run because of which it was killed; None if that is not known.
    killed_for: Claim | None = None
    #: Whether that run is put back, too: nobody has asked it to stop.
    is_excused: bool = False


@dataclass(slots=True)
class _Asked:
    """A stop that a run was asked for. `kill_at` is in monotonic seconds."""

    claim: Claim
    reason: StopReason
    kill_at: float
    is_interrupted: bool = False


class Stopper:
    """Stops the claims in `requests`; `run` is the body of a thread.

    `on_death` is called, before the slot is freed, for each run that a dead process had claimed or
    was claiming. `on_free` is called for every process whose slots were freed. `isolate` is called
    with the position of a graph that must not share hosts, and the reason, `share_again` when a
    suspicion has expired.
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
        isolate: Callable[[int, str], None],
        share_again: Callable[[int], None],
    ) -> None:
        self._slots = slots
        self._requests = requests
        self._grace_seconds = grace_seconds
        self._orphans = orphans
        self._look_at_canaries_at = 0.0
        #: The stops that were asked for, by slot.
        self._asked: dict[int, _Asked] = {}
        self._had_their_turn: set[int] = set()
        self._on_death = on_death
        self._on_free = on_free
        self._isolate = isolate
        self._suspicions = Suspicions(isolate, share_again)
        self._step_times = StepTimes()
        self._stopped_hosts = StoppedHosts()

    def run(self, stopping: threading.Event) -> None:
        watched: dict[int, _Process] = {}
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        try:
            while not stopping.is_set():
                seconds = _TICK_SECONDS if self._requests.any_left else _IDLE_TICK_SECONDS
                poller.poll(seconds * 1000)
                self._requests.drain_wakeups()
                self._run_once(watched, poller)
        finally:
            for process in watched.values():
                if process.pidfd is not None:
                    os.close(process.pidfd)

    def _run_once(self, watched: dict[int, _Process], poller: select.poll) -> None:
        """Ask every run that is to be stopped; then kill or bury one process, which may take long.

        So a run with many processes does not delay the requests for others. `watched` has the
        processes by id.
        """
        self._slots.note_supervised()
        looks = time.monotonic() >= self._look_at_canaries_at
        if looks:
            self._look_at_canaries_at = time.monotonic() + _CANARY_SECONDS
        slow: dict[int, Callable[[], None]] = {}
        readings = self._slots.read_all()
        if looks:
            self._stopped_hosts.look(readings)
        pids = {reading.pid for reading in readings}
        for pid in pids - watched.keys():
            process = watched[pid] = _Process(pid, processes.open_pidfd(pid))
            if process.pidfd is not None:
                poller.register(process.pidfd, select.POLLIN)
        dead = {pid for pid in pids if _is_dead(watched[pid])}
        self._drain_worn_hosts(readings)
        self._suspicions.expire()
        steps = self._step_times.measure(readings)
        for reading in readings:
            pid, process = reading.pid, watched[reading.pid]
            if pid in dead or process.is_killed or pid in slow:
                continue
            found = self._why_to_kill(process, reading, steps.get(pid), looks=looks)
            if found is not None:
                slow[pid] = partial(self._kill, process, *found)
        slow |= {pid: partial(self._bury, watched, poller, pid) for pid in dead}
        if slow:
            self._take_turn(slow)
        if len(slow) > 1:
            self._requests.wake()
        self._requests.forget_all_but(lambda: set(self._slots.busy_claims()))

    def _drain_worn_hosts(self, readings: list[Reading]) -> None:
        """Have the runs put back that are left in hosts which have frozen or interrupted one
        long ago."""
        long_ago = time.monotonic() - _WORN_SECONDS
        worn = {reading.pid for reading in readings if 0 < reading.worn_at < long_ago}
        for reading in readings:
            if reading.pid in worn and reading.is_busy and reading.claim not in self._requests:
                self._requests.add(reading.claim, StopReason.DRAIN)

    def _take_turn(self, slow: dict[int, Callable[[], None]]) -> None:
        """Do one of the slow steps, which are by process: every process in turn, as a step may fail
        again and again."""
        if self._had_their_turn.issuperset(slow):
            self._had_their_turn.clear()
        pid = next(pid for pid in slow if pid not in self._had_their_turn)
        self._had_their_turn.add(pid)
        slow[pid]()

    def _why_to_kill(
        self, process: _Process, reading: Reading, step: Step | None, *, looks: bool
    ) -> tuple[Reading, str] | None:
        """Ask a run to stop, where that is requested. Return the run at whose fault its process is
        to be killed, and why. `step` is what the event loop of its host executes."""
        if looks and (reading.is_busy or reading.kind is Kind.HOST):
            process.has_lost_its_canary |= _has_lost_its_canary(reading)
        if process.has_lost_its_canary and (reading.is_busy or reading.kind is Kind.HOST):
            return reading, "has closed the descriptors of its process"
        if reading.kind is Kind.HOST and self._stopped_hosts.is_given_up(reading.pid):
            return reading, _IS_STOPPED
        if not reading.is_busy:
            self._asked.pop(reading.slot, None)
            return None
        blocks_for = step.seconds if step is not None and step.run is reading else 0.0
        if blocks_for > _BLOCKING_SECONDS:
            self._isolate(reading.graph, "it has blocked the event loop of a host")
        if blocks_for > _LONGEST_BLOCKING_SECONDS:
            return reading, _BLOCKS
        return self._stop_if_requested(reading, step)

    def _stop_if_requested(self, reading: Reading, step: Step | None) -> tuple[Reading, str] | None:
        """Ask a run to stop, on a stop request or after its time limit. Once it has had the grace
        period, return the run at whose fault its process is to be killed, and why."""
        now = time.monotonic()
        reason = self._requests.reason_for(reading.claim)
        if reason is StopReason.NONE and reading.deadline and now >= reading.deadline:
            reason = StopReason.TIMEOUT
            self._requests.add(reading.claim, reason)
        if reason is StopReason.NONE:
            return None
        asked = self._asked.get(reading.slot)
        if asked is None or asked.claim != reading.claim or asked.reason is not reason:
            is_first = asked is None or asked.claim != reading.claim
            kill_at = now + self._grace_seconds if is_first or asked is None else asked.kill_at
            self._asked[reading.slot] = _Asked(reading.claim, reason, kill_at)
            self._ask(reading, reason)
            return None
        late = _FINISHING_SECONDS if reading.phase is Phase.FINISHING else 0.0
        if now < asked.kill_at + late:
            return None
        why = f"did not stop when asked ({reason.name.lower()})"
        if reading.kind is not Kind.HOSTED_RUN:
            return reading, why
        return self._stop_hosted(reading, asked, step, why)

    def _stop_hosted(
        self, reading: Reading, asked: _Asked, step: Step | None, why: str
    ) -> tuple[Reading, str] | None:
        """Interrupt what blocks the host of a run that was asked to stop. Return the run at whose
        fault the host is to be killed: one that blocks it, or this one if it cannot be frozen."""
        now = time.monotonic()
        blocking = None if step is None or step.seconds <= self._grace_seconds else step.run
        if blocking is not None and blocking.slot != reading.slot:
            return blocking, _BLOCKS
        if reading.phase is Phase.FINISHING:
            return None  # none of its code is executed: its host writes its end
        if blocking is not None and not asked.is_interrupted:
            asked.is_interrupted = True
            asked.kill_at = now + _HOST_SECONDS
            self._ask(reading, asked.reason, interrupts=True)
            return None
        if blocking is None:
            left_at = reading.left_at
            is_late = 0 < left_at < now - _HOST_SECONDS or asked.kill_at < now - _FREEZE_SECONDS
            if not is_late:
                return None
        return reading, why

    def _ask(self, reading: Reading, reason: StopReason, *, interrupts: bool = False) -> None:
        self._slots.ask(reading.slot, reading.claim, reason, interrupts=interrupts)
        with suppress(ProcessLookupError):
            os.kill(reading.pid, ASK_SIGNAL)

    def _kill(self, process: _Process, reading: Reading, why: str) -> None:
        """Kill the process, unless the run has ended since `reading` was read."""
        if not processes.stop(process.pid):
            return
        again = self._slots.read(reading.slot)
        is_same = again.is_busy and again.claim == reading.claim
        if again.pid != process.pid or not (is_same or reading.kind is Kind.HOST):
            processes.resume(process.pid)
            return
        what = "child process" if reading.kind is Kind.CHILD else "host"
        who = "a run" if reading.kind is Kind.HOST else f"run {reading.run_id}"
        log.warning("%s %s; killing its %s %d", who, why, what, process.pid, extra=about(reading))
        processes.kill_tree(process.pid)
        process.is_killed = True
        process.killed_for = reading.claim if is_same else None
        process.is_excused = why in (_BLOCKS, _IS_STOPPED)
        if reading.kind is Kind.HOSTED_RUN:
            self._isolate(reading.graph, f"a run {why}")

    def _bury(self, watched: dict[int, _Process], poller: select.poll, pid: int) -> None:
        """Handle a death: read the process's slots, hand over its runs for recovery, free the
        slots."""
        process = watched.pop(pid)
        if process.pidfd is not None:
            poller.unregister(process.pidfd)
            os.close(process.pidfd)
        # Before the runs go on: processes that their nodes started must not run beside the next
        # attempts, or after the ends.
        self._orphans.kill(pid)
        readings = [one for one in self._slots.read_all() if one.pid == pid]
        culprit = process.killed_for or _stepped(readings)
        deaths = [death for one in readings for death in self._deaths(culprit, one)]
        if process.is_excused:
            deaths = [replace(death, is_fault=False) for death in deaths]
        if process.killed_for is None:
            hosted = [death for death in deaths if death.reading.kind is Kind.HOSTED_RUN]
            self._suspicions.add({death.reading.graph for death in hosted if death.is_fault})
        if culprit is None and len(deaths) > 1 and not process.is_excused:
            log.warning("host %d died with %d runs, for an unknown reason", pid, len(deaths))
            deaths = [
                replace(death, is_fault=_was_often_excused(death.reading)) for death in deaths
            ]
        if deaths:
            killed = process.is_killed or any(death.reason for death in deaths)
            self._slots.counters.child_died("killed" if killed else "died")
        for death in deaths:
            self._on_death(death)
        self._slots.free_all(pid)
        self._on_free()

    def _deaths(self, culprit: Claim | None, reading: Reading) -> list[Death]:
        """Return the death of the run in a dead process's slot, if there is one. `culprit` is the
        run because of which the process died, None if that is not known."""
        asked = self._asked.pop(reading.slot, None)
        if reading.phase is Phase.IDLE:
            return []
        is_asked = asked is not None and asked.claim == reading.claim
        reason = asked.reason if asked is not None and is_asked else StopReason.NONE
        return [Death(reading, reason, culprit in (None, reading.claim))]


def _was_often_excused(reading: Reading) -> bool:
    """Return whether an attempt is counted although it is not known which run is the cause of the
    death of a host: this run may kill one host after the other."""
    return reading.claim.uncounted(reading.attempt) >= _MOST_EXCUSED


def _stepped(readings: list[Reading]) -> Claim | None:
    """Return the run whose code a dead host executed when it died, None if it executed none."""
    return next((one.claim for one in readings if one.is_busy and one.stepping_since), None)


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


def _is_dead(process: _Process) -> bool:
    if process.pidfd is None:
        return True
    # Not `select.select`: it takes no descriptor above 1,023, which a large pool exceeds.
    poller = select.poll()
    poller.register(process.pidfd, select.POLLIN)
    return bool(poller.poll(0))

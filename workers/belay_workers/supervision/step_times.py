"""Measure for how long the event loops of hosts have executed one step of a run.

The time in which a host waited for a core does not count: on a busy machine it would be taken for a
run that blocks the event loop, and its graph would not share hosts any more. Nor does the time in
which a signal has stopped the host (SIGSTOP).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from belay_workers.slots import Reading
from belay_workers.supervision.processes import is_stopped, seconds_without_core


@dataclass(frozen=True, slots=True)
class Step:
    """A run whose code an event loop executes, and for how many seconds it has been executed."""

    run: Reading
    seconds: float


@dataclass(slots=True)
class _Beginning:
    """The beginning of a step, in monotonic seconds, how long its process had waited for a core
    before, and for how long it has been stopped since."""

    since: float
    waited: float
    measured_at: float
    stopped_for: float = 0.0


class StepTimes:
    """Measures the steps of all hosts. Call `measure` regularly: the waits for a core and the time
    in which a host is stopped are counted from the first call during a step."""

    def __init__(
        self,
        waited: Callable[[int], float] = seconds_without_core,
        is_stopped: Callable[[int], bool] = is_stopped,
    ) -> None:
        """`waited` returns the seconds for which the process with an id has waited for a core,
        `is_stopped` whether a signal has stopped it."""
        self._waited = waited
        self._is_stopped = is_stopped
        #: By process.
        self._begun: dict[int, _Beginning] = {}

    def measure(self, readings: Iterable[Reading]) -> dict[int, Step]:
        """Return the steps that event loops execute, by process; the longest of each."""
        longest: dict[int, Reading] = {}
        for reading in readings:
            if reading.stepping_since > 0:
                other = longest.get(reading.pid, reading)
                longest[reading.pid] = min(other, reading, key=lambda one: one.stepping_since)
        self._begun = {pid: self._began(pid, run) for pid, run in longest.items()}
        return {pid: self._step(pid, run) for pid, run in longest.items()}

    def _began(self, pid: int, run: Reading) -> _Beginning:
        known = self._begun.get(pid)
        if known is not None and known.since == run.stepping_since:
            return known
        return _Beginning(run.stepping_since, self._waited(pid), time.monotonic())

    def _step(self, pid: int, run: Reading) -> Step:
        begun, now = self._begun[pid], time.monotonic()
        if self._is_stopped(pid):
            begun.stopped_for += now - begun.measured_at
        begun.measured_at = now
        without_core = max(0.0, self._waited(pid) - begun.waited)
        return Step(run, now - begun.since - without_core - begun.stopped_for)

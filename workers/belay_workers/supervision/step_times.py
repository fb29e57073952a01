"""Measure for how long the event loops of hosts have executed one step of a run.

The time in which a host waited for a core does not count: on a busy machine it would be taken for a
run that blocks the event loop, and its graph would not share hosts any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from belay_workers.slots import Reading
from belay_workers.supervision.processes import seconds_without_core


@dataclass(frozen=True, slots=True)
class Step:
    """A run whose code an event loop executes, and for how many seconds it has been executed."""

    run: Reading
    seconds: float


class StepTimes:
    """Measures the steps of all hosts. Call `measure` regularly: the waits for a core are counted
    from the first call during a step."""

    def __init__(self, waited: Callable[[int], float] = seconds_without_core) -> None:
        """`waited` returns the seconds for which the process with an id has waited for a core."""
        self._waited = waited
        #: When the step of each process began, and how long the process had waited before.
        self._begun: dict[int, tuple[float, float]] = {}

    def measure(self, readings: Iterable[Reading]) -> dict[int, Step]:
        """Return the steps that event loops execute, by process; the longest of each."""
        longest: dict[int, Reading] = {}
        for reading in readings:
            if reading.stepping_since > 0:
                other = longest.get(reading.pid, reading)
                longest[reading.pid] = min(other, reading, key=lambda one: one.stepping_since)
        self._begun = {pid: self._began(pid, run) for pid, run in longest.items()}
        return {pid: self._step(pid, run) for pid, run in longest.items()}

    def _began(self, pid: int, run: Reading) -> tuple[float, float]:
        known = self._begun.get(pid)
        if known is not None and known[0] == run.stepping_since:
            return known
        return run.stepping_since, self._waited(pid)

    def _step(self, pid: int, run: Reading) -> Step:
        since, waited_before = self._begun[pid]
        without_core = max(0.0, self._waited(pid) - waited_before)
        return Step(run, time.monotonic() - since - without_core)

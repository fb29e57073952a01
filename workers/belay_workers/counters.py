"""Metric counters of a worker's processes, in shared memory.

Each child has a row of numbers that no other process writes, so no process waits for another. The
parent has a row for its own threads. A reader adds up the rows. A row stays when its child dies,
and the next child that takes the slot continues it, so no count ever falls. Counting costs a run
a few writes to memory and no message to another process.
"""

from __future__ import annotations

import mmap
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from belay_server.domain.metrics import (
    CANCEL_LATENCY,
    CHILD_DEATHS,
    CLAIM_LATENCY,
    ENDED,
    LEASE_LOSSES,
    PENDING,
    ROLLED_BACK,
    RUN_DURATION,
    RUNS_ENDED,
    SET_ASIDE,
    Counted,
    Timed,
)

if TYPE_CHECKING:
    from belay_server.services.runs.endings import RunEnd

COUNTERS = (RUNS_ENDED, LEASE_LOSSES, CHILD_DEATHS, SET_ASIDE)
HISTOGRAMS = (CLAIM_LATENCY, RUN_DURATION, CANCEL_LATENCY)
_CELL = 8


def _lay_out() -> tuple[dict[tuple[str, str], int], int]:
    """Return the first cell of each series in a row, and the number of cells of a row."""
    starts: dict[tuple[str, str], int] = {}
    width = 0
    for counter in COUNTERS:
        for value in counter.values:
            starts[counter.name, value] = width
            width += 1
    for histogram in HISTOGRAMS:
        for value in histogram.values:
            starts[histogram.name, value] = width
            width += len(histogram.buckets) + 2  # the bucket without a bound, and the sum
    return starts, width


_STARTS, _WIDTH = _lay_out()


@dataclass(frozen=True, slots=True)
class Times:
    """A histogram: the count of each bucket (the last has no bound), and the sum in seconds."""

    counts: Sequence[float]
    sum: float


class Counters:
    """One row of counters, written by one process."""

    def __init__(self, cells: memoryview[float]) -> None:
        self._cells = cells
        self._lock = threading.Lock()

    def claimed(self, waited_seconds: float) -> None:
        self._time(CLAIM_LATENCY, "", waited_seconds)

    def ended(self, end: RunEnd, how: str, seconds: float | None) -> None:
        """Count an end that this process wrote, `seconds` after the claim (None if unknown).

        `how` is the label of the cancel latency; it is used only when a cancel ended the run.
        """
        status = end.status or ROLLED_BACK
        if status not in ENDED:  # another process has made the run active again
            return
        self._count(RUNS_ENDED, status)
        if seconds is not None:
            self._time(RUN_DURATION, status, seconds)
        if end.cancel_seconds is not None:
            self._time(CANCEL_LATENCY, how, end.cancel_seconds)

    def ended_unstarted(self, status: str | None) -> None:
        """Count a run that a cancel ended before it ran: in the same transaction, so after 0 s."""
        self._count(RUNS_ENDED, status or ROLLED_BACK)
        self._time(CANCEL_LATENCY, PENDING, 0.0)

    def lease_lost(self, seen_by: str) -> None:
        self._count(LEASE_LOSSES, seen_by)

    def set_aside(self, what: str) -> None:
        self._count(SET_ASIDE, what)

    def child_died(self, cause: str) -> None:
        self._count(CHILD_DEATHS, cause)

    def _count(self, counter: Counted, value: str) -> None:
        with self._lock:
            self._cells[_STARTS[counter.name, value]] += 1

    def _time(self, histogram: Timed, value: str, seconds: float) -> None:
        start = _STARTS[histogram.name, value]
        with self._lock:
            self._cells[start + bisect_left(histogram.buckets, seconds)] += 1
            self._cells[start + len(histogram.buckets) + 1] += max(0.0, seconds)


class CounterTable:
    """All rows of a worker. Created in the parent process before it forks."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        memory = mmap.mmap(-1, rows * _WIDTH * _CELL)
        self._cells: memoryview[float] = memoryview(memory).cast("d")

    def row(self, index: int) -> Counters:
        return Counters(self._cells[index * _WIDTH : (index + 1) * _WIDTH])

    def count(self, counter: Counted, value: str) -> float:
        return self._sum(_STARTS[counter.name, value])

    def times(self, histogram: Timed, value: str) -> Times:
        start = _STARTS[histogram.name, value]
        bounds = len(histogram.buckets) + 1
        counts = [self._sum(start + i) for i in range(bounds)]
        return Times(counts, self._sum(start + bounds))

    def _sum(self, cell: int) -> float:
        return sum(self._cells[cell + row * _WIDTH] for row in range(self._rows))

"""Write the events of runs from their graphs to Redis, in batches, beside the graphs.

A separate thread drains a queue and appends the gathered events of all runs in one round trip: the
first event immediately, those that closely follow it together, some milliseconds later. While Redis
is unavailable, events wait for two seconds, as for a restart; then they are dropped, and the runs
continue: readers get their ends from Postgres. What resumable runs store waits for a flush.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import Event, EventBatch, EventLog, Position, Started, Written
from belay_server.domain.runs import Claim

log = logging.getLogger(__name__)

#: The events and bytes that may wait to be written; beyond either, events are dropped. That happens
#: only when Redis is unavailable or seconds behind.
_MOST_EVENTS = 100_000
_MOST_BYTES = 64 * 1024 * 1024
_BATCH = 2_000
#: The shortest time between two appends, in seconds, so that runs with many events need few.
_GATHER_SECONDS = 0.015
#: Seconds for which events wait for Redis since the first failure, and between two attempts.
_KEEP_SECONDS = 2.0
_RETRY_SECONDS = 0.1
#: Then, seconds for which events are dropped before the next attempt.
_PAUSE_SECONDS = 1.0


class RunEvents:
    """The events of one attempt of a run. `emit` and `flush` may be called from all threads."""

    def __init__(
        self, writer: EventWriter, claim: Claim, started: Started | None, *, behind_gap: bool
    ) -> None:
        self._writer = writer
        self.claim = claim
        #: Written with the first event.
        self.started = started
        self.written = Written()
        #: Readers see by its number that events may be missing before the first one.
        self.first = 2 if behind_gap else 1
        #: How many events were emitted, and how many of them have been written or dropped.
        self.emitted = self.settled = self.first - 1

    def emit(self, name: str, data: bytes) -> None:
        """Queue one event. It is dropped when too many are waiting."""
        self.emitted += 1
        self._writer.add(self, Event(Position(self.claim.claim_no, self.emitted), name, data))

    def flush(self, seconds: float) -> bool:
        """Wait until all events emitted so far are written or dropped. False after `seconds`."""
        return self._writer.flush(self, seconds)


class EventWriter:
    """The event writer of a process: one queue for all of its runs."""

    def __init__(self, event_log: EventLog) -> None:
        self._event_log = event_log
        self._events: deque[tuple[RunEvents, Event]] = deque()
        self._waiting_bytes = 0
        self._written = threading.Condition()
        self._wake = threading.Event()
        #: Set while a `flush` waits.
        self._hurry = threading.Event()
        self._paused_until = 0.0
        #: When Redis began to fail; None if the last attempt succeeded.
        self._failing_since: float | None = None
        self._thread = threading.Thread(target=self._write, name="belay-events", daemon=True)
        self._thread.start()

    def of_run(
        self, claim: Claim, started: Started | None = None, *, behind_gap: bool = False
    ) -> RunEvents:
        """Return the events of an attempt. `started` is written with the first of them. With
        `behind_gap`, events of the attempt before may be missing."""
        return RunEvents(self, claim, started, behind_gap=behind_gap)

    def add(self, run: RunEvents, event: Event) -> None:
        """Queue an event of a run; `RunEvents.emit` calls this."""
        if len(self._events) >= _MOST_EVENTS or self._waiting_bytes >= _MOST_BYTES:
            log.warning(
                "too many events waiting for Redis, dropped event %s of run %s",
                event.position,
                run.claim.run_id,
            )
            self._settle(run, 1)
            return
        self._waiting_bytes += len(event.data)
        self._events.append((run, event))
        if not self._wake.is_set():
            self._wake.set()

    def flush(self, run: RunEvents, seconds: float) -> bool:
        """Wait for the events of a run; `RunEvents.flush` calls this."""
        wanted = run.emitted
        if run.settled >= wanted:
            return True
        self._hurry.set()
        self._wake.set()
        with self._written:
            return self._written.wait_for(lambda: run.settled >= wanted, seconds)

    def _write(self) -> None:
        while True:
            self._wake.wait()
            while self._events:
                self._append(self._gathered())
                if self._events and not self._hurry.is_set():
                    self._hurry.wait(_GATHER_SECONDS)
            self._hurry.clear()
            self._wake.clear()
            # An event emitted in between may have set nothing, or what was just cleared.
            if self._events:
                self._wake.set()
                continue
            self._hurry.wait(_GATHER_SECONDS)

    def _gathered(self) -> dict[RunEvents, list[Event]]:
        """Return the events that wait, by run."""
        gathered: dict[RunEvents, list[Event]] = {}
        for _ in range(min(len(self._events), _BATCH)):
            run, event = self._events.popleft()
            gathered.setdefault(run, []).append(event)
        return gathered

    def _append(self, gathered: dict[RunEvents, list[Event]]) -> None:
        self._waiting_bytes -= sum(len(one.data) for events in gathered.values() for one in events)
        if time.monotonic() >= self._paused_until:
            self._try_to_append(gathered)
        for run, events in gathered.items():
            self._settle(run, len(events))

    def _try_to_append(self, gathered: dict[RunEvents, list[Event]]) -> None:
        batches = [
            EventBatch(
                run.claim.run_id,
                events,
                run.written,
                run.started if events[0].position.seq == run.first else None,
            )
            for run, events in gathered.items()
        ]
        while (error := self._failure_of(batches)) is not None:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
            if time.monotonic() - self._failing_since >= _KEEP_SECONDS:
                log.warning(
                    "dropped %d events of %d runs, cannot write to Redis: %s",
                    sum(len(batch.events) for batch in batches),
                    len(batches),
                    error,
                )
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                return
            time.sleep(_RETRY_SECONDS)
        self._failing_since = None

    def _failure_of(self, batches: list[EventBatch]) -> RedisError | None:
        """Append the batches, and return the error if that fails. The same batches may be appended
        again, whatever of them has been: Redis refuses the entries that it has."""
        try:
            self._event_log.append_batches(batches)
        except RedisError as error:
            return error
        return None

    def _settle(self, run: RunEvents, count: int) -> None:
        """Note that events of a run need not be waited for any more."""
        with self._written:
            run.settled += count
            self._written.notify_all()

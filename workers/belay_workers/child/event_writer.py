"""Write a run's events from its graph to Redis, in batches, beside the graph.

A separate thread drains a queue and appends the gathered events in one round trip: the first event
immediately, those that closely follow it together, some milliseconds later. While Redis is
unavailable, events are dropped and the run continues: readers get its end from Postgres. Only the
checkpoints of resumable runs wait for a flush, up to two seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import Event, EventLog, Position, Started
from belay_server.domain.runs import Claim

log = logging.getLogger(__name__)

#: The events and bytes that may wait to be written; beyond either, events are dropped. That happens
#: only when Redis is unavailable or seconds behind.
_MOST_EVENTS = 100_000
_MOST_BYTES = 64 * 1024 * 1024
_BATCH = 2_000
#: The shortest time between two appends, in seconds, so that runs with many events need few.
_GATHER_SECONDS = 0.015
#: Seconds for which events are dropped after a failure, before the next attempt.
_PAUSE_SECONDS = 1.0


class EventWriter:
    """The event writer of a child. Call `begin` for each attempt; `emit` and `flush` may be called
    from all threads of the child."""

    def __init__(self, event_log: EventLog) -> None:
        self._event_log = event_log
        self._events: deque[tuple[Claim, Event]] = deque()
        self._waiting_bytes = 0
        self._claim: Claim | None = None
        self._seq = 0
        self._started: Started | None = None
        self._written = threading.Condition()
        self._wake = threading.Event()
        #: Set while a `flush` waits.
        self._hurry = threading.Event()
        self._paused_until = 0.0
        self._thread = threading.Thread(target=self._write, name="belay-events", daemon=True)
        self._thread.start()

    def begin(self, claim: Claim, started: Started | None = None) -> None:
        """Start an attempt, to which the following events belong. `started` is written with the
        first of them."""
        self._claim = claim
        self._seq = 0
        self._started = started

    def emit(self, name: str, data: bytes) -> None:
        """Queue one event of the current run. It is dropped when too many are waiting."""
        assert self._claim is not None
        self._seq += 1
        event = Event(Position(self._claim.claim_no, self._seq), name, data)
        if len(self._events) >= _MOST_EVENTS or self._waiting_bytes >= _MOST_BYTES:
            log.warning(
                "too many events waiting for Redis, dropped event %s of run %s",
                event.position,
                self._claim.run_id,
            )
            return
        self._waiting_bytes += len(data)
        self._events.append((self._claim, event))
        if not self._wake.is_set():
            self._wake.set()

    def flush(self, seconds: float) -> bool:
        """Wait until all events emitted so far are written or dropped. False after `seconds`."""
        if not self._events and not self._wake.is_set():
            return True
        self._hurry.set()
        self._wake.set()
        with self._written:
            return self._written.wait_for(
                lambda: not self._events and not self._wake.is_set(), seconds
            )

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
            with self._written:
                self._written.notify_all()
            self._hurry.wait(_GATHER_SECONDS)

    def _gathered(self) -> list[tuple[Claim, Event]]:
        """Return the gathered events of one run."""
        batch: list[tuple[Claim, Event]] = []
        while self._events and len(batch) < _BATCH:
            if batch and self._events[0][0] != batch[0][0]:
                break
            batch.append(self._events.popleft())
        return batch

    def _append(self, batch: list[tuple[Claim, Event]]) -> None:
        self._waiting_bytes -= sum(len(event.data) for _, event in batch)
        if time.monotonic() < self._paused_until:
            return
        run_id = batch[0][0].run_id
        events = [event for _, event in batch]
        started = self._started if events[0].position.seq == 1 else None
        try:
            self._event_log.append(run_id, events, started=started)
        except RedisError as error:
            log.warning(
                "dropped %d events of run %s, cannot write to Redis: %s", len(batch), run_id, error
            )
            self._paused_until = time.monotonic() + _PAUSE_SECONDS

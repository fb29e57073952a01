"""Carries a run's events from its graph to Redis, in batches, without ever slowing the graph.

A thread of its own drains a queue and appends whatever has gathered in one round trip. When Redis
is away events are dropped, not the run: readers still learn the end from Postgres.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from app.bus.client import RedisError
from app.bus.event_log import Event, EventLog
from app.domain.runs import Claim

log = logging.getLogger(__name__)

_BATCH = 500
_QUEUE = 20_000
#: After a failure, drop for this long before trying Redis again.
_PAUSE_SECONDS = 1.0


class _Flush:
    def __init__(self) -> None:
        self.done = threading.Event()


class EventWriter:
    """One per child; `begin` at each run. `emit` and `flush` are for the child's own threads."""

    def __init__(self, event_log: EventLog) -> None:
        self._event_log = event_log
        self._queue: queue.Queue[tuple[Claim, Event] | _Flush] = queue.Queue(_QUEUE)
        self._claim: Claim | None = None
        self._seq = 0
        self._paused_until = 0.0
        self._thread = threading.Thread(target=self._write, name="belay-events", daemon=True)
        self._thread.start()

    def begin(self, claim: Claim) -> None:
        self._claim = claim
        self._seq = 0

    def emit(self, name: str, data: bytes) -> None:
        """Queue one event of the current run; dropped when Redis is far behind."""
        assert self._claim is not None
        self._seq += 1
        event = Event(f"{self._claim.claim_no}-{self._seq}", name, data)
        try:
            self._queue.put_nowait((self._claim, event))
        except queue.Full:
            log.warning("event %s of run %s dropped", event.id, self._claim.run_id)

    def flush(self, seconds: float) -> bool:
        """Wait until everything emitted so far is in Redis, or given up; False after `seconds`."""
        marker = _Flush()
        try:
            self._queue.put(marker, timeout=seconds)
        except queue.Full:
            return False
        return marker.done.wait(seconds)

    def _write(self) -> None:
        while True:
            batch: list[tuple[Claim, Event]] = []
            marker = self._gather(batch)
            if batch:
                self._append(batch)
            if marker is not None:
                marker.done.set()

    def _gather(self, batch: list[tuple[Claim, Event]]) -> _Flush | None:
        """Wait for one item, then take what else is there, up to a flush marker."""
        item = self._queue.get()
        while True:
            if isinstance(item, _Flush):
                return item
            batch.append(item)
            if len(batch) >= _BATCH:
                return None
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return None

    def _append(self, batch: list[tuple[Claim, Event]]) -> None:
        if time.monotonic() < self._paused_until:
            return
        run_id = batch[0][0].run_id
        events = [event for claim, event in batch if claim.run_id == run_id]
        try:
            self._event_log.append(run_id, events)
        except RedisError as error:
            log.warning("%d events of run %s not written: %s", len(events), run_id, error)
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            return
        rest = batch[len(events) :]
        if rest:
            self._append(rest)

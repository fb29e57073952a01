"""Following a thread for a client: what its runs stream, one after the other, and its own changes.

A thread has a log of its own, of where its runs begin and of what else happens to it; the events of
a run are in the run's log. A frame's id says where both stand: the entry of the thread's log, then
the event of the run it names. The stream ends when the thread is deleted, or the client leaves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from uuid import UUID

import orjson

from app.bus.client import RedisError
from app.bus.event_log import (
    END_SEQ,
    RUN_STARTED,
    START,
    THREAD_DELETED,
    Event,
    Position,
    just_before,
)
from app.bus.run_feed import Subscription
from app.db import threads as thread_rows
from app.domain.errors import InvalidRequest, NotFound
from app.graphs.serde import to_json
from app.services.parts import Parts
from app.services.run_stream import HEADERS, HEARTBEAT, Following, WatchClient

log = logging.getLogger(__name__)

THREAD_STREAM_MODES = ("run_modes", "lifecycle", "state_update")


@dataclass(frozen=True, slots=True)
class ThreadPosition:
    """A place in a thread's stream: an entry of its log, and a place in the run it names."""

    entry: Position
    in_run: Position = START

    @classmethod
    def parse(cls, text: str) -> ThreadPosition:
        """Raises InvalidRequest."""
        numbers = text.split("-")
        try:
            entry, in_run = "-".join(numbers[:2]), "-".join(numbers[2:])
            return cls(Position.parse(entry), Position.parse(in_run))
        except ValueError:
            raise InvalidRequest(f"Invalid Last-Event-ID: {text}") from None

    def __str__(self) -> str:
        return f"{self.entry}-{self.in_run}"


@dataclass(frozen=True, slots=True)
class ThreadFollow:
    """How a client follows a thread. `after` None: what comes from now on."""

    thread_id: UUID
    modes: frozenset[str]
    after: ThreadPosition | None


def follow_thread(
    parts: Parts, thread_id: UUID, modes: frozenset[str], last_event_id: str | None
) -> ThreadFollow:
    """Raises NotFound for an unknown thread, InvalidRequest for an id that is none."""
    with parts.database.connection() as conn:
        if thread_rows.get_thread(conn, thread_id) is None:
            raise NotFound(f"Thread with ID {thread_id} not found")
    if last_event_id is None:
        return ThreadFollow(thread_id, modes, None)
    if last_event_id in ("-", "0", "-1", "0-0", ""):
        return ThreadFollow(thread_id, modes, ThreadPosition(START))
    return ThreadFollow(thread_id, modes, ThreadPosition.parse(last_event_id))


def stream_thread(parts: Parts, follow: ThreadFollow, watch: WatchClient) -> Following:
    """Server-sent events, each with an id, and a heartbeat comment now and then."""
    newest = _newest(parts, follow.thread_id)
    after = follow.after or _from_now_on(parts, newest)
    # The entry of the place where the client is, is read again: its run may not be over.
    subscription = parts.feed.subscribe(
        follow.thread_id, after=just_before(after.entry), has_row=False
    )
    stream = _ThreadStream(parts, follow, subscription, after, newest)
    return Following(parts, subscription, stream.frames(watch))


def _newest(parts: Parts, thread_id: UUID) -> Event | None:
    try:
        newest = parts.event_log.read_newest(thread_id, count=1)
    except RedisError as error:
        log.warning("log of thread %s not read: %s", thread_id, error)
        return None
    return newest[-1] if newest else None


def _from_now_on(parts: Parts, newest: Event | None) -> ThreadPosition:
    """Where the thread is now: in the middle of a run, maybe."""
    if newest is None:
        return ThreadPosition(START)
    in_run = Position(0, END_SEQ)
    if newest.name == RUN_STARTED:
        started = orjson.loads(newest.data)
        try:
            in_run = parts.event_log.last_position(UUID(started["run_id"]))
        except RedisError as error:
            log.warning("event log of run %s not read: %s", started["run_id"], error)
    return ThreadPosition(newest.position, in_run)


class _ThreadStream:
    """One client's way along a thread."""

    def __init__(
        self,
        parts: Parts,
        follow: ThreadFollow,
        subscription: Subscription,
        after: ThreadPosition,
        newest: Event | None,
    ) -> None:
        self._parts = parts
        self._modes = follow.modes
        self._thread = subscription
        self._after = after
        #: Up to here it is a replay, of what can be replayed.
        self._old = START if newest is None else newest.position
        self._run: Subscription | None = None
        self._over: UUID | None = None

    def frames(self, watch: WatchClient) -> Generator[bytes]:
        stop_watching = watch(self._leave)
        heartbeat = self._parts.settings.heartbeat_seconds
        try:
            yield HEADERS
            beat_at = time.monotonic() + heartbeat
            while not self._thread.client_left:
                events = self._thread.take(beat_at)
                for event in events:
                    if event.name == THREAD_DELETED:
                        return
                    yield from self._frames_of(event, heartbeat)
                if not events or time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + heartbeat
                    if not self._thread.client_left:
                        yield HEARTBEAT
        finally:
            stop_watching()
            self._parts.feed.unsubscribe(self._thread)
            if self._run is not None:
                self._parts.feed.unsubscribe(self._run)

    def _leave(self) -> None:
        self._thread.leave()
        if self._run is not None:
            self._run.leave()

    def _frames_of(self, event: Event, heartbeat: float) -> Generator[bytes]:
        if event.position < self._after.entry:
            return
        if event.name == RUN_STARTED:
            yield from self._frames_of_run(event, heartbeat)
        elif event.position > self._after.entry and event.name in self._modes:
            yield _frame(event.name, event.data, ThreadPosition(event.position))

    def _frames_of_run(self, started: Event, heartbeat: float) -> Generator[bytes]:
        """A run from its start, or from where the client was in it, to its end."""
        data = orjson.loads(started.data)
        run_id = UUID(data["run_id"])
        is_here = started.position == self._after.entry
        after = self._after.in_run if is_here else Position(data["claim_no"], 0)
        if run_id == self._over or after.seq >= END_SEQ:
            return  # it was followed to its end, of which this is an earlier or later attempt
        if started.position <= self._old and not is_here and not data["resumable"]:
            return
        run = self._run = self._parts.feed.subscribe(run_id, after=after)
        try:
            while not run.drained and not run.client_left:
                events = run.take(time.monotonic() + heartbeat)
                if frames := self._frames_of_events(started.position, events):
                    yield frames
                if not events and not run.ended and not run.client_left:
                    yield HEARTBEAT
        finally:
            self._parts.feed.unsubscribe(run)
            self._run = None
        if not run.client_left:
            self._over = run_id
            done = to_json({"status": "run_done", "run_id": str(run_id)})
            end = Position(run.position.claim_no, END_SEQ)
            if self._modes & {"run_modes", "lifecycle"}:
                yield _frame("metadata", done, ThreadPosition(started.position, end))

    def _frames_of_events(self, entry: Position, events: Iterable[Event]) -> bytes:
        every = "run_modes" in self._modes
        starts = "lifecycle" in self._modes
        return b"".join(
            _frame(event.name, event.data, ThreadPosition(entry, event.position))
            for event in events
            if every or (starts and event.name == "metadata")
        )


def _frame(name: str, data: bytes, position: ThreadPosition) -> bytes:
    return b"event: %b\ndata: %b\nid: %b\n\n" % (name.encode(), data, str(position).encode())
